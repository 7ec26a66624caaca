"""The tensors every artefact is compared with: the network's modules in float64.

The reference is the *rewritten* network in float64. An artefact's residual
stream is re-scaled by the rewrites, so its blocks can be compared with no other;
and that this network is the original is measured here too, block by block.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from van_deploy.bundle import Bundle
from van_deploy.errors import BundleError
from van_deploy.graph.fold import FoldReport, Rewrites, fold_van
from van_deploy.model.checkpoint import LoadedVan

__all__ = ["Power", "Reference", "reference_of", "rewrites_of", "unit_powers"]

PROOF_IMAGES = 1
Array = npt.NDArray[np.float64]


@dataclass
class Power:
    """Signal and noise of one tensor, summed over images as they pass.

    Attributes:
        signal: sum of the squares of the reference.
        noise: sum of the squares of the difference.
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, found: Array) -> None:
        """Add one batch; a NaN, an infinity or another shape makes the noise infinite."""
        self.signal += float(np.square(reference).sum())
        if found.shape != reference.shape or not np.isfinite(found).all():
            self.noise = math.inf
        else:
            self.noise += float(np.square(found - reference).sum())

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in dB; ``inf`` for none, ``-inf`` for a ruined tensor."""
        if self.noise == 0.0:
            return math.inf
        if not math.isfinite(self.noise) or self.signal == 0.0:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


class Reference:
    """The original and the rewritten network in float64, and every module's result.

    Args:
        loaded: the original network.
        rewrites: those the bundle was exported with.
        image: ``(1, C, S, S)`` to prove the rewriting on.
    """

    def __init__(self, loaded: LoadedVan, rewrites: Rewrites, image: Tensor) -> None:
        self.fold: FoldReport = fold_van(loaded.model, image, rewrites)
        self.original = copy.deepcopy(loaded.model).double().eval()
        # Folded in float64 and stored in float32: these are the weights the artefacts hold.
        self.rewritten = copy.deepcopy(self.fold.model).double().eval()
        self.modules = [name for name, _ in self.rewritten.named_modules() if name]

    @torch.inference_mode()
    def outputs(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        """Return every module's result for ``images (N, C, S, S)``, float64, by path."""
        found: dict[str, Array] = {}
        with _taps(self.rewritten, self.modules, found):
            self.rewritten(torch.from_numpy(images).double())
        return found

    @torch.inference_mode()
    def original_units(self, images: npt.NDArray[np.float32]) -> dict[str, Array]:
        """Return the original's patch embeddings, blocks and logits as the rewritten has them."""
        names = [*self.fold.stream_scales, "head"]
        found: dict[str, Array] = {}
        with _taps(self.original, names, found):
            self.original(torch.from_numpy(images).double())
        for name, scale in self.fold.stream_scales.items():
            found[name] = found[name] / scale.numpy()[:, None, None]
        return found


class _taps:  # noqa: N801 - reads as a verb
    """Collects the results of modules while it is open."""

    def __init__(self, model: nn.Module, names: list[str], found: dict[str, Array]) -> None:
        self.model, self.names, self.found = model, names, found
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name in self.names:
            module = self.model.get_submodule(name)
            self.handles.append(module.register_forward_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.found[name] = output.numpy().astype(np.float64)

        return keep


def rewrites_of(bundle: Bundle) -> Rewrites:
    """Return the rewrites a bundle was exported with.

    Raises:
        BundleError: the manifest does not say.
    """
    try:
        names = bundle.manifest.checks["fold"]["rewrites"]
        return Rewrites(**{f: f in names for f in Rewrites.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"The bundle '{bundle.path}' does not say how its network was rewritten.",
            "Export the model again.",
        ) from error


def reference_of(bundle: Bundle, loaded: LoadedVan, images: npt.NDArray[np.float32]) -> Reference:
    """Return the reference for a bundle's artefacts, its rewriting proved on the first image."""
    return Reference(loaded, rewrites_of(bundle), torch.from_numpy(images[:PROOF_IMAGES]))


def unit_powers(reference: Reference, images: npt.NDArray[np.float32]) -> Mapping[str, Power]:
    """Return how the rewritten network's units compare with the original's, both in float64."""
    expected, found = reference.original_units(images), reference.outputs(images)
    powers = {name: Power() for name in expected}
    for name, power in powers.items():
        power.add(expected[name], found[name])
    return powers
