"""The options of commands: how a bundle is judged, timed, asked, served and packaged."""

from __future__ import annotations

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

WHAT, HOW = "What is measured", "How it is done"
QUEUE, CUDA = "Queue", "ONNX Runtime on a GPU"

MIN_ROUNDS = 6
"""Fewer rounds have no 95 % interval of their median (2 x 0.5^5 is more than 5 %)."""


class RunnerSettings(Table):
    """What runs the artifacts of a bundle.

    Attributes:
        runner: What runs ONNX artifacts; engines are run by TensorRT, packages by PyTorch.
        device: Which GPU (cuda:N), where something runs on one.
        trust_engine: Run an engine whose sidecar is gone. An engine is code: only one you built
            yourself.
    """

    PANEL = HOW

    runner: Literal["ort-cpu", "ort-cuda"] = option("ort-cpu")
    device: str = option("cuda:0", pattern=r"^cuda(:\d+)?$")
    trust_engine: bool = option(False)


class _Original(Table):
    """The network that a bundle was made from.

    Attributes:
        weights: Where the original weights are now, if they have moved.
    """

    PANEL = HOW

    weights: Path | None = option(None)


class _Judged(_Original, RunnerSettings):
    """What a judgement needs besides the artifacts.

    Attributes:
        recipe: Recipe whose [gates] apply; the defaults without one.
    """

    recipe: str = option("")


class _Allowed(Table):
    """What is let pass although it was not shown.

    Attributes:
        allow_skip: Let a kind of skip pass: engines (their GPU is not here), runtimes (not
            installed), accuracy or speed (in the baseline, not measured now).
        allow_inconclusive: Let pass what the data cannot decide.
    """

    allow_skip: tuple[Literal["engines", "runtimes", "accuracy", "speed"], ...] = option(())
    allow_inconclusive: bool = option(False)


class _Artifacts(Table):
    """Which artifacts.

    Attributes:
        artifacts: Which to judge; all by default.
    """

    artifacts: tuple[str, ...] = option((), flags=["--artifact"])


class _Samples(Table):
    """What the artifacts are compared on and with.

    Attributes:
        against: What to compare with: the golden samples in the bundle, or the original network
            (PyTorch and the weights).
        images: Folder or .npz of images to compare on, with --against weights.
        count: How many of these images; 16 by default.
    """

    PANEL = WHAT

    against: Literal["golden", "weights"] = option("golden")
    images: Path | None = option(None)
    count: int | None = option(None, ge=1)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield images that the golden samples have no answers for."""
        given = self.first_set("images", "count")
        if given and self.against != "weights":
            message = (
                f"{given} is given, and other images than the golden samples can only be "
                "compared with the original network."
            )
            yield message, "Add {against} weights."


class VerifySettings(_Judged, _Artifacts, _Samples, _Allowed):
    """The options of ``van-deploy verify``.

    Attributes:
        modules: Also judge each module by itself.
    """

    PANEL = WHAT

    modules: bool = option(True)


class EvaluationSettings(EvaluateSettings, _Judged, _Artifacts, _Allowed):
    """The options of ``van-deploy evaluate``.

    Attributes:
        images: Labelled images: one folder a class, ImageNet's own layout, or an .npz.
        batch: Images a batch.
        workers: Threads that decode; 0 for one a core.
        on: This machine, or a Ray cluster.
        ray_address: Of the Ray cluster; by default the local one.
    """

    PANEL = HOW

    images: Path = option(..., panel="")
    batch: int = option(32, ge=1)
    workers: int = option(0, ge=0)
    on: Literal["here", "ray"] = option("here")
    ray_address: str = option("")


class DriftSettings(_Original, _Artifacts):
    """The options of ``van-deploy drift``.

    Attributes:
        against: What to compare parts with: the original network (PyTorch and the weights), or
            model.onnx once that holds on the golden samples.
        level: How finely the network is cut.
        images: Folder or .npz of images to compare on, with --against weights.
        count: How many images.
    """

    PANEL = WHAT

    against: Literal["weights", "golden"] = option("weights")
    level: Literal["stage", "block", "module"] = option("block", panel="")
    images: Path | None = option(None)
    count: int = option(4, ge=1)


class CheckSettings(_Judged, _Samples, _Allowed):
    """The options of ``van-deploy check``.

    Attributes:
        evaluate: Folder of labelled images to evaluate on.
        labels: Labels file for the labelled images.
        class_order: How training numbered the class folders, where nothing names the classes:
            strings (torchvision), natural (timm), index (of a number), names.
        speed: Also compare speed, as ratios only.
    """

    PANEL = WHAT

    evaluate: Path | None = option(None)
    labels: Path | None = option(None)
    class_order: ClassOrder | None = option(None)
    speed: bool = option(False)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield labels of images that are not there, too."""
        yield from super().conflicts()
        if self.labels is not None and self.evaluate is None:
            yield "{labels} is given, and {evaluate} is not.", "Name the folder of images, too."


class RunSettings(RunnerSettings, _Allowed):
    """How a run is done; *what* is done stands in the recipe.

    Attributes:
        images: Folder of images to check on; sample photographs by default.
        offline: Never use the network.
        force: Make everything anew even if nothing changed.
    """

    PANEL = ""

    images: Path | None = option(None)
    offline: bool = option(False)
    force: bool = option(False)


class FleetSettings(Table):
    """Many engines at once: options of ``van-deploy build``.

    Attributes:
        matrix: Build bundles x precisions x targets of this TOML file.
        on: Where the matrix is built.
        ray_address: Of the Ray cluster; by default the local one.
    """

    PANEL = "Many engines"

    matrix: Path | None = option(None)
    on: Literal["here", "ray"] = option("here")
    ray_address: str = option("")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield a place to build where there is nothing to share out."""
        if self.matrix is None and self.on != "here":
            yield "{on} is for {matrix}.", "Write a fleet file, and give it with {matrix}."


class Budget(Table):
    """How long to time one contender at one batch size.

    A contender is done when it has been timed for ``seconds`` and ``calls`` and its
    ratio's interval is within ``tolerance_percent``; or when it has been timed for
    ``limit_s`` (no less than ``seconds``), and its row then says that it did not settle.

    Attributes:
        seconds: Timed at least, a runner and batch.
        calls: Calls at least.
        limit_s: Seconds at most, settled or not; one slice in each of six rounds may take longer.
        rounds: Rounds the seconds are spread over.
        tolerance_percent: Go on until a ratio's 95 % interval is within this many percent.
        warmup_s: Unmeasured seconds before the first round.
    """

    PANEL = "How long"

    seconds: float = option(3.0, gt=0)
    calls: int = option(100, ge=1)
    limit_s: float = option(10.0, key="limit", gt=0)
    rounds: int = option(30, ge=1)
    tolerance_percent: float = option(2.0, key="tolerance", gt=0)
    warmup_s: float = option(1.0, key="warmup", ge=0)

    def slice_s(self, reference_call_s: float = 0.0) -> float:
        """Return the seconds of one slice: all of a round are as long as the reference's one call.

        Slices of unequal length would meet unequal shares of what disturbs the machine.

        >>> Budget(seconds=3, rounds=30).slice_s(), Budget(seconds=3, rounds=30).slice_s(0.5)
        (0.1, 0.5)
        """
        return max(self.seconds / self.rounds, reference_call_s)

    def is_exhausted(self, timed_s: float, rounds: int) -> bool:
        """Return whether a contender may not be timed any longer."""
        limit = max(self.limit_s, self.seconds)
        return timed_s >= limit and rounds >= min(MIN_ROUNDS, self.rounds)

    def is_complete(self, timed_s: float, calls: int, rounds: int) -> bool:
        """Return whether a contender was timed for as long as it has to be."""
        is_enough = timed_s >= self.seconds and calls >= self.calls
        return is_enough and rounds >= min(MIN_ROUNDS, self.rounds)


class BenchSettings(Table):
    """What to measure: the options of ``van-deploy bench``.

    Attributes:
        device: Where: cuda:N, or cpu; by default cuda:0, without a GPU cpu.
        batches: Batch sizes.
        runners: Only these, such as 'pytorch,ort-cpu,openvino/int8-cpu'; * is any text. All that
            are here by default.
        reference: What ratios are against; if it does not run, the first that does. On a GPU,
            pytorch is the fastest of PyTorch's modes.
        threads: Threads of each runner; all cores by default.
        streams: Calls in flight at the same time.
        image_sizes: Other sizes of the input than the bundle's own, such as 192,224x320.
        p99_ms: Find each runner's best batch with p99 below this.
        roofline: Measure the device's limits and compare.
        profile: Add the time by kind of layer.
        tf32: Let FP32 compute in TF32.
        conv_search: How cuDNN's algorithms are chosen.
        fuse_conv_bias: Fuse convolution, bias and activation.
        budget: How long.
    """

    PANEL = "What to run"

    device: str | None = option(None, pattern=r"^(cpu|cuda:\d+)$")
    batches: tuple[Annotated[int, pydantic.Field(ge=1, le=4096)], ...] = option(
        (1, 8), min_length=1
    )
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
    """A runner and its threads.

    Attributes:
        threads: Processor threads; by default the runtime's own choice.
    """

    PANEL = ""

    threads: int | None = option(None, ge=1)


class PredictSettings(_Threads):
    """The options of ``van-deploy predict``.

    Attributes:
        artifact: Which one: fp32, int8, fp32-uint8, pytorch, ...
        top_k: Classes an image.
        batch: Images a batch; by default the bundle's optimum.
    """

    artifact: str = option("fp32")
    top_k: int = option(5, ge=1)
    batch: int | None = option(None, ge=1)


class _RequestLimits(Table):
    """What the server refuses.

    Attributes:
        queue_limit: Images of a model in the server, by whatever route; more get 429. By default
            256, or two batches an instance.
        max_body_mib: Largest request.
        max_json_mib: Largest JSON: numbers as text take thirty times their size to parse.
        max_held_mib: All requests held at once; more get 503.
        read_timeout_s: Longest a request may take to come.
        max_pixels: Largest image.
        max_connections: More get 503.
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
    """How a bundle is served.

    Attributes:
        artifacts: Which to serve; the first answers the page. By default fp32-uint8 where the
            bundle has it, else fp32.
        instances: Batches at the same time, a model.
        max_delay_ms: How long a lone request waits for others.
        compare: Let the page ask PyTorch too.
        log_requests: Log every request, not only faults.
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
        """Return what clients must send; "" for no key.

        Raises:
            UsageError: the key cannot be read, or is none that a header can hold.
        """
        file, name = self.api_key_file, "VAN_DEPLOY_API_KEY"
        try:
            key = os.environ.get(name) if file is None else file.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"The key in '{file}' cannot be read: {error}.", "Check it.") from None
        if key is not None and not re.fullmatch("[!-~]{1,4096}", key):
            raise UsageError(
                f"'{file or name}' holds no key: one word of printable ASCII characters.",
                "Make one: `openssl rand -hex 32`.",
            )
        return key or ""


class ServeSettings(ServiceSettings):
    """The options of ``van-deploy serve``.

    Attributes:
        host: Address to listen on.
        port: Port; 0 takes a free one.
    """

    host: str = option("127.0.0.1")
    port: int = option(8000, ge=0, le=65535)


class TritonSettings(Table):
    """How Triton is to run the models: options of ``van-deploy package triton``.

    Attributes:
        backend: What runs ONNX artifacts; python brings an ONNX Runtime of its own.
        instances: Batches at the same time, a model.
        threads: Inside one operator on a processor; 0 leaves it to the runtime.
        gpu: Run ONNX models on a GPU; plans always are.
        model_version: Number of the models' version.
        triton_release: Of the container image, such as 25.08; by default the newest that is known
            to load the models.
        triton_python: Python of the Python backend, such as 3.12; by default the release's.
        queue_delay_us: Longest wait for other requests.
        queue_limit: Requests waiting, at most.
        queue_timeout_ms: Refuse what waited longer; 0 for never.
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
        """Yield a GPU for a runtime that has none."""
        if self.gpu and self.backend == "python":
            message = "{backend} python brings ONNX Runtime for processors, and {gpu} is given."
            yield message, LEAVE_OUT


class PackageSettings(TritonSettings):
    """The options of ``van-deploy package``.

    Attributes:
        artifacts: Which to package; by default fp32-uint8 where the bundle has it, else fp32.
    """

    artifacts: tuple[str, ...] = option((), flags=["--artifact"])
