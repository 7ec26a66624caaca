"""An artefact of a bundle as something that answers pictures, whatever it takes and gives.

A plain graph takes normalised floats, an embedded one bytes; one gives logits,
another the first classes; ONNX Runtime runs a graph, TensorRT an engine.
:class:`Network` is one face for all of them: pixels in, outputs by name, and the
most probable classes from whatever outputs there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artefact, Bundle
from van_deploy.config import BatchRange
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.compatibility import obstacles
from van_deploy.engine.host import host_here
from van_deploy.engine.sidecar import sidecar_path, verified_package, verified_sidecar
from van_deploy.errors import MissingDependency, UsageError
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.metrics import Task
from van_deploy.model.pixels import Pixels
from van_deploy.runners.answers import TopClasses, network_input, top_classes
from van_deploy.runners.base import Images, gpu_index
from van_deploy.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner, require_onnxruntime

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

__all__ = [
    "ORT_CPU",
    "PYTORCH",
    "RUNNERS",
    "Network",
    "Obstacle",
    "Outputs",
    "TensorSpec",
    "original_of",
    "require_classes",
    "runnable_artefacts",
    "task_of",
]

PYTORCH = "pytorch"
"""The name under which the original network can be asked for, beside the artefacts."""

ORT_CPU = "ort-cpu"
RUNNERS = tuple(PROVIDERS)
"""What can run an ONNX artefact. An engine is always run by TensorRT."""

Outputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: of the tensor.
        dtype: NumPy's name of its type.
        shape: without the batch, which is always first and free.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Obstacle:
    """What keeps an artefact from running on this machine.

    Attributes:
        kind: ``engines`` where an engine's GPU is not here, else ``runtimes``.
        reason: one phrase.
    """

    kind: str
    reason: str


def task_of(bundle: Bundle) -> Task:
    """Return how the logits of a bundle's network become labels."""
    network = bundle.manifest.architecture
    return Task.of(network.num_classes, network.problem_type)


def original_of(bundle: Bundle, weights: Path | None = None) -> LoadedVan:
    """Return the network a bundle was made from.

    Args:
        bundle: the bundle.
        weights: where its weights are now; None takes the place the manifest names.

    Raises:
        MissingDependency: PyTorch or timm is not installed.
        BundleError: the weights have moved, have changed, or are not this bundle's.
    """
    try:
        from van_deploy.runners.original import original_network
    except ImportError as error:
        raise MissingDependency(
            f"The original network needs PyTorch and timm: {error}.",
            "Install them with `pip install van-deploy`, or compare with the golden samples "
            "(--against golden), which needs neither.",
        ) from error
    return original_network(bundle, weights)


def require_classes(bundle: Bundle, command: str) -> None:
    """Return if a bundle's network gives classes.

    Args:
        bundle: the bundle.
        command: what needs them.

    Raises:
        UsageError: it gives feature maps.
    """
    names = bundle.manifest.architecture.output_names
    if bundle.manifest.architecture.out_indices:
        raise UsageError(
            f"The bundle '{bundle.path}' gives feature maps ({', '.join(names)}), and "
            f"`{command}` is of classes.",
            "Run the ONNX file in a pipeline of your own (docs/backbones.md), or export the "
            "classifier without --features.",
        )


def runnable_artefacts(bundle: Bundle) -> list[str]:
    """Return the names of the artefacts that ONNX Runtime can run, in the bundle's order."""
    return [n for n, item in bundle.artefacts.items() if item.kind not in ("engine", "package")]


class Network:
    """One artefact, or the original network, ready to answer. Open it with ``with``.

    Args:
        bundle: where it is; every digest is checked on opening.
        artefact: its name in the bundle, or :data:`PYTORCH`.
        runner: one of :data:`RUNNERS`, for an ONNX artefact; the others have one runner only.
        threads: threads inside one operator; None lets the run time choose.
        spin: see :class:`~van_deploy.runners.onnxruntime.OnnxRuntimeRunner`.
        trust_engine: run an engine whose sidecar is gone; its digest is checked all the same.
        device: which GPU, where something runs on one.

    Attributes:
        input: what :meth:`run` takes.
        outputs: what :meth:`run` gives.
        max_batch: pictures a batch, at most.
        emulated: whether BF16 is emulated; known once it is open.
        runner: what runs it, for reports.
        task: how its logits become labels.

    Raises:
        BundleError: there is no such artefact.
        InputError: nothing here runs an artefact of that kind.
        UsageError: there is no such runner.
    """

    def __init__(
        self,
        bundle: Bundle,
        artefact: str = "fp32",
        *,
        runner: str = ORT_CPU,
        threads: int | None = None,
        spin: bool = True,
        trust_engine: bool = False,
        device: str = "cuda:0",
    ) -> None:
        if runner not in RUNNERS:
            raise UsageError(f"There is no runner '{runner}'.", f"Known: {', '.join(RUNNERS)}.")
        self.bundle = bundle
        self.name = artefact
        self.threads = threads
        self.preprocessing = bundle.manifest.preprocessing
        self.max_batch = bundle.manifest.batch.max
        self.task = task_of(bundle)
        self._spin, self._trust_engine, self._device = spin, trust_engine, device
        self.is_engine = self.is_package = self.emulated = False
        self._profiles: list[BatchRange] = []
        self._opened: Any = None
        if artefact == PYTORCH:
            self.runner, self.embedding = PYTORCH, "none"
            self.input, self.outputs = self._plain_specs()
            return
        described = bundle.artefact(artefact)
        self.is_engine = described.kind == "engine"
        self.is_package = described.kind == "package"
        self.runner = "tensorrt" if self.is_engine else runner
        if described.engine is not None:
            self.runner = described.engine.backend.split()[0]
            self._profiles = list(described.engine.profiles)
            self.max_batch = max((p.max for p in self._profiles), default=self.max_batch)
        if self.is_engine:
            described = bundle.artefacts.get(described.made_from.name, described)
        elif bundle.manifest.batch.fixed and not self.is_package:
            self._profiles = [bundle.manifest.batch]
        self.embedding = described.embedded
        self.input, self.outputs = self._specs(described)

    def _plain_specs(self) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        sides, channels = self.preprocessing.sides, self.preprocessing.channels
        config = self.bundle.manifest.architecture
        given = TensorSpec(INPUT_NAME, "float32", (channels, *sides))
        if not config.out_indices:
            return given, (TensorSpec(OUTPUT_NAME, "float32", (config.num_classes,)),)
        shapes = config.map_shapes(sides)
        return given, tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())

    def _specs(self, artefact: Artefact) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        if artefact.graph is None:
            return self._plain_specs()
        inputs, outputs = (
            tuple(TensorSpec(name, v.dtype, v.row_shape) for name, v in item.items())
            for item in (artefact.graph.inputs, artefact.graph.outputs)
        )
        return inputs[0], outputs

    def __enter__(self) -> Network:
        """Load the artefact.

        Raises:
            BundleError: a file is missing or was changed.
            MissingDependency: its run time is not here.
            ConversionError: the run time refuses it.
        """
        if self.name == PYTORCH:
            loaded = original_of(self.bundle)
            from van_deploy.runners.pytorch import TorchRunner

            self._opened = TorchRunner(loaded.model)
            return self
        self._opened = self._runner().__enter__()
        self.emulated = getattr(self._opened, "emulated", False)
        return self

    def _runner(self) -> Any:
        """Return what runs the artefact, not yet open."""
        if self.is_engine:
            from van_deploy.runners.tensorrt import TensorRtRunner

            plan = self.bundle.verified(self.name, only_file=self._trust_engine)
            return TensorRtRunner(
                plan,
                trust_engine=self._trust_engine,
                backend=self.runner,
                device=self._device,
            )
        path = self.bundle.verified(self.name)
        if self.is_package:
            try:
                from van_deploy.runners.inductor import InductorRunner
            except ImportError as error:
                raise MissingDependency(
                    f"An Inductor package needs PyTorch: {error}.", "Install van-deploy whole."
                ) from error
            return InductorRunner(path, device=self._device, threads=self.threads)
        return OnnxRuntimeRunner(
            path, threads=self.threads, spin=self._spin, name=self.runner, device=self._device
        )

    def obstacle(self) -> Obstacle | None:
        """Return what keeps the artefact from running on this machine; None is good.

        Raises:
            InputError: an engine's sidecar is missing, damaged or edited.
        """
        if self.is_engine or self.is_package:
            return self._native_obstacle()
        if self.runner in (PYTORCH, ORT_CPU):
            return None
        provider = PROVIDERS[self.runner]
        if provider not in require_onnxruntime().get_available_providers():
            return Obstacle("runtimes", f"no {provider} in the ONNX Runtime that is installed")
        if host_here(device=gpu_index(self._device) or 0).gpu is None:
            return Obstacle("runtimes", f"{provider} finds no GPU {self._device}")
        made = self.bundle.artefact(self.name).made_with.get("settings", {})
        if made.get("target") == "cpu":
            return Obstacle("runtimes", f"quantised for CPUs: {provider} has not all its operators")
        return None

    def _native_obstacle(self) -> Obstacle | None:
        host, file = host_here(device=gpu_index(self._device) or 0), self.bundle.artefact(self.name)
        path = self.bundle.path / file.file
        if self.is_package:
            found = obstacles(verified_package(path), host)
        elif host.gpu is None:
            return Obstacle("engines", "engine not executed: no GPU")
        elif self._trust_engine and not sidecar_path(path).exists():
            return None
        else:
            found = obstacles(verified_sidecar(path), host)
        if not found:
            return None
        kind = "engines" if all(each.about == "gpu" for each in found) else "runtimes"
        what = "package" if self.is_package else "engine"
        return Obstacle(kind, f"{what} not executed: " + "; ".join(o.problem for o in found))

    @property
    def opened(self) -> Any:
        """The runner of a network that is open; see :class:`~.base.ResidentRunner`."""
        return self._opened

    @property
    def described(self) -> str:
        """What runs it, for reports."""
        return f"{self.runner}, {BF16_EMULATED}" if self.emulated else self.runner

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU runs it."""
        if self.is_package:
            made_with = self.bundle.artefact(self.name).made_with
            return str(made_with.get("target", "")).startswith("sm_")
        return self.is_engine or self.runner not in (PYTORCH, ORT_CPU)

    @property
    def tf32(self) -> bool:
        """Whether FP32 layers may compute in TF32; of a network that is open."""
        made = self.bundle.artefact(self.name).made_with if self.name != PYTORCH else {}
        if self.is_package:
            return bool(made.get("tf32")) and self._opened.device.type == "cuda"
        if self.is_engine:
            options = made.get("options")
            return bool(options.get("tf32", True)) if isinstance(options, Mapping) else True
        return isinstance(self._opened, OnnxRuntimeRunner) and self._opened.tf32

    def __exit__(self, *_: object) -> None:
        """Release it."""
        if self._opened is not None:
            self._opened.__exit__(*_)
        self._opened = None

    def prepare(self, pixels: Pixels | Images) -> npt.NDArray[Any]:
        """Return resized pictures ``(N, S, S, C)`` uint8 as this artefact takes them."""
        return network_input(pixels, self.embedding, self.preprocessing)

    def run(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name for ``batch``, which is what :attr:`input` says.

        An engine gets more pictures than it serves in several batches, and fewer with
        the last one repeated.
        """
        if self.name == PYTORCH:
            names = [output.name for output in self.outputs]
            return dict(zip(names, self._opened.run_all(batch).values(), strict=True))
        if not self._profiles:
            outputs: Outputs = self._opened.run_all(batch)
            return outputs
        starts = range(0, len(batch), self.max_batch)
        pieces = [self._run_filled(batch[i : i + self.max_batch]) for i in starts]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _run_filled(self, batch: npt.NDArray[Any]) -> Outputs:
        rows = next(n for n in range(len(batch), self.max_batch + 1) if self.serves(n))
        filled = np.concatenate([batch, np.repeat(batch[-1:], rows - len(batch), axis=0)])
        return {name: value[: len(batch)] for name, value in self._opened.run_all(filled).items()}

    def serves(self, batch: int) -> bool:
        """Return whether a batch of that many pictures is run as it is."""
        if self._profiles:
            return any(p.min <= batch <= p.max for p in self._profiles)
        return batch >= 1

    def serves_size(self, sides: Sequence[int]) -> bool:
        """Return whether images of that height and width are run as they are."""
        sizes = self.bundle.manifest.sizes
        if self.is_engine:
            options = self.bundle.artefact(self.name).made_with.get("options")
            own = options.get("dynamic_size") if isinstance(options, Mapping) else None
            sizes = SizeRange(**own) if own else None
        height, width = sides
        native = self.preprocessing.sides == (height, width)
        return native if sizes is None else sizes.holds((height, width))

    def logits(self, pixels: Pixels | Images) -> npt.NDArray[np.float32]:
        """Return the logits ``(N, K)`` of resized pictures ``(N, S, S, C)`` uint8.

        Raises:
            UsageError: the artefact gives none.
        """
        outputs = self.run(self.prepare(pixels))
        if OUTPUT_NAME not in outputs:
            raise UsageError(
                f"'{self.name}' gives {', '.join(outputs)} and no logits.",
                "Take an artefact with logits.",
            )
        return outputs[OUTPUT_NAME].astype(np.float32)

    def top(self, outputs: Mapping[str, npt.NDArray[Any]], count: int) -> TopClasses:
        """Return the ``count`` most probable classes of each row, or as many as there are.

        Raises:
            UsageError: the artefact gives only its first five and more are asked for.
        """
        return top_classes(outputs, count, self.task, self.name)
