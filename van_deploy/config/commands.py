"""Options of the commands that check, time, run, serve and package a bundle."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from van_deploy.config.fields import Table, option
from van_deploy.config.recipe_tables import LEAVE_OUT, ClassOrder, EvaluateSettings
from van_deploy.config.sizes import ImageSizeOption
from van_deploy.errors import UsageError

MEASUREMENT, EXECUTION = "Measurement", "Execution"
QUEUE, CUDA = "Queue", "ONNX Runtime on a GPU"

TimedBatch = Annotated[int, pydantic.Field(ge=1, le=4096)]

MIN_ROUNDS = 6
"""With fewer rounds the median has no 95 % interval (2 x 0.5^5 is more than 5 %)."""


class RunnerSettings(Table):
    """The runtime that runs the artifacts of a bundle.

    Attributes:
        runner: Runtime of ONNX artifacts; TensorRT runs engines, PyTorch runs packages.
        device: GPU (cuda:N), for runtimes that use one.
        trust_engine: Run an engine without its sidecar. An engine is code: only one you built
            yourself.
    """

    PANEL = EXECUTION

    runner: Literal["ort-cpu", "ort-cuda"] = option("ort-cpu")
    device: str = option("cuda:0", pattern=r"^cuda(:\d+)?$")
    trust_engine: bool = option(False)


class _Weights(Table):
    """The original weights of a bundle.

    Attributes:
        weights: Path of the original weights, if they have moved.
    """

    PANEL = EXECUTION

    weights: Path | None = option(None)


class _Check(_Weights, RunnerSettings):
    """Options of every check.

    Attributes:
        recipe: Recipe with the [gates] to apply; the default limits without one.
    """

    recipe: str = option("")


class _Allowances(Table):
    """Results that pass although a check could not run or decide.

    Attributes:
        allow_skip: Pass what was skipped: engines (their GPU is not available), runtimes (not
            installed), accuracy or speed (in the baseline, not measured now).
        allow_inconclusive: Pass what the data cannot decide.
    """

    allow_skip: tuple[Literal["engines", "runtimes", "accuracy", "speed"], ...] = option(())
    allow_inconclusive: bool = option(False)


class _Cluster(Table):
    """Where the work is done.

    Attributes:
        on: This machine, or a Ray cluster.
        ray_address: Address of the Ray cluster; by default the local one.
    """

    on: Literal["here", "ray"] = option("here")
    ray_address: str = option("")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield the address of a cluster that is not used, besides the base's conflicts."""
        yield from super().conflicts()
        if self.ray_address and self.on != "ray":
            yield "{ray_address} needs {on} ray.", "Add {on} ray, or remove {ray_address}."


class _Artifacts(Table):
    """The artifacts to check.

    Attributes:
        artifacts: Artifacts to check; all by default.
    """

    artifacts: tuple[str, ...] = option((), flags=["--artifact"])


class _Samples(Table):
    """The reference and the images of a comparison.

    Attributes:
        against: Reference: the golden samples in the bundle, or the original network (PyTorch and
            the weights).
        images: Folder or .npz of images to compare on, with --against weights.
        count: Number of these images; 16 by default.
    """

    PANEL = MEASUREMENT

    against: Literal["golden", "weights"] = option("golden")
    images: Path | None = option(None)
    count: int | None = option(None, ge=1)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield images without the original network: only golden samples have saved outputs."""
        name = self.first_set("images", "count")
        if name and self.against != "weights":
            message = f"{name} needs the original network: the bundle has golden samples only."
            yield message, "Add {against} weights."


class VerifySettings(_Check, _Artifacts, _Samples, _Allowances):
    """The options of ``van-deploy verify``.

    Attributes:
        modules: Also check each module by itself.
    """

    PANEL = MEASUREMENT

    modules: bool = option(True)


class EvaluationSettings(_Cluster, EvaluateSettings, _Check, _Artifacts, _Allowances):
    """The options of ``van-deploy evaluate``.

    Attributes:
        images: Labelled images: one folder per class, ImageNet's own layout, or an .npz.
        batch: Images per batch.
        workers: Threads that decode images; 0 for one per core.
    """

    PANEL = EXECUTION

    images: Path = option(..., panel="")
    batch: int = option(32, ge=1)
    workers: int = option(0, ge=0)


class DriftSettings(_Weights, _Artifacts):
    """The options of ``van-deploy drift``.

    Attributes:
        against: Reference: the original network (PyTorch and the weights), or model.onnx if it
            passes its gate on the golden samples.
        level: Parts of the network to compare.
        images: Folder or .npz of images to compare on, with --against weights.
        count: Number of images.
    """

    PANEL = MEASUREMENT

    against: Literal["weights", "golden"] = option("weights")
    level: Literal["stage", "block", "module"] = option("block", panel="")
    images: Path | None = option(None)
    count: int = option(4, ge=1)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield images without the original network."""
        if self.images is not None and self.against != "weights":
            yield "{images} needs {against} weights.", LEAVE_OUT


class CheckSettings(_Check, _Samples, _Allowances):
    """The options of ``van-deploy check``.

    Attributes:
        evaluate: Folder of labelled images to evaluate on.
        labels: Labels file for the labelled images.
        class_order: How training numbered the class folders, if nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        speed: Also compare speed ratios.
    """

    PANEL = MEASUREMENT

    evaluate: Path | None = option(None)
    labels: Path | None = option(None)
    class_order: ClassOrder | None = option(None)
    speed: bool = option(False)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield labels and their order without images, besides the base's conflicts."""
        yield from super().conflicts()
        name = self.first_set("labels", "class_order")
        if name and self.evaluate is None:
            yield f"{name} needs {{evaluate}}.", "Give the folder of images, too."


class ExportRunSettings(Table):
    """How to export.

    Attributes:
        images: Folder of images to check on; sample photographs by default.
        offline: Never use the network.
        force: Rebuild everything even if nothing changed.
    """

    images: Path | None = option(None)
    offline: bool = option(False)
    force: bool = option(False)


class RunSettings(ExportRunSettings, RunnerSettings, _Allowances):
    """How to run a recipe."""


class FleetSettings(_Cluster):
    """Many engines at once: options of ``van-deploy build``.

    Attributes:
        matrix: Build bundles x precisions x targets of this TOML file.
    """

    PANEL = "Many engines"

    matrix: Path | None = option(None)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield a Ray cluster without a matrix, besides the base's conflicts."""
        yield from super().conflicts()
        if self.matrix is None and self.on != "here":
            yield "{on} needs {matrix}.", "Write a fleet file, and give it with {matrix}."


class Budget(Table):
    """How long to time one model at one batch size.

    Timing ends after ``seconds`` and ``calls`` once the ratio's interval is within
    ``tolerance_percent``; or after ``limit_s`` (no less than ``seconds``), and the row then
    reports that the result did not settle.

    Attributes:
        seconds: Minimum timed seconds per runner and batch.
        calls: Minimum calls.
        limit_s: Maximum seconds, settled or not; one slice in each of six rounds may take longer.
        rounds: Rounds that the seconds are spread over.
        tolerance_percent: Continue until a ratio's 95 % interval is within this many percent.
        warmup_s: Unmeasured seconds before the first round.
    """

    PANEL = "Duration"

    seconds: float = option(3.0, gt=0)
    calls: int = option(100, ge=1)
    limit_s: float = option(10.0, key="limit", gt=0)
    rounds: int = option(30, ge=1)
    tolerance_percent: float = option(2.0, key="tolerance", gt=0)
    warmup_s: float = option(1.0, key="warmup", ge=0)

    def slice_s(self, reference_call_s: float = 0.0) -> float:
        """Return the seconds of one slice: at least one call of the reference.

        All slices of a round have the same length, so that interference affects all alike.

        >>> Budget(seconds=3, rounds=30).slice_s(), Budget(seconds=3, rounds=30).slice_s(0.5)
        (0.1, 0.5)
        """
        return max(self.seconds / self.rounds, reference_call_s)

    def is_exhausted(self, timed_s: float, rounds: int) -> bool:
        """Return whether the maximum time is used up."""
        limit = max(self.limit_s, self.seconds)
        return timed_s >= limit and rounds >= min(MIN_ROUNDS, self.rounds)

    def is_complete(self, timed_s: float, calls: int, rounds: int) -> bool:
        """Return whether the minimum time, calls and rounds are reached."""
        is_enough = timed_s >= self.seconds and calls >= self.calls
        return is_enough and rounds >= min(MIN_ROUNDS, self.rounds)


class BenchSettings(Table):
    """The options of ``van-deploy bench``.

    Attributes:
        device: cuda:N, or cpu; by default cuda:0, or cpu without a GPU.
        batches: Batch sizes. Unless given, a static graph's own, and with --p99-ms 1,2,4 to 64.
        runners: Only these, such as 'pytorch,ort-cpu,openvino/int8-cpu'; * matches any text. All
            available runners by default.
        reference: Runner that ratios compare with; the first that runs if it does not. On a GPU,
            pytorch is the fastest of PyTorch's modes.
        threads: Threads of each runner; all cores by default.
        streams: Calls in flight at the same time.
        image_sizes: Input sizes besides the bundle's own, such as 192,224x320.
        p99_ms: Find each runner's best batch with p99 below this (in ms).
        roofline: Measure the device's limits and compare.
        profile: Add the time by layer type.
        tf32: Let FP32 compute in TF32.
        conv_search: How cuDNN chooses convolution algorithms.
        fuse_conv_bias: Fuse convolution, bias and activation.
        budget: How long to measure.
    """

    PANEL = "Benchmark"

    device: str | None = option(None, pattern=r"^(cpu|cuda:\d+)$")
    batches: tuple[TimedBatch, ...] = option((1, 8), min_length=1)
    runners: tuple[str, ...] = option(())
    reference: str = option("pytorch")
    threads: int | None = option(None, ge=1)
    streams: int = option(1, ge=1)
    image_sizes: tuple[ImageSizeOption, ...] = option((), flags=["--image-size"])
    p99_ms: float | None = option(None, gt=0)
    roofline: bool = option(True)
    profile: bool = option(False)
    tf32: bool = option(True, panel=CUDA)
    conv_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] = option("EXHAUSTIVE", panel=CUDA)
    fuse_conv_bias: bool = option(False, panel=CUDA)
    budget: Budget = option(Budget, panel="")


class _Threads(RunnerSettings):
    """A runtime and its threads.

    Attributes:
        threads: CPU threads; by default the runtime's own choice.
    """

    PANEL = ""

    threads: int | None = option(None, ge=1)


class PredictSettings(_Threads):
    """The options of ``van-deploy predict``.

    Attributes:
        artifact: Artifact to run: fp32, int8, fp32-uint8, pytorch, ...
        top_k: Classes per image.
        batch: Images per batch; by default the bundle's optimum.
    """

    artifact: str = option("fp32")
    top_k: int = option(5, ge=1)
    batch: int | None = option(None, ge=1)


class _RequestLimits(Table):
    """Limits of the server.

    Attributes:
        queue_limit: Maximum images of one model in the server, over all protocols; more get 429.
            By default 256, or two batches per instance.
        max_body_mib: Largest request.
        max_json_mib: Largest JSON: numbers as text take thirty times their size to parse.
        max_held_mib: Maximum memory for request bodies; more get 503.
        read_timeout_s: Maximum time to receive a request.
        max_pixels: Largest image.
        max_connections: Maximum connections; more get 503.
    """

    PANEL = "Limits"

    queue_limit: int | None = option(None, ge=1)
    max_body_mib: float = option(32.0, ge=0.001)
    max_json_mib: float = option(1.0, ge=0.001)
    max_held_mib: float = option(256.0, ge=1)
    read_timeout_s: float = option(30.0, ge=0.1)
    max_pixels: int = option(50_000_000, ge=1)
    max_connections: int = option(512, ge=1)


class ServiceSettings(_RequestLimits, _Threads):
    """How to serve a bundle.

    Attributes:
        artifacts: Artifacts to serve; the page uses the first. By default fp32-uint8 if the bundle
            has it, else fp32.
        instances: Batches that run at the same time, per model.
        max_delay_ms: How long a single request waits for others to batch with.
        compare: Let the page compare with PyTorch.
        log_requests: Log every request, not only errors.
        api_key_file: File with the key that clients must send as 'Authorization: Bearer KEY'; by
            default VAN_DEPLOY_API_KEY in the environment, else no key.
    """

    PANEL = ""

    artifacts: tuple[str, ...] = option((), flags=["--artifact"])
    instances: int = option(1, ge=1)
    max_delay_ms: float = option(1.0, ge=0)
    compare: bool = option(True)
    log_requests: bool = option(False)
    api_key_file: Path | None = option(None)

    def api_key(self) -> str:
        """Return the key that clients must send; "" for no key.

        Raises:
            UsageError: the key cannot be read, or is not valid in a header.
        """
        file, name = self.api_key_file, "VAN_DEPLOY_API_KEY"
        try:
            key = os.environ.get(name) if file is None else file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"The key in '{file}' cannot be read: {error}.",
                "Check the path and the permissions.",
            ) from None
        if key is not None and not re.fullmatch("[!-~]{1,4096}", key):
            raise UsageError(
                f"'{file or name}' is not a key: one word of printable ASCII characters.",
                "Create one with `openssl rand -hex 32`.",
            )
        return key or ""


class ServeSettings(ServiceSettings):
    """The options of ``van-deploy serve``.

    Attributes:
        host: Address to listen on.
        port: Port; 0 for a free one.
    """

    host: str = option("127.0.0.1", min_length=1)
    port: int = option(8000, ge=0, le=65535)


class TritonSettings(Table):
    """How Triton runs the models: options of ``van-deploy package triton``.

    Attributes:
        backend: Triton backend of ONNX artifacts; python brings its own ONNX Runtime.
        instances: Batches that run at the same time, per model.
        threads: CPU threads within one operator; 0 for the runtime's choice.
        gpu: Run ONNX models on a GPU; plans always run on one.
        model_version: Version number of the models.
        triton_release: Release of the container image, such as 25.08; by default the newest that
            is known to load the models.
        triton_python: Python of the Python backend, such as 3.12; by default the release's.
        queue_delay_us: Maximum wait for other requests to batch with.
        queue_limit: Maximum waiting requests.
        queue_timeout_ms: Maximum time in the queue; 0 for no limit.
    """

    backend: Literal["onnxruntime", "python"] = option("onnxruntime")
    instances: int = option(1, ge=1)
    threads: int = option(2, ge=0)
    gpu: bool = option(False)
    model_version: int = option(1, ge=1)
    triton_release: str = option("", pattern=r"^([0-9]{2}\.(0[1-9]|1[0-2]))?$")
    triton_python: str = option("", pattern=r"^(3\.[0-9]+)?$")
    queue_delay_us: int = option(1000, panel=QUEUE, ge=0)
    queue_limit: int = option(256, panel=QUEUE, ge=1)
    queue_timeout_ms: int = option(0, panel=QUEUE, ge=0)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield a GPU for a backend that runs on CPUs."""
        if self.gpu and self.backend == "python":
            message = "{backend} python brings ONNX Runtime for CPUs, and {gpu} is given."
            yield message, LEAVE_OUT


class PackageSettings(TritonSettings):
    """The options of ``van-deploy package``.

    Attributes:
        artifacts: Artifacts to package; by default fp32-uint8 if the bundle has it, else fp32.
    """

    artifacts: tuple[str, ...] = option((), flags=["--artifact"])
