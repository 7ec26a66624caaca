"""One interface for inference with any artifact of a bundle.

A plain graph takes normalised floats, a graph with embedded preprocessing takes bytes; some
return logits, others the top-k classes; ONNX Runtime runs graphs, TensorRT runs engines.
:class:`Network` hides the differences: pixels in, outputs by name, and the most probable classes.
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
from van_deploy.engine.sidecar import PackageSidecar, Sidecar, load_sidecar
from van_deploy.errors import BundleError, ConversionError, InputError, UsageError, require_extra
from van_deploy.files import file_sha256
from van_deploy.graph.bfloat16 import BF16_EMULATED
from van_deploy.graph.embed import TOP_CLASSES, TOP_PROBABILITIES
from van_deploy.graph.names import INPUT_NAME, OUTPUT_NAME
from van_deploy.metrics import Task, probabilities, top_classes
from van_deploy.model.preprocess import Pixels, Preprocessing, normalise
from van_deploy.runners.base import Images, Outputs, Runner, gpu_index
from van_deploy.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner, require_onnxruntime

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

PYTORCH = "pytorch"  # selects the original network instead of an artifact
ORT_CPU = "ort-cpu"


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and shape of an input or output.

    Attributes:
        name: name of the tensor.
        dtype: NumPy's name of its type.
        shape: shape without the batch axis, which is always first and dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SkipReason:
    """Reason why an artifact cannot run on this machine.

    Attributes:
        kind: ``engines`` where the GPU of an engine is missing, otherwise ``runtimes``.
        reason: one phrase.
    """

    kind: str
    reason: str


@dataclass(frozen=True)
class NamedClass:
    """One predicted class.

    Attributes:
        index: column of the logits.
        name: class name of the weights; the index as text where they have no class names.
        probability: 0 to 1.
    """

    index: int
    name: str
    probability: float


def task_of(bundle: Bundle) -> Task:
    """Return the classification task of a bundle's network."""
    network = bundle.manifest.architecture
    return Task.of(network.num_classes, network.problem_type)


def require_classifier(bundle: Bundle, command: str) -> None:
    """Check that a bundle's network is a classifier.

    Args:
        bundle: the bundle.
        command: the command that needs classes.

    Raises:
        UsageError: the network returns feature maps.
    """
    network = bundle.manifest.architecture
    if network.out_indices:
        raise UsageError(
            f"The bundle '{bundle.path}' returns feature maps ({', '.join(network.output_names)}), "
            f"and `{command}` needs classes.",
            "Run the ONNX file yourself (docs/backbones.md), or export without --features.",
        )


class Network:
    """Inference with one artifact or the original network. Open it with ``with``.

    Args:
        bundle: the bundle; every digest is checked on opening.
        artifact: name of an artifact, or :data:`PYTORCH`.
        settings: runner of an ONNX artifact (the others have only one), GPU, and whether an
            engine without a sidecar is accepted (its digest is checked nevertheless).
        threads: intra-op threads; None lets the runtime choose.
        spin: see :class:`~van_deploy.runners.onnxruntime.OnnxRuntimeRunner`.

    Attributes:
        input: input of :meth:`run`.
        outputs: outputs of :meth:`run`.
        max_batch: largest batch size.
        profiles: batch sizes of a compiled network or a static graph; empty for a dynamic batch.
        runner: name of the runner, for reports.
        task: the classification task.
        embedding: preprocessing inside the graph: ``none``, ``normalize`` or ``uint8``.
        loaded_runner: the runner of an open network; None before.

    Raises:
        BundleError: the bundle has no such artifact.
    """

    loaded_runner: Any = None

    def __init__(
        self,
        bundle: Bundle,
        artifact: str = "fp32",
        settings: RunnerSettings | None = None,
        *,
        threads: int | None = None,
        spin: bool = True,
    ) -> None:
        self.bundle, self.name = bundle, artifact
        self._settings = settings or RunnerSettings()
        self.preprocessing, self.task = bundle.manifest.preprocessing, task_of(bundle)
        self._threads, self._spin = threads, spin
        entry = None if artifact == PYTORCH else bundle.artifact(artifact)
        self._build_inputs: Mapping[str, Any] = entry.made_with if entry else {}
        self.is_engine = entry is not None and entry.kind == "engine"
        self.is_package = entry is not None and entry.kind == "package"
        self.runner = self._settings.runner if entry else PYTORCH
        self.profiles: Sequence[BatchRange] = ()
        if entry and entry.engine:
            self.runner, self.profiles = entry.engine.backend.split()[0], entry.engine.profiles
        elif entry and bundle.manifest.batch.fixed and not self.is_package:
            self.profiles = (bundle.manifest.batch,)
        self.max_batch = max((p.max for p in self.profiles), default=bundle.manifest.batch.max)
        if entry and self.is_engine:
            entry = bundle.artifacts.get(entry.made_from.name, entry)
        self.embedding = entry.embedded if entry else "none"
        self.input, self.outputs = self._specs(entry)

    def _specs(self, entry: Artifact | None) -> tuple[TensorSpec, tuple[TensorSpec, ...]]:
        """Return input and outputs of a graph, or of the original network without an entry."""
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
        image = TensorSpec(INPUT_NAME, "float32", (self.preprocessing.channels, *sides))
        return image, tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())

    def __enter__(self) -> Network:
        """Load the artifact.

        Raises:
            BundleError: a file is missing or was changed.
            MissingDependency: its runtime is not installed or not usable.
            ConversionError: the runtime rejects it.
        """
        self.loaded_runner = self._create_runner().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the runner."""
        self.loaded_runner.__exit__(*error)

    def _create_runner(self) -> Runner:
        """Return the runner of the artifact, not yet open."""
        trust, device = self._settings.trust_engine, self._settings.device
        if self.name == PYTORCH:
            model = original_network(self.bundle).model
            from van_deploy.runners.pytorch import TorchRunner

            return TorchRunner(model, threads=self._threads)
        path = self.bundle.verified_path(self.name, only_file=self.is_engine and trust)
        if self.is_engine:
            from van_deploy.runners.tensorrt import TensorRtRunner

            return TensorRtRunner(path, trust_engine=trust, backend=self.runner, device=device)
        if self.is_package:
            with require_extra("An Inductor package", ""):
                from van_deploy.runners.pytorch import InductorRunner
            return InductorRunner(path, device=device, threads=self._threads)
        return OnnxRuntimeRunner(
            path, name=self.runner, device=device, threads=self._threads, spin=self._spin
        )

    def skip_reason(self) -> SkipReason | None:
        """Return why the artifact cannot run on this machine; None if it can.

        Raises:
            InputError: an engine's sidecar is missing, damaged or edited.
        """
        if self.runner in (PYTORCH, ORT_CPU):
            return None
        device = self._settings.device
        host = detect_host(device=gpu_index(device) or 0)
        if self.is_engine or self.is_package:
            return self._native_skip_reason(host)
        provider, settings = PROVIDERS[self.runner], self._build_inputs.get("settings")
        reason = ""
        if provider not in require_onnxruntime().get_available_providers():
            reason = f"no {provider} in the installed ONNX Runtime"
        elif host.gpu is None:
            reason = f"{provider} finds no GPU {device}"
        elif isinstance(settings, Mapping) and settings.get("target") == "cpu":
            reason = f"quantised for CPUs: {provider} lacks some of its operators"
        return SkipReason("runtimes", reason) if reason else None

    def _native_skip_reason(self, host: Host) -> SkipReason | None:
        path = self.bundle.path / self.bundle.artifact(self.name).file
        if self.is_engine and host.gpu is None:
            return SkipReason("engines", "engine not executed: no GPU")
        trust = self._settings.trust_engine
        sidecar: PackageSidecar | Sidecar | None = (
            PackageSidecar.load(path) if self.is_package else load_sidecar(path, trust_engine=trust)
        )
        problems = find_obstacles(sidecar, host) if sidecar else ()
        if not problems:
            return None
        kind = "engines" if all(problem.about == "gpu" for problem in problems) else "runtimes"
        name = "package" if self.is_package else "engine"
        text = "; ".join(problem.problem for problem in problems)
        return SkipReason(kind, f"{name} not executed: {text}")

    @property
    def runner_description(self) -> str:
        """Name of the runner and whether it emulates BF16, for reports."""
        emulated = getattr(self.loaded_runner, "emulates_bf16", False)
        return f"{self.runner}, {BF16_EMULATED}" if emulated else self.runner

    def input_shape(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one input row, with ``sides`` for a dynamic height and width."""
        dynamic = iter(sides)
        return tuple(next(dynamic) if length < 0 else length for length in self.input.shape)

    @property
    def on_gpu(self) -> bool:
        """Whether the artifact runs on a GPU."""
        if self.is_package:
            return str(self._build_inputs.get("target", "")).startswith("sm_")
        return self.is_engine or self.runner not in (PYTORCH, ORT_CPU)

    @property
    def tf32(self) -> bool:
        """Whether FP32 layers of an open network may compute in TF32."""
        return bool(self._build_option("tf32", True)) and getattr(
            self.loaded_runner, "tf32", self.is_engine
        )

    def _build_option(self, name: str, default: Any) -> Any:
        """Return a build option of an engine."""
        options = self._build_inputs.get("options") if self.is_engine else None
        return options.get(name, default) if isinstance(options, Mapping) else default

    def prepare(self, pixels: Pixels | Images) -> npt.NDArray[Any]:
        """Return resized images ``(N, S, S, C)`` uint8 in the input format of this artifact."""
        return network_input(pixels, self.embedding, self.preprocessing)

    def run(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name for a batch in the format of :attr:`input`.

        Batches larger than an engine supports are split; smaller ones are padded by repeating
        the last image.
        """
        if self.name == PYTORCH:
            names = [output.name for output in self.outputs]
            return dict(zip(names, self.loaded_runner.run_all(batch).values(), strict=True))
        if not self.profiles:
            outputs: Outputs = self.loaded_runner.run_all(batch)
            return outputs
        starts = range(0, len(batch), self.max_batch)
        pieces = [self._run_padded(batch[i : i + self.max_batch]) for i in starts]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _run_padded(self, batch: npt.NDArray[Any]) -> Outputs:
        rows = next(n for n in range(len(batch), self.max_batch + 1) if self.supports_batch(n))
        padded = np.concatenate([batch, np.repeat(batch[-1:], rows - len(batch), axis=0)])
        return {
            name: value[: len(batch)] for name, value in self.loaded_runner.run_all(padded).items()
        }

    def supports_batch(self, batch: int) -> bool:
        """Return whether a batch of that many images runs without splitting or padding."""
        return not self.profiles or any(p.min <= batch <= p.max for p in self.profiles)

    def supports_size(self, sides: Sequence[int]) -> bool:
        """Return whether images of that height and width run without resizing."""
        sizes, (height, width) = self.bundle.manifest.sizes, sides
        if self.is_engine:
            dynamic = self._build_option("dynamic_size", None)
            sizes = SizeRange(**dynamic) if dynamic else None
        native = self.preprocessing.sides == (height, width)
        return native if sizes is None else sizes.contains((height, width))

    def logits(self, pixels: Pixels | Images) -> npt.NDArray[np.float32]:
        """Return the logits ``(N, K)`` of resized images ``(N, S, S, C)`` uint8.

        Raises:
            UsageError: the artifact has no logits output.
        """
        outputs = self.run(self.prepare(pixels))
        if OUTPUT_NAME not in outputs:
            raise UsageError(
                f"'{self.name}' returns {', '.join(outputs)} and no logits.",
                "Use an artifact with a logits output.",
            )
        return outputs[OUTPUT_NAME].astype(np.float32)

    def top_classes(self, outputs: Outputs, count: int) -> list[tuple[NamedClass, ...]]:
        """Return the most probable classes of each row, in descending order.

        Raises:
            ConversionError: an output is NaN or infinite, so there is no most probable class.
            UsageError: the artifact returns only five classes and more are requested.
        """
        source = next(n for n in (OUTPUT_NAME, "probabilities", TOP_PROBABILITIES) if n in outputs)
        scores = outputs[source].astype(np.float32)
        if bad := int((~np.isfinite(scores)).any(axis=1).sum()):
            raise ConversionError(
                f"'{self.name}' computed NaN or infinite values for {bad} of {len(scores)} images.",
                "Check it with `van-deploy verify`, and use an artifact of another precision.",
            )
        if source != TOP_PROBABILITIES:
            classes = top_classes(scores, count)
            shares = probabilities(scores, self.task) if source == OUTPUT_NAME else scores
            ranked = np.take_along_axis(shares, classes, axis=1).astype(np.float32)
        elif count <= scores.shape[1]:
            classes, ranked = outputs[TOP_CLASSES][:, :count], scores[:, :count]
        else:
            raise UsageError(
                f"'{self.name}' returns only {scores.shape[1]} classes, not {count}.",
                f"Request {scores.shape[1]}, or use another artifact.",
            )
        manifest = self.bundle.manifest
        names = manifest.class_names or range(manifest.architecture.num_classes)
        return [
            tuple(NamedClass(i, str(names[i]), share) for i, share in zip(*row, strict=True))
            for row in zip(classes.tolist(), ranked.tolist(), strict=True)
        ]


def original_network(bundle: Bundle, weights: str | Path | None = None) -> LoadedVan:
    """Load the unfolded PyTorch network of a bundle and check the digest of its weights.

    Only tensors are read from the weights file: architecture, preprocessing and class names come
    from the manifest, not from files next to the weights. Nothing is downloaded: weights from a
    hub must still be in its cache.

    Args:
        bundle: the bundle.
        weights: current path of its weights file; None takes the path in the manifest.

    Raises:
        MissingDependency: PyTorch or timm is not installed.
        BundleError: the weights were moved, were changed, or belong to another bundle.
    """
    with require_extra("The original network", ""):
        from van_deploy.model.checkpoint import LoadedVan, network_from_state, read_weights
        from van_deploy.model.embedded import EMBEDDED_WEIGHTS
        from van_deploy.model.van import random_van, sha256_of_state
    manifest = bundle.manifest
    recorded, config = manifest.weights, manifest.architecture
    path = Path(weights or recorded.path or recorded.spec).expanduser()
    is_random = weights is None and recorded.format == "random"
    try:
        if is_random:
            model = random_van(config, recorded.seed or 0)
            digest = sha256_of_state(model.state_dict())
        else:
            if weights is None and recorded.format == "embedded":
                path = EMBEDDED_WEIGHTS
            elif path.is_dir():
                path /= Path(recorded.path).name
            file = read_weights(path, recorded.container)
            digest = file_sha256(path)
            if digest == recorded.sha256:
                model = network_from_state(file.tensors, config)
    except (InputError, UsageError) as error:
        raise BundleError(
            f"The weights of the bundle '{bundle.path}' cannot be read from '{path}': "
            f"{error.message}",
            "Give their path with --weights PATH.",
        ) from error
    if digest != recorded.sha256:
        source_text = f"The random network of seed {recorded.seed}" if is_random else f"'{path}'"
        raise BundleError(
            f"{source_text} does not match the bundle '{bundle.path}': its SHA-256 is "
            f"{digest[:12]}..., the manifest has {recorded.sha256[:12]}....",
            "Export again with this PyTorch, or give the original weights with --weights PATH.",
        )
    source = replace(recorded, path="" if is_random else str(path))
    return LoadedVan(
        bundle.name, model, config, source, manifest.preprocessing, manifest.class_names
    )


def network_input(
    pixels: Pixels | Images, embedding: str, preprocessing: Preprocessing
) -> npt.NDArray[Any]:
    """Return images in the input format of a graph.

    Args:
        pixels: resized images ``(N, S, S, C)`` uint8, or normalised ``(N, C, S, S)`` float32.
        embedding: preprocessing inside the graph: ``none``, ``normalize`` or ``uint8``.
        preprocessing: preprocessing of the network.

    Raises:
        UsageError: the images are already normalised, and the graph normalises too.
    """
    if pixels.dtype == np.float32 and embedding == "none":
        return pixels
    if pixels.dtype == np.float32:
        text = f"The images are already normalised, and the graph (embedded: {embedding}) does so."
        raise UsageError(text, "Give uint8 images.")
    if embedding == "uint8":
        return np.ascontiguousarray(pixels)
    if embedding == "normalize":
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        return values / np.float32(255)
    return normalise(pixels.astype(np.uint8, copy=False), preprocessing)
