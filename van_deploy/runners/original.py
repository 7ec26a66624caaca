"""The PyTorch network a bundle was made from, found again and proved to be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle.reading import Bundle
from van_deploy.errors import BundleError, InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


def original_network(bundle: Bundle, weights: str | Path | None = None) -> LoadedVan:
    """Return the unfolded PyTorch network of a bundle, its weights' digest checked.

    Only tensors are read from the weights file: architecture, preprocessing and class names
    are the manifest's, whatever stands beside the file today. Nothing is downloaded: weights
    from a hub must still be in its cache.

    Args:
        bundle: the bundle.
        weights: where its weights file is now; None takes the place the manifest names.

    Raises:
        MissingDependency: PyTorch or timm is not installed.
        BundleError: the weights have moved, have changed, or are not this bundle's.
    """
    try:
        from van_deploy.model.checkpoint import LoadedVan, network_from_state, read_weights
        from van_deploy.model.embedded import EMBEDDED_WEIGHTS
        from van_deploy.model.van import random_van, sha256_of_state
    except ImportError as error:
        raise MissingDependency(
            f"The original network needs PyTorch and timm: {error}.",
            "Install them with `pip install van-deploy`, or compare with the golden samples "
            "(--against golden), which needs neither.",
        ) from error
    manifest = bundle.manifest
    recorded, config = manifest.weights, manifest.architecture
    place = Path(weights or recorded.path or recorded.spec).expanduser()
    drawn = weights is None and recorded.format == "random"
    try:
        if drawn:
            model = random_van(config, recorded.seed or 0)
            digest = sha256_of_state(model.state_dict())
        else:
            if weights is None and recorded.format == "embedded":
                place = EMBEDDED_WEIGHTS
            elif place.is_dir():
                place /= Path(recorded.path).name
            file = read_weights(place, recorded.container)
            digest = file_sha256(place)
            if digest == recorded.sha256:
                model = network_from_state(file.tensors, config)
    except (InputError, UsageError) as error:
        raise BundleError(
            f"The weights that the bundle '{bundle.path}' was made from cannot be read "
            f"from '{place}': {error.message}",
            "Say where they are with --weights PATH.",
        ) from error
    if digest != recorded.sha256:
        what = f"What seed {recorded.seed} draws here" if drawn else f"'{place}'"
        raise BundleError(
            f"{what} is not what the bundle '{bundle.path}' was made from: its SHA-256 is "
            f"{digest[:12]}..., the manifest says {recorded.sha256[:12]}....",
            "Export again with this PyTorch, or give the weights it was made from with --weights "
            "PATH.",
        )
    return LoadedVan(
        bundle.name,
        model,
        config,
        replace(recorded, path="" if drawn else str(place)),
        manifest.preprocessing,
        manifest.class_names,
    )
