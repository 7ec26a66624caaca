"""The network a bundle was made from, loaded again from where its weights came."""

from __future__ import annotations

from van_deploy.bundle import Bundle
from van_deploy.errors import BundleError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.random_weights import sha256_of_state

__all__ = ["original_network"]


def original_network(bundle: Bundle) -> LoadedVan:
    """Return the unfolded PyTorch network of a bundle, its weights' digest checked.

    Nothing is downloaded: weights from a hub must still be in its cache.

    Raises:
        BundleError: the manifest does not say where the weights were, or they are others.
        CheckpointError: they are not there any more.
        DownloadError: the file has another digest.
    """
    weights = bundle.manifest.get("weights")
    if weights is None:
        raise BundleError(
            f"The bundle '{bundle.path}' does not say which weights it was made from.",
            "Export the model again.",
        )
    if weights["format"] == "random":
        return _random(bundle)
    container = weights["container"]
    return load_van(
        bundle.name if weights["format"] == "embedded" else weights["path"],
        expect_sha256=weights["sha256"],
        offline=True,
        container=None if container == "top level" else container,
    )


def _random(bundle: Bundle) -> LoadedVan:
    weights = bundle.manifest["weights"]
    loaded = load_van(weights["spec"], weights="random", seed=weights["seed"])
    if sha256_of_state(loaded.model.state_dict()) != weights["sha256"]:
        raise BundleError(
            f"Seed {weights['seed']} gives other random weights here than those in "
            f"'{bundle.path}'.",
            "Export the model again with this version of PyTorch.",
        )
    return loaded
