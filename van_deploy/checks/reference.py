"""What artifacts are compared with: the original network's logits, and every module's result.

The logits are the *original* network's, in float64. Modules are compared with the
*rewritten* network's: an artifact's residual stream is re-scaled by the rewrites, so its
blocks can be compared with no other. Where PyTorch is not, ``model.onnx`` stands in for it
once it holds on the golden samples.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import DEFAULT, Outcome
from van_deploy.checks.golden import GOLDEN_IMAGES, golden_samples
from van_deploy.checks.graphs import quiet_session, run_taps, with_taps
from van_deploy.checks.judging import judge_new
from van_deploy.checks.samples import Outputs, Samples, other_sizes, samples_from
from van_deploy.config import GateProfile
from van_deploy.config.sizes import ImageSize
from van_deploy.data import CheckImages, check_images
from van_deploy.errors import BundleError, GateFailed
from van_deploy.graph.names import INPUT_NAME, module_of
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor, nn

    from van_deploy.model.checkpoint import LoadedVan


REFERENCE_BATCH = 8  # images PyTorch sees at a time: enough to be fast, few enough to be lean
PROOF_IMAGES = 1
Array = npt.NDArray[np.float64]


def reference_samples(
    loaded: LoadedVan,
    images: CheckImages,
    sizes: Sequence[ImageSize] = (),
    *,
    golden: bool = False,
) -> Samples:
    """Return images with the original network's answers in float64 and float32.

    Args:
        loaded: the original network.
        images: at its own size.
        sizes: others, at which the first images are repeated and answered, too.
        golden: whether they are those of the bundle.
    """
    import torch

    double, names = copy.deepcopy(loaded.model).double().eval(), loaded.config.output_names

    def rows(model: nn.Module, kind: torch.dtype, inputs: Images, outputs: Outputs) -> Array:
        pieces = []
        for start in range(0, len(inputs), REFERENCE_BATCH):
            given = model(torch.from_numpy(inputs[start : start + REFERENCE_BATCH]).to(kind))
            found = given if isinstance(given, tuple) else (given,)
            pieces.append(outputs.rows({n: y.numpy() for n, y in zip(names, found, strict=True)}))
        return np.concatenate(pieces)

    def answers(_: str, inputs: Images, outputs: Outputs) -> tuple[Array, Array]:
        with torch.inference_mode():
            exact = rows(double, torch.float64, inputs, outputs)
            single = rows(loaded.model, torch.float32, inputs, outputs)
        return exact, single.astype(np.float32)

    return samples_from(images, loaded.config, sizes, answers, golden=golden)


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
        chosen = check_images(loaded.name, loaded.preprocessing, count, images)
        return reference_samples(loaded, chosen, sizes)
    golden = golden_samples(bundle).first(count)
    same = CheckImages(
        tuple(range(len(golden))),
        golden.inputs,
        golden.pixels,
        names=golden.names,
        description=golden.description,
    )
    return reference_samples(loaded, same, sizes, golden=True)


def module_reference(
    bundle: Bundle, samples: Samples, loaded: LoadedVan | None, profile: GateProfile = DEFAULT
) -> TorchModules | OnnxModules:
    """Return what modules are compared with: the original network, else ``model.onnx``.

    Args:
        bundle: the bundle.
        samples: what it is judged on.
        loaded: the original network, or None.
        profile: what a recipe sets otherwise for FP32.

    Raises:
        GateFailed: there is no original network, and ``model.onnx`` does not hold.
        BundleError: the manifest does not say how the network was rewritten.
    """
    if loaded is not None:
        return TorchModules(bundle, loaded, samples.inputs)
    import onnx

    path = bundle.verified("fp32")
    judged, _ = judge_new(path, "fp32", samples, profile=profile)
    reasons = [f.message for f in judged.findings if f.outcome is not Outcome.PASS]
    if reasons:
        raise GateFailed(
            "model.onnx does not hold on the golden samples, so nothing can be compared with "
            f"it: {reasons[0]}.",
            "Compare with the original network, on a machine that has PyTorch and the weights.",
        )
    return OnnxModules(onnx.load(path))


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

        from van_deploy.graph.fold import Rewrites, fold_van

        try:
            names = bundle.manifest.checks["fold"]["rewrites"]
            rewrites = Rewrites(**{f: f in names for f in Rewrites.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise BundleError(
                f"The bundle '{bundle.path}' does not say how its network was rewritten.",
                "Export the model again.",
            ) from error
        self.fold = fold_van(loaded.model, torch.from_numpy(images[:PROOF_IMAGES]), rewrites)
        # Folded in float64 and stored in float32: these are the weights the artifacts hold.
        self.network: nn.Module = copy.deepcopy(self.fold.model).double().eval()
        self._found: dict[str, Array] = {}
        self.modules = [name for name, _ in self.network.named_modules() if name]
        for name in self.modules:
            self.network.get_submodule(name).register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._found[name] = output.numpy()

    def outputs(self, images: Images) -> Mapping[str, Array]:
        """Return every module's result for ``images (N, C, S, S)``, float64, by path."""
        import torch

        self._found = {}
        with torch.inference_mode():
            self.network(torch.from_numpy(images).double())
        return self._found


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
