"""The PyTorch network a bundle was made from, found again and proved to be the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.errors import BundleError, InputError
from van_deploy.files import file_sha256
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import embedded_files
from van_deploy.model.files import read_weights
from van_deploy.model.pickles import TOP_LEVEL
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.random_weights import random_van, sha256_of_state
from van_deploy.model.state import network_from_state, official_state
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig
from van_deploy.model.weights_source import WeightsSource

__all__ = ["original_network"]


def original_network(bundle: Bundle, weights: str | Path | None = None) -> LoadedVan:
    """Return the unfolded PyTorch network of a bundle, its weights' digest checked.

    Only tensors are read from the weights file: architecture, preprocessing and class names
    are the manifest's, whatever stands beside the file today. Nothing is downloaded: weights
    from a hub must still be in its cache.

    Args:
        bundle: the bundle.
        weights: where its weights file is now; None takes the place the manifest names.

    Raises:
        BundleError: the manifest does not say where the weights were, or they
            have moved, have changed, or are not this bundle's.
    """
    manifest = bundle.manifest
    recorded = manifest.get("weights")
    if recorded is None:
        raise BundleError(
            f"The bundle '{bundle.path}' does not say which weights it was made from.",
            "Export the model again.",
        )
    known = {field.name for field in fields(VanConfig)}
    stated: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in manifest["architecture"].items()
        if key in known
    }
    config = VanConfig(**stated)
    place = Path(weights or recorded["path"] or recorded["spec"]).expanduser()
    try:
        if weights is None and recorded["format"] == "random":
            model, place = random_van(config, recorded["seed"]), Path("")
            digest = sha256_of_state(model.state_dict())
        else:
            if weights is None and recorded["format"] == "embedded":
                place = embedded_files().weights
            elif place.is_dir():
                place /= Path(recorded["path"]).name
            digest = file_sha256(place) if place.is_file() else ""
            model = _network(place, config, recorded["container"])
    except InputError as error:
        raise BundleError(
            f"The weights that the bundle '{bundle.path}' was made from cannot be read "
            f"from '{place}': {error.message}",
            "Say where they are with --weights PATH.",
        ) from error
    if digest != recorded["sha256"]:
        raise _not_the_weights(bundle, recorded, place, digest)
    names = manifest.get("class_names")
    source = {field.name: recorded.get(field.name) for field in fields(WeightsSource)}
    return LoadedVan(
        bundle.name,
        model,
        config,
        WeightsSource(**{**source, "path": str(place), "notes": tuple(recorded["notes"])}),
        Preprocessing.from_dict(manifest["preprocessing"]),
        tuple(names) if names else None,
    )


def _network(path: Path, config: VanConfig, container: str) -> VAN:
    file = read_weights(path, container=None if container == TOP_LEVEL else container)
    return network_from_state(official_state(file.tensors, container).tensors, config)


def _not_the_weights(
    bundle: Bundle, recorded: Mapping[str, Any], place: Path, digest: str
) -> BundleError:
    if not place.name:
        return BundleError(
            f"Seed {recorded['seed']} gives other random weights here than those in "
            f"'{bundle.path}'.",
            "Export the model again with this version of PyTorch.",
        )
    return BundleError(
        f"'{place}' is not what the bundle '{bundle.path}' was made from: "
        f"its SHA-256 is {digest[:12]}..., the manifest says {recorded['sha256'][:12]}....",
        "Give the file it was made from with --weights PATH, or export again.",
    )
