"""The report of a benchmark: results, and everything needed to repeat it.

Times are in milliseconds unless stated otherwise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize
from van_deploy.documents import Verdict
from van_deploy.environment.hardware import Cpu, Gpu
from van_deploy.errors import InputError, UsageError
from van_deploy.intervals import median_interval
from van_deploy.model.variants import WeightsSource
from van_deploy.schema import VersionedSchema, read_document

BENCH_FILE = "bench.json"
# Maximum change of a ratio between two runs of the same files.
REPEATABILITY_PERCENT = 5.0
# A ratio of times; the limits refuse damaged files, whose changes would not be numbers.
PositiveRatio = Annotated[float, Field(ge=1e-9, le=1e9)]


@dataclass(frozen=True)
class Contender:
    """One network in one runtime, with everything another process needs to open it.

    Attributes:
        name: name in reports, such as ``ort-cpu/fp32``.
        runtime: ``pytorch``, ``onnxruntime``, ``openvino``, ``tensorrt`` or ``inductor``.
        precision: of the arithmetic: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        file: path of the ONNX file, plan or package; for PyTorch of the bundle.
        mode: PyTorch's mode (``eager``, ``channels-last``, ``compile``, ``autocast``), the name of
            ONNX Runtime's runner, or :data:`~.contenders.CUDA_GRAPH`; "" otherwise.
        embedded: preprocessing in the graph: ``none``, ``normalize`` or ``uint8``.
        sha256: digest of ``file``, or of the weights.
        min_batch: smallest supported batch.
        max_batch: largest supported batch, or None if it is not limited.
        device: ``cpu`` or ``cuda:N``.
        options: fields of :class:`~van_deploy.runners.base.CudaOptions`.
    """

    name: str
    runtime: str
    precision: str
    file: str = ""
    mode: str = ""
    embedded: str = "none"
    sha256: str = ""
    min_batch: int = 1
    max_batch: int | None = None
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Latency:
    """Statistics of the latencies of many calls.

    Attributes:
        calls: number of calls.
        p50_ms: median.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        mean_ms: arithmetic mean.
        min_ms: fastest call.
        cv_percent: standard deviation over mean.
    """

    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    cv_percent: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Return the statistics of one or more calls; a percentile is one of the latencies."""
        p90, p99 = np.quantile(milliseconds, [0.90, 0.99], method="inverted_cdf").tolist()
        mean = statistics.fmean(milliseconds)
        ends = (p90, p99, mean, min(milliseconds))
        spread = 100 * statistics.pstdev(milliseconds) / mean if mean else 0.0
        return cls(len(milliseconds), statistics.median(milliseconds), *ends, spread)


@dataclass(frozen=True)
class Ratio:
    """Speed relative to the reference, paired by round; 2 is twice as fast.

    Attributes:
        median: over the rounds.
        low: lower end of the median's 95 % interval; the minimum of fewer than six rounds.
        high: upper end of the interval.
        rounds: number of rounds; 1 on a GPU, without an interval.
    """

    median: PositiveRatio
    low: PositiveRatio
    high: PositiveRatio
    rounds: int

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Ratio | None:
        """Return the median of the rounds' ratios and its interval, or None without a round.

        >>> Ratio.of([2.0, 3.0, 2.0])
        Ratio(median=2.0, low=2.0, high=3.0, rounds=3)
        """
        if not rounds:
            return None
        return cls(statistics.median(rounds), *median_interval(rounds), len(rounds))

    @property
    def uncertainty_percent(self) -> float:
        """Largest distance of an end of the interval from the median, in percent of the median."""
        return 100 * max(self.high / self.median - 1, 1 - self.low / self.median)


@dataclass(frozen=True)
class GpuState:
    """State of a GPU from NVML; values that NVML does not report are None.

    Attributes:
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        power_w: power draw of the board in watts.
        temperature_c: temperature of the GPU in degrees Celsius.
        throttled: reasons for reduced clocks; empty without throttling.
        memory_used_bytes: memory in use on the whole GPU, by all processes.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] = ()
    memory_used_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one batch size. On a GPU all times are measured with CUDA events.

    Attributes:
        contender: name of the contender.
        batch: images per call.
        image_size: of the input in pixels: a side, or height and width.
        load_s: seconds to import its runtime and open the file, once for each stream.
        latency: of all calls; on a GPU of single launches. None after a failure.
        images_per_s: over all streams; on a GPU of queued launches. None after a failure.
        ratio: speed relative to the reference at this batch, over the quiet rounds, or over all
            rounds if too few were quiet; None if either failed.
        settled: whether the ratio's interval is within the budget's tolerance; None without a
            ratio, on a GPU, and for the reference.
        rounds: number of rounds.
        quiet_rounds: number of rounds without a disturbance by other processes.
        first_call_ms: time of the first call at this batch.
        peak_rss_bytes: peak resident memory of the process at this batch.
        queued_ms: on a GPU, time per launch of queued launches.
        upload_ms: on a GPU, time to copy the images from pinned memory.
        download_ms: on a GPU, time to copy the outputs to pinned memory.
        gpu: state of the GPU during the measurement.
        throttled: why the GPU was throttled, or that its clock was not steady.
        error: reason of a failure; "" otherwise.
    """

    contender: str
    batch: int
    image_size: ImageSize
    load_s: float | None = None
    latency: Latency | None = None
    images_per_s: float | None = None
    ratio: Ratio | None = None
    settled: bool | None = None
    rounds: int = 0
    quiet_rounds: int = 0
    first_call_ms: float | None = None
    peak_rss_bytes: int | None = None
    queued_ms: float | None = None
    upload_ms: float | None = None
    download_ms: float | None = None
    gpu: GpuState | None = None
    throttled: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Machine:
    """The machine that ran a benchmark.

    Attributes:
        cpu: the CPU.
        gpus: the NVIDIA GPUs.
        driver: version of the NVIDIA driver, or None.
        other_load_cores: cores used by other processes during the benchmark.
        under_load: whether that was more than 10 % of the cores.
    """

    cpu: Cpu
    gpus: tuple[Gpu, ...]
    driver: str | None
    other_load_cores: float
    under_load: bool


@dataclass(frozen=True)
class Ceilings:
    """The limits of a device for a roofline model.

    Attributes:
        ops_per_s: operations per second (a multiply-add counts as two) of large matrix products,
            by precision, as far as measured. ``vector`` is the rate of other operations on a GPU
            (on a CPU it is that of float32).
        bytes_per_s: memory traffic per second of a large copy, reads and writes counted.
        source: ``measured``, or the source of published figures.
    """

    ops_per_s: dict[str, float]
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class RooflineEntry:
    """Minimum time of a network on a device, and the share of it that a row reaches.

    Attributes:
        contender: name of the contender; with published limits, of the artifact.
        precision: of the arithmetic.
        batch: images per call.
        image_size: of the input in pixels.
        operations: of one batch; a multiply-add counts as two.
        least_ms: lower bound of the time: the longer of all operations at the device's rates, and
            one transfer of weights, input and output, with all other values in caches.
        bound: which of the two is longer.
        unfused_ms: time of the memory traffic with one kernel per operator.
        percent_of_limit: ``least_ms`` in percent of the measured time; None without measurement.
    """

    contender: str
    precision: str
    batch: int
    image_size: ImageSize
    operations: int
    least_ms: float
    bound: Literal["compute", "memory"]
    unfused_ms: float
    percent_of_limit: float | None = None


@dataclass(frozen=True)
class PaperLimits:
    """Minimum times of a bundle on a GPU from published figures; nothing was measured.

    Attributes:
        device: name of the GPU.
        ceilings: dense peak rates at boost clock, with their source.
        limits: one for each graph, precision and batch.
    """

    device: str
    ceilings: Ceilings
    limits: tuple[RooflineEntry, ...]


@dataclass(frozen=True)
class ProfileLine:
    """Time of one kind of layer.

    Attributes:
        kind: kind of module or kernel.
        ms: milliseconds per run.
        percent: of the sum of all kinds.
        calls: kernels or operators per run.
    """

    kind: str
    ms: float
    percent: float
    calls: float


@dataclass(frozen=True)
class RowChange:
    """Change of one row between two benchmarks.

    Attributes:
        contender: name of the contender.
        batch: images per call.
        image_size: of the input.
        before_ms: median latency in the old report.
        after_ms: median latency in the new report.
        ratio_change_percent: change of the ratio to the reference; None without a ratio.
        uncertainty_percent: uncertainty of that change from both 95 % intervals; None without.
        changed: whether the ratio changed by more than the uncertainty and by more than 5 %.
        same_file: whether both reports timed the same file.
    """

    contender: str
    batch: int
    image_size: ImageSize
    before_ms: float
    after_ms: float
    ratio_change_percent: float | None
    uncertainty_percent: float | None
    changed: bool
    same_file: bool


class BenchReport(VersionedSchema, Verdict):
    """Results of a benchmark, and everything needed to repeat it.

    Attributes:
        date: start in UTC (ISO 8601).
        model: name of the bundle.
        weights: source of its weights.
        settings: the settings, with device, threads and reference filled in.
        images: description of the inputs.
        machine: the machine that ran it.
        versions: of Python, van-deploy and the runtimes.
        environment: environment variables that affect the speed.
        contenders: by name.
        reference: reference of the ratios; None without one.
        rows: one for each contender, batch and image size.
        skipped: reasons why contenders were skipped, by name.
        ceilings: limits of the device; None if they were not measured.
        roofline: comparison of each row with the limits.
        profiles: time by kind of layer at the contender's largest batch (of the last image
            size), by contender, if requested.
        best_under_p99: by contender, and image size if there are several, the row with the highest
            throughput under the p99 limit; None if no batch is below the limit, or for all without
            a limit.
        seconds: of the whole benchmark (``wall``) and of the timed calls (``timed``).
        warnings: one sentence each.
        changes: differences from an older benchmark, if compared.
    """

    schema_: Literal["van-deploy/bench/5"] = Field(alias="schema")
    date: str
    model: str
    weights: WeightsSource
    settings: BenchSettings
    images: str
    machine: Machine
    versions: dict[str, str]
    environment: dict[str, str]
    contenders: dict[str, Contender]
    reference: str | None
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    ceilings: Ceilings | None
    roofline: tuple[RooflineEntry, ...]
    profiles: dict[str, tuple[ProfileLine, ...]]
    best_under_p99: dict[str, Row | None] | None
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    changes: tuple[RowChange, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every contender was timed without an error."""
        return bool(self.rows) and not any(row.error for row in self.rows)


def read_report(path: Path) -> BenchReport:
    """Read a benchmark report from a JSON file.

    Raises:
        InputError: the file cannot be read, is not a report, or has another version.
    """
    remedy = "Create one with `van-deploy bench BUNDLE --output FILE` of this version."
    return read_document(BenchReport, path, "benchmark", InputError, remedy)


def save_to_bundle(report: BenchReport, bundle: Bundle) -> None:
    """Save a report in a bundle as ``bench.json``, and its results in the manifest's ``checks``.

    Raises:
        BundleError: the bundle cannot be written.
    """
    rows = [
        {
            **{k: getattr(row, k) for k in ("contender", "batch", "image_size", "images_per_s")},
            "p50_ms": row.latency.p50_ms,
            "ratio": row.ratio.median if row.ratio else None,
        }
        for row in report.rows
        if row.latency
    ]
    with edit_bundle(bundle.path) as draft:
        draft.file(BENCH_FILE).write_text(report.text(), encoding="utf-8")
        draft.checks["bench"] = {
            "file": BENCH_FILE,
            "date": report.date,
            "machine": report.machine.cpu.name,
            "reference": report.reference,
            "rows": rows,
        }


def compare_reports(old: BenchReport, new: BenchReport) -> BenchReport:
    """Return ``new`` with the changes of each row since ``old``.

    Raises:
        UsageError: device, TensorRT's major version, threads, streams, reference or the options of
            ONNX Runtime on a GPU differ, or the reports have no row in common.
    """
    current = _comparison_key(new)
    for what, before in _comparison_key(old).items():
        if before != (after := current[what]):
            raise UsageError(
                f"The two benchmarks cannot be compared: {what} was {before}, now it is {after}.",
                "Run both on the same machine, with the same settings.",
            )
    rows = {(row.contender, row.batch, row.image_size): row for row in old.rows}
    changes = []
    for row in new.rows:
        key = (row.contender, row.batch, row.image_size)
        before = rows.get(key)
        if before and before.latency and row.latency:
            percent, uncertainty = _ratio_change(before.ratio, row.ratio)
            changed = abs(percent or 0.0) > max(REPEATABILITY_PERCENT, uncertainty or 0.0)
            file = old.contenders.get(row.contender)
            same = file is not None and file.sha256 == new.contenders[row.contender].sha256
            same = same and old.weights.container == new.weights.container
            times = (before.latency.p50_ms, row.latency.p50_ms)
            changes.append(RowChange(*key, *times, percent, uncertainty, changed, same))
    if not changes:
        raise UsageError(
            "The two benchmarks have no row in common.",
            "Time the same runners at the same batch sizes.",
        )
    return new.model_copy(update={"changes": tuple(changes)})


def _comparison_key(report: BenchReport) -> dict[str, object]:
    """Return the properties that two comparable benchmarks share, by name."""
    cpu, settings = report.machine.cpu, report.settings
    gpus = "".join(f", {gpu.name}" for gpu in report.machine.gpus)
    cuda = settings.tf32, settings.conv_search, settings.fuse_conv_bias
    return {
        "the device": f"{settings.device} of {cpu.name}, {cpu.cores_allowed} cores{gpus}",
        "TensorRT's major version": report.versions.get("tensorrt", "none").partition(".")[0],
        "the number of threads": settings.threads,
        "the number of streams": settings.streams,
        "the reference": report.reference,
        "TF32, convolution search and fusion": " ".join(map(str, cuda)),
    }


def _ratio_change(old: Ratio | None, new: Ratio | None) -> tuple[float | None, float | None]:
    """Return the change of a ratio and its uncertainty, both in percent.

    The uncertainty combines the interval ends that face each other, as independent errors; ratios
    on a GPU have no interval.
    """
    if old is None or new is None:
        return None, None
    change = math.log(new.median / old.median)
    if min(old.rounds, new.rounds) < 2:
        return 100 * math.expm1(change), None
    ends = (old.high, new.low) if change > 0 else (old.low, new.high)
    spans = (abs(math.log(end / r.median)) for end, r in zip(ends, (old, new), strict=True))
    return 100 * math.expm1(change), 100 * math.expm1(math.hypot(*spans))
