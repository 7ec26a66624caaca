"""An artifact of a bundle as something that answers images, whatever it takes and gives.

A plain graph takes normalised floats, an embedded one bytes; one gives logits,
another the top-k classes; ONNX Runtime runs a graph, TensorRT an engine.
:class:`Network` is one face for all of them: pixels in, outputs by name, and the
most probable classes from whatever outputs there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Artifact, Bundle
from van_deploy.config import BatchRange, RunnerSettings
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import Host, detect_host
from van_deploy.engine.compatibility import find_obstacles
from van_deploy.engine.sidecar import load_package_sidecar, load_sidecar, sidecar_path
from van_deploy.errors import BundleError, InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.metrics import Task, probabilities
from van_deploy.model.preprocess import Pixels, Preprocessing, normalise
from van_deploy.runners.base import Images, Runner, gpu_index
from van_deploy.runners.base import Outputs as Outputs
from van_deploy.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner, require_onnxruntime

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

PYTORCH = "pytorch"
"""The name under which the original network can be asked for, beside the artifacts."""

ORT_CPU = "ort-cpu"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: of the tensor.
        dtype: NumPy's name of its type.
        shape: without the batch, which is always first and dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SkipReason:
    """What keeps an artifact from running on this machine.

    Attributes:
        kind: ``engines`` where an engine's GPU is not here, else ``runtimes``.
        reason: one phrase.
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class NamedClass:
    """One class of an answer.

    Attributes:
        index: column of the logits.
        name: what the weights call it; the index as text if they do not say.
        probability: 0 to 1.
    """

    index: int
    name: str
    probability: float


def task_of(bundle: Bundle) -> Task:
    """Return how the logits of a bundle's network become labels."""
    network = bundle.manifest.architecture
    return Task.of(network.num_classes, network.problem_type)


def require_classifier(bundle: Bundle, command: str) -> None:
    """Return if a bundle's network gives classes.

    Args:
        bundle: the bundle.
        command: what needs them.

    Raises:
        UsageError: it gives feature maps.
    """
    names = bundle.manifest.architecture.output_names
    if bundle.manifest.architecture.out_indices:
        maps = f"gives feature maps ({', '.join(names)}), and `{command}` is of classes"
        raise UsageError(
            f"The bundle '{bundle.path}' {maps}.",
            "Run the ONNX file yourself (docs/backbones.md), or export without --features.",
        )


def runnable_artifacts(bundle: Bundle) -> list[str]:
    """Return the names of the artifacts that ONNX Runtime can run, in the bundle's order."""
    return [n for n, item in bundle.artifacts.items() if item.kind not in ("engine", "package")]


class Network:
    """One artifact, or the original network, ready to answer. Open it with ``with``.

    Args:
        bundle: where it is; every digest is checked on opening.
        artifact: its name in the bundle, or :data:`PYTORCH`.
        asked: what runs an ONNX artifact (the others have one runner only), on which GPU, and
            whether an engine is run whose sidecar is gone (its digest is checked all the same).
        threads: threads inside one operator; None lets the runtime choose.
        spin: see :class:`~van_deploy.runners.onnxruntime.OnnxRuntimeRunner`.

    Attributes:
        input: what :meth:`run` takes.
        outputs: what :meth:`run` gives.
        max_batch: images a batch, at most.
        runner: what runs it, for reports.
        task: how its logits become labels.
        loaded_runner: the runner of a network that is open; None before.

    Raises:
        BundleError: there is no such artifact.
    """

    loaded_runner: Any = None

    def __init__(
        self,
        bundle: Bundle,
        artifact: str = "fp32",
        asked: RunnerSettings | None = None,
        *,
        threads: int | None = None,
        spin: bool = True,
    ) -> None:
        self.bundle, self.name, self._asked = bundle, artifact, asked or RunnerSettings()
        self.preprocessing, self.task = bundle.manifest.preprocessing, task_of(bundle)
        self._threads, self._spin = threads, spin
        entry = None if artifact == PYTORCH else bundle.artifact(artifact)
        self._made: Mapping[str, Any] = entry.made_with if entry else {}
        self.is_engine = entry is not None and entry.kind == "engine"
        self.is_package = entry is not None and entry.kind == "package"
        self.runner = self._asked.runner if entry else PYTORCH
        self._profiles: Sequence[BatchRange] = ()
        if entry and entry.engine:
            self.runner, self._profiles = entry.engine.backend.split()[0], entry.engine.profiles
        elif entry and bundle.manifest.batch.fixed and not self.is_package:
            self._profiles = (bundle.manifest.batch,)
        self.max_batch = max((p.max for p in self._profiles), default=bundle.manifest.batch.max)
        if entry and self.is_engine:
            entry = bundle.artifacts.get(entry.made_from.name, entry)
        self.embedding = entry.embedded if entry else "none"
        self.input, self.outputs = self._specs(entry)

    def _specs(self, entry: Artifact | None) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        """Return the input and the outputs of a graph, or of the plain network without one."""
        if entry and entry.graph:
            inputs, outputs = (
                tuple(TensorSpec(name, v.dtype, v.sample_shape) for name, v in item.items())
                for item in (entry.graph.inputs, entry.graph.outputs)
            )
            return inputs[0], outputs
        sides, config = self.preprocessing.sides, self.bundle.manifest.architecture
        shapes: Mapping[str, tuple[int, ...]] = {OUTPUT_NAME: (config.num_classes,)}
        if config.out_indices:
            shapes = config.feature_map_shapes(sides)
        given = TensorSpec(INPUT_NAME, "float32", (self.preprocessing.channels, *sides))
        return given, tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())

    def __enter__(self) -> Network:
        """Load the artifact.

        Raises:
            BundleError: a file is missing or was changed.
            MissingDependency: its runtime is not here.
            ConversionError: the runtime refuses it.
        """
        self.loaded_runner = self._runner().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Release it."""
        self.loaded_runner.__exit__(*error)

    def _runner(self) -> Runner:
        """Return what runs the artifact, not yet open."""
        trust, device = self._asked.trust_engine, self._asked.device
        if self.name == PYTORCH:
            model = original_network(self.bundle).model
            from van_deploy.runners.pytorch import TorchRunner

            return TorchRunner(model)
        path = self.bundle.verified_path(self.name, only_file=self.is_engine and trust)
        if self.is_engine:
            from van_deploy.runners.tensorrt import TensorRtRunner

            return TensorRtRunner(path, trust_engine=trust, backend=self.runner, device=device)
        if self.is_package:
            try:
                from van_deploy.runners.pytorch import InductorRunner
            except ImportError as error:
                raise MissingDependency(
                    f"An Inductor package needs PyTorch: {error}.", "Install van-deploy whole."
                ) from error
            return InductorRunner(path, device=device, threads=self._threads)
        how: dict[str, Any] = {"threads": self._threads, "spin": self._spin}
        return OnnxRuntimeRunner(path, name=self.runner, device=device, **how)

    def skip_reason(self) -> SkipReason | None:
        """Return what keeps the artifact from running on this machine; None is good.

        Raises:
            InputError: an engine's sidecar is missing, damaged or edited.
        """
        if self.runner in (PYTORCH, ORT_CPU):
            return None
        device = self._asked.device
        host = detect_host(device=gpu_index(device) or 0)
        if self.is_engine or self.is_package:
            return self._native_skip_reason(host)
        provider, settings = PROVIDERS[self.runner], self._made.get("settings")
        reason = ""
        if provider not in require_onnxruntime().get_available_providers():
            reason = f"no {provider} in the ONNX Runtime that is installed"
        elif host.gpu is None:
            reason = f"{provider} finds no GPU {device}"
        elif isinstance(settings, Mapping) and settings.get("target") == "cpu":
            reason = f"quantised for CPUs: {provider} has not all its operators"
        return SkipReason("runtimes", reason) if reason else None

    def _native_skip_reason(self, host: Host) -> SkipReason | None:
        path = self.bundle.path / self.bundle.artifact(self.name).file
        if self.is_engine and host.gpu is None:
            return SkipReason("engines", "engine not executed: no GPU")
        if self.is_engine and self._asked.trust_engine and not sidecar_path(path).exists():
            return None
        found = find_obstacles(
            (load_package_sidecar if self.is_package else load_sidecar)(path), host
        )
        if not found:
            return None
        kind = "engines" if all(each.about == "gpu" for each in found) else "runtimes"
        what = "package" if self.is_package else "engine"
        return SkipReason(kind, f"{what} not executed: " + "; ".join(o.problem for o in found))

    @property
    def runner_description(self) -> str:
        """What runs it, for reports."""
        emulated = getattr(self.loaded_runner, "emulated", False)
        return f"{self.runner}, {BF16_EMULATED}" if emulated else self.runner

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU runs it."""
        if self.is_package:
            return str(self._made.get("target", "")).startswith("sm_")
        return self.is_engine or self.runner not in (PYTORCH, ORT_CPU)

    @property
    def tf32(self) -> bool:
        """Whether FP32 layers may compute in TF32; of a network that is open."""
        return bool(self._built("tf32", True)) and getattr(
            self.loaded_runner, "tf32", self.is_engine
        )

    def _built(self, name: str, default: Any) -> Any:
        """Return an option that an engine was built with."""
        options = self._made.get("options") if self.is_engine else None
        return options.get(name, default) if isinstance(options, Mapping) else default

    def prepare(self, pixels: Pixels | Images) -> npt.NDArray[Any]:
        """Return resized images ``(N, S, S, C)`` uint8 as this artifact takes them."""
        return network_input(pixels, self.embedding, self.preprocessing)

    def run(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name for ``batch``, which is what :attr:`input` says.

        An engine gets more images than it serves in several batches, and fewer with
        the last one repeated.
        """
        if self.name == PYTORCH:
            names = [output.name for output in self.outputs]
            return dict(zip(names, self.loaded_runner.run_all(batch).values(), strict=True))
        if not self._profiles:
            outputs: Outputs = self.loaded_runner.run_all(batch)
            return outputs
        starts = range(0, len(batch), self.max_batch)
        pieces = [self._run_filled(batch[i : i + self.max_batch]) for i in starts]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _run_filled(self, batch: npt.NDArray[Any]) -> Outputs:
        rows = next(n for n in range(len(batch), self.max_batch + 1) if self.supports_batch(n))
        filled = np.concatenate([batch, np.repeat(batch[-1:], rows - len(batch), axis=0)])
        return {
            name: value[: len(batch)] for name, value in self.loaded_runner.run_all(filled).items()
        }

    def supports_batch(self, batch: int) -> bool:
        """Return whether a batch of that many images is run as it is."""
        return not self._profiles or any(p.min <= batch <= p.max for p in self._profiles)

    def supports_size(self, sides: Sequence[int]) -> bool:
        """Return whether images of that height and width are run as they are."""
        sizes, (height, width) = self.bundle.manifest.sizes, sides
        if self.is_engine:
            own = self._built("dynamic_size", None)
            sizes = SizeRange(**own) if own else None
        native = self.preprocessing.sides == (height, width)
        return native if sizes is None else sizes.contains((height, width))

    def logits(self, pixels: Pixels | Images) -> npt.NDArray[np.float32]:
        """Return the logits ``(N, K)`` of resized images ``(N, S, S, C)`` uint8.

        Raises:
            UsageError: the artifact gives none.
        """
        outputs = self.run(self.prepare(pixels))
        if OUTPUT_NAME not in outputs:
            raise UsageError(
                f"'{self.name}' gives {', '.join(outputs)} and no logits.",
                "Take an artifact with logits.",
            )
        return outputs[OUTPUT_NAME].astype(np.float32)

    def top(self, outputs: Outputs, count: int) -> list[tuple[NamedClass, ...]]:
        """Return each row's most probable classes, the best first.

        Raises:
            UsageError: the artifact gives only its first five and more are asked for.
        """
        if OUTPUT_NAME in outputs or "probabilities" in outputs:
            logits = outputs.get(OUTPUT_NAME)
            scores = outputs["probabilities"] if logits is None else logits.astype(np.float32)
            shares = scores if logits is None else probabilities(scores, self.task)
            classes = np.argsort(-scores, axis=1, kind="stable")[:, :count]
            ranked = np.take_along_axis(shares, classes, axis=1).astype(np.float32)
        else:
            classes, ranked = outputs[TOP_CLASSES][:, :count], outputs[TOP_PROBABILITIES][:, :count]
            if count > classes.shape[1]:
                raise UsageError(
                    f"'{self.name}' gives its first {classes.shape[1]} classes only, not {count}.",
                    f"Ask for {classes.shape[1]}, or take another artifact.",
                )
        rows = zip(classes.tolist(), ranked.tolist(), strict=True)
        return [tuple(map(self._named, *row)) for row in rows]

    def _named(self, index: int, probability: float) -> NamedClass:
        names = self.bundle.manifest.class_names
        return NamedClass(index, names[index] if names else str(index), probability)


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
            "Install them with `pip install van-deploy`, or compare --against golden.",
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
            f"The weights of the bundle '{bundle.path}' cannot be read from '{place}': "
            f"{error.message}",
            "Say where they are with --weights PATH.",
        ) from error
    if digest != recorded.sha256:
        what = f"What seed {recorded.seed} draws here" if drawn else f"'{place}'"
        raise BundleError(
            f"{what} is not what the bundle '{bundle.path}' was made from: its SHA-256 is "
            f"{digest[:12]}..., the manifest says {recorded.sha256[:12]}....",
            "Export again with this PyTorch, or give the weights themselves with --weights PATH.",
        )
    source = replace(recorded, path="" if drawn else str(place))
    described = manifest.preprocessing, manifest.class_names
    return LoadedVan(bundle.name, model, config, source, *described)


def network_input(
    pixels: Pixels | Images, embedding: str, preprocessing: Preprocessing
) -> npt.NDArray[Any]:
    """Return images as a graph with ``embedding`` takes them.

    Args:
        pixels: resized images ``(N, S, S, C)`` uint8, or normalised ``(N, C, S, S)`` float32.
        embedding: the preprocessing inside the graph.
        preprocessing: of the network.

    Raises:
        UsageError: the graph normalises, and the images are normalised already.
    """
    if pixels.dtype == np.float32 and embedding == "none":
        return pixels
    if pixels.dtype == np.float32:
        text = f"The images are normalised already, and the graph (embedded: {embedding}) does so."
        raise UsageError(text, "Give uint8 images.")
    if embedding == "uint8":
        return np.ascontiguousarray(pixels)
    if embedding == "normalize":
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        return values / np.float32(255)
    return normalise(pixels.astype(np.uint8, copy=False), preprocessing)
