"""What artifacts are compared with: the original network's logits, and every module's result.

The logits are the *original* network's, in float64. Modules are compared with the
*rewritten* network's: an artifact's residual stream is re-scaled by the rewrites, so its
blocks can be compared with no other. Where PyTorch is not, ``model.onnx`` stands in for it
once it holds on the golden samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.checks.golden import GOLDEN_IMAGES, golden_samples
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.checks.samples import (
    OTHER_IMAGES,
    Outputs,
    Samples,
    described_at,
    other_sizes,
    tiled,
)
from van_deploy.config.sizes import ImageSize
from van_deploy.data import CheckImages, check_images
from van_deploy.errors import BundleError
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.metrics import Task
from van_deploy.model.pixels import Pixels
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from van_deploy.graph.fold import Rewrites
    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.model.variants import VanConfig

__all__ = [
    "ModuleReference",
    "NoiseSum",
    "OnnxModules",
    "TorchModules",
    "reference_samples",
    "samples_for",
]

REFERENCE_BATCH = 8  # images PyTorch sees at a time: enough to be fast, few enough to be lean
PROOF_IMAGES = 1
Array = npt.NDArray[np.float64]


def reference_samples(
    loaded: LoadedVan, images: CheckImages, sizes: Sequence[ImageSize] = ()
) -> Samples:
    """Return images with the original network's answers in float64 and float32.

    Args:
        loaded: the original network.
        images: at its own size.
        sizes: others, at which the first images are repeated and answered, too.
    """
    double = copy.deepcopy(loaded.model).double().eval()
    task = Task.of(loaded.config.num_classes, loaded.config.problem_type)

    def samples(inputs: Images, pixels: Pixels | None, described: str) -> Samples:
        height, width = inputs.shape[2:]
        outputs = Outputs.of(loaded.config, (height, width))
        exact, single = (
            _answers(m, loaded.config, outputs, inputs) for m in (double, loaded.model)
        )
        names = images.names[: len(inputs)]
        return Samples(
            inputs, pixels, exact, single.astype(np.float32), names, described, task, False, outputs
        )

    whole = samples(images.inputs, images.pixels, images.description)
    first = images.inputs[:OTHER_IMAGES]
    pixels = None if images.pixels is None else images.pixels[:OTHER_IMAGES]
    others = (
        samples(
            tiled(first, size, 2),
            None if pixels is None else tiled(pixels, size, 1),
            described_at(size, len(first)),
        )
        for size in sizes
    )
    return replace(whole, others=tuple(others))


def _answers(model: nn.Module, config: VanConfig, outputs: Outputs, images: Images) -> Array:
    """Return the rows that a network answers to images, computed in its own type."""
    import torch

    kind, pieces = next(model.parameters()).dtype, []
    with torch.inference_mode():
        for start in range(0, len(images), REFERENCE_BATCH):
            given = model(torch.from_numpy(images[start : start + REFERENCE_BATCH]).to(kind))
            found = given if isinstance(given, tuple) else (given,)
            named = {n: y.numpy() for n, y in zip(config.output_names, found, strict=True)}
            pieces.append(outputs.rows(named))
    return np.concatenate(pieces)


def samples_for(
    bundle: Bundle, loaded: LoadedVan | None, images: Path | None, count: int = GOLDEN_IMAGES
) -> Samples:
    """Return what a bundle is judged on.

    Args:
        bundle: the bundle.
        loaded: its original network; None takes the golden samples as they are.
        images: the user's folder or ``.npz``; None for the golden samples, or sample
            photographs where the bundle has none.
        count: how many of the images, where there is a network.

    Raises:
        BundleError: there is no network and there are no golden samples, or they were changed.
        ImageError: the images cannot be read.
    """
    if loaded is None:
        return golden_samples(bundle)
    sizes = other_sizes(bundle.manifest.sizes, loaded.preprocessing.image_size)
    if images is not None or bundle.manifest.golden is None:
        return reference_samples(
            loaded, check_images(loaded.name, loaded.preprocessing, count, images), sizes
        )
    golden = golden_samples(bundle).first(count)
    same = CheckImages(
        tuple(range(len(golden))),
        golden.inputs,
        golden.pixels,
        names=golden.names,
        description=golden.description,
    )
    return replace(reference_samples(loaded, same, sizes), task=golden.task, golden=True)


@dataclass
class NoiseSum:
    """Signal and noise of one tensor, summed over images as they pass.

    Attributes:
        signal: sum of the squares of the reference.
        noise: sum of the squares of the difference.
    """

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> None:
        """Add one batch; a NaN, an infinity or another shape makes the noise infinite."""
        self.signal += float(np.square(reference, dtype=np.float64).sum())
        if found.shape != reference.shape or not np.isfinite(found).all():
            self.noise = math.inf
        else:
            self.noise += float(np.square(found.astype(np.float64) - reference).sum())

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in dB; ``inf`` for none, ``-inf`` for a ruined tensor."""
        if self.noise == 0.0:
            return math.inf
        if not math.isfinite(self.noise) or self.signal == 0.0:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


@runtime_checkable
class ModuleReference(Protocol):
    """Gives every module's result."""

    @property
    def described(self) -> str:
        """What it is, for reports."""

    @property
    def modules(self) -> Sequence[str]:
        """Paths of the modules whose result it gives."""

    def outputs(self, images: Images) -> Mapping[str, Array]:
        """Return every module's result for ``images (N, C, S, S)``, float64, by path."""


class TorchModules:
    """The original network, rewritten as the bundle's export was, in float64.

    Args:
        bundle: says which rewrites were made.
        loaded: the original network.
        images: the first is what the rewriting is proved on.

    Raises:
        BundleError: the manifest does not say how the network was rewritten.
    """

    described = "PyTorch, the rewritten network in float64"

    def __init__(self, bundle: Bundle, loaded: LoadedVan, images: Images) -> None:
        import torch

        from van_deploy.graph.fold import fold_van

        proof = torch.from_numpy(images[:PROOF_IMAGES])
        self.fold = fold_van(loaded.model, proof, _rewrites_of(bundle))
        # Folded in float64 and stored in float32: these are the weights the artifacts hold.
        self.network: nn.Module = copy.deepcopy(self.fold.model).double().eval()
        self.modules = [name for name, _ in self.network.named_modules() if name]

    def outputs(self, images: Images) -> Mapping[str, Array]:
        """Return every module's result for ``images (N, C, S, S)``, float64, by path."""
        import torch

        found: dict[str, Array] = {}

        def keep(name: str) -> Any:
            def hook(module: object, inputs: object, output: Any) -> None:
                found[name] = output.numpy()

            return hook

        handles = [
            self.network.get_submodule(name).register_forward_hook(keep(name))
            for name in self.modules
        ]
        try:
            with torch.inference_mode():
                self.network(torch.from_numpy(images).double())
        finally:
            for handle in handles:
                handle.remove()
        return found


class OnnxModules:
    """``model.onnx`` in ONNX Runtime, which has to hold on the golden samples first.

    Args:
        model: the graph, whose tensors are named after modules.
    """

    described = "model.onnx in ONNX Runtime, which holds on the golden samples"

    def __init__(self, model: ModelProto) -> None:
        made = [name for node in model.graph.node for name in node.output if name]
        self.modules = [module_of(name) for name in made]
        self._session = quiet_session(with_taps(model, made))

    def outputs(self, images: Images) -> Mapping[str, Array]:
        """Return every tensor for ``images (N, C, S, S)``, float64, by name."""
        taps = run_taps(self._session, {INPUT_NAME: images})
        return {module_of(name): value for name, value in taps}


def _rewrites_of(bundle: Bundle) -> Rewrites:
    from van_deploy.graph.fold import Rewrites

    try:
        names = bundle.manifest.checks["fold"]["rewrites"]
        return Rewrites(**{f: f in names for f in Rewrites.__dataclass_fields__})
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"The bundle '{bundle.path}' does not say how its network was rewritten.",
            "Export the model again.",
        ) from error
