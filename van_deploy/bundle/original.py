"""The PyTorch network a bundle was made from, found again and proved to be the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from van_deploy.bundle.reading import Bundle
from van_deploy.errors import BundleError, InputError
from van_deploy.model.checkpoint import EMBEDDED, LoadedVan, load_van
from van_deploy.model.weights_source import WeightsSource

__all__ = ["original_network"]


def original_network(bundle: Bundle, weights: str | Path | None = None) -> LoadedVan:
    """Return the unfolded PyTorch network of a bundle, its weights' digest checked.

    Its preprocessing and class names are the bundle's. Nothing is downloaded:
    weights from a hub must still be in its cache.

    Args:
        bundle: the bundle.
        weights: where its weights file is now; None takes the place the manifest names.

    Raises:
        BundleError: the weights have moved, have changed, or are not this bundle's.
    """
    recorded = bundle.manifest.weights
    loaded = _load(bundle, recorded, str(weights) if weights is not None else None)
    if loaded.source.sha256 != recorded.sha256:
        raise _not_the_weights(bundle, recorded, loaded)
    return replace(
        loaded,
        name=bundle.name,
        preprocessing=bundle.manifest.preprocessing,
        class_names=bundle.manifest.class_names,
    )


def _load(bundle: Bundle, recorded: WeightsSource, weights: str | None) -> LoadedVan:
    container = recorded.container if recorded.container != "top level" else None
    try:
        if weights is not None:
            return load_van(_place(weights), container=container)
        if recorded.format == "embedded":
            return load_van(EMBEDDED)
        if recorded.format == "random":
            return load_van(recorded.spec, weights="random", seed=recorded.seed or 0)
        return load_van(_place(recorded.path), container=container)
    except InputError as error:
        place = weights or recorded.path or recorded.spec
        raise BundleError(
            f"The weights that the bundle '{bundle.path}' was made from cannot be read "
            f"from '{place}': {error.message}",
            "Say where they are with --weights PATH.",
        ) from error


def _not_the_weights(bundle: Bundle, recorded: WeightsSource, loaded: LoadedVan) -> BundleError:
    if loaded.source.format == "random":
        return BundleError(
            f"Seed {recorded.seed} gives other random weights here than those in '{bundle.path}'.",
            "Export the model again with this version of PyTorch.",
        )
    return BundleError(
        f"'{loaded.source.path}' is not what the bundle '{bundle.path}' was made from: "
        f"its SHA-256 is {loaded.source.sha256[:12]}..., "
        f"the manifest says {recorded.sha256[:12]}....",
        "Give the file it was made from with --weights PATH, or export again.",
    )


def _place(path: str) -> str:
    """Return a path so written that it is not taken for a variant's name."""
    return str(Path(path).expanduser().absolute())
