"""A benchmark's document: what was measured, and everything needed to measure it again.

Times are in milliseconds where nothing else is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.config import BenchSettings
from van_deploy.config.sizes import ImageSize
from van_deploy.environment.hardware import Cpu, Gpu
from van_deploy.errors import InputError, UsageError
from van_deploy.intervals import median_interval
from van_deploy.model.variants import WeightsSource
from van_deploy.schema import VersionedSchema, read_document

BENCH_FILE = "bench.json"
# Two runs of the same files agree on a ratio that changed by no more.
AGREE_WITHIN_PERCENT = 5.0


@dataclass(frozen=True)
class Contender:
    """One network in one runtime, described so that another process can open it.

    Attributes:
        name: what reports call it, such as ``ort-cpu/fp32``.
        runtime: ``pytorch``, ``onnxruntime``, ``openvino``, ``tensorrt`` or ``inductor``.
        precision: of the arithmetic: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        file: the ONNX file, plan or package to open; of PyTorch the bundle.
        mode: how PyTorch runs it (``eager``, ``channels-last``, ``compile``, ``autocast``), ONNX
            Runtime's runner, or :data:`~.contenders.CUDA_GRAPH`; "" otherwise.
        embedded: what preprocessing the graph has inside: ``none``, ``normalize`` or ``uint8``.
        sha256: digest of ``file``, or of the weights.
        min_batch: smallest batch it takes.
        max_batch: largest batch it takes, or None where it is dynamic.
        device: ``cpu`` or ``cuda:N``.
        options: of the runtime, as :class:`~van_deploy.runners.base.CudaOptions` has them.
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
    """What many calls took.

    Attributes:
        calls: how many.
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
        """Return the figures of one or more calls; a percentile is one of them, the next above."""
        p90, p99 = np.quantile(milliseconds, [0.90, 0.99], method="inverted_cdf").tolist()
        mean = statistics.fmean(milliseconds)
        ends = (p90, p99, mean, min(milliseconds))
        spread = 100 * statistics.pstdev(milliseconds) / mean if mean else 0.0
        return cls(len(milliseconds), statistics.median(milliseconds), *ends, spread)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference, paired by round.

    Attributes:
        median: over the rounds.
        low: lower end of the median's 95 % interval; of fewer than six rounds the least.
        high: upper end of it.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Ratio | None:
        """Return the median of each round's ratio, and its interval; None without a round.

        >>> Ratio.of([2.0, 3.0, 2.0])
        Ratio(median=2.0, low=2.0, high=3.0, rounds=3)
        """
        if not rounds:
            return None
        return cls(statistics.median(rounds), *median_interval(rounds), len(rounds))

    @property
    def uncertainty_percent(self) -> float:
        """How far the interval reaches from the median, in percent of it."""
        return 100 * max(self.high / self.median - 1, 1 - self.low / self.median)


@dataclass(frozen=True)
class GpuState:
    """What NVML says of a GPU at one time; None where it does not say.

    Attributes:
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        power_w: what the board draws, in watts.
        temperature_c: of the processor, in degrees Celsius.
        throttled: why the clocks are held down; empty where they are not.
        memory_used_bytes: taken on the whole GPU, by everybody.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttled: tuple[str, ...] = ()
    memory_used_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one batch size. On a GPU all times are the device's, by CUDA events.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: of the input in pixels: a side, or height and width.
        load_s: seconds to import its runtime and to open the file, once a stream.
        latency: of all calls; on a GPU of one launch alone. None where it failed.
        images_per_s: over all streams; on a GPU of launches queued ahead. None where it failed.
        ratio: times faster than the reference at this batch, over the quiet rounds, or over
            all where those were too few; None where one of the two failed.
        settled: whether the ratio's interval came within the budget's tolerance; None without
            a ratio, on a GPU, and for the reference's own, which is 1.
        rounds: in how many it was timed.
        quiet_rounds: in how many of them the machine was left alone.
        first_call_ms: the first call with this batch.
        peak_rss_bytes: largest resident memory of the process at this batch.
        queued_ms: on a GPU, a launch among queued ones.
        upload_ms: on a GPU, the images from pinned memory to it.
        download_ms: on a GPU, the outputs from it to pinned memory.
        gpu: its state while this ran.
        throttled: why the GPU was slowed down, or that its clock was not steady.
        error: why there are no figures; "" where there are.
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
    """What a timing depends on.

    Attributes:
        cpu: the processor.
        gpus: that answer.
        driver: NVIDIA's, or None.
        other_load_cores: cores that others kept busy meanwhile.
        under_load: whether that was more than a tenth of the cores.
    """

    cpu: Cpu
    gpus: tuple[Gpu, ...]
    driver: str | None
    other_load_cores: float
    under_load: bool


@dataclass(frozen=True)
class Ceilings:
    """A device's limits.

    Attributes:
        ops_per_s: operations a second (a multiply-add is two) of large matrix products, by
            precision; what was not measured is absent. ``vector`` is outside of products, where
            that is other silicon (of CPUs float32's figure is used).
        bytes_per_s: memory traffic a second of a large copy, reads and writes both counted.
        source: ``measured``, or where figures on paper come from.
    """

    ops_per_s: dict[str, float]
    bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Reached:
    """A network's least possible time, and how near a row of the benchmark came to it.

    Attributes:
        contender: which one; on paper the artifact.
        precision: of the arithmetic.
        batch: images a call.
        image_size: of the input in pixels.
        operations: of one batch; a multiply-add is two.
        least_ms: no runtime can be faster: all operations at the device's rates, or the weights,
            the input and the output once through memory, with everything between in caches.
        bound: which of the two takes longer.
        unfused_ms: what one kernel a step moves through memory.
        percent_of_limit: 100 is the least possible time; None on paper.
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
    """What a bundle could do at best on a GPU that is not at hand; nothing here was measured.

    Attributes:
        device: the GPU.
        ceilings: dense peaks at boost clock, and where they come from.
        limits: one a graph, precision and batch.
    """

    device: str
    ceilings: Ceilings
    limits: tuple[Reached, ...]


@dataclass(frozen=True)
class ProfileLine:
    """One part of a network's time.

    Attributes:
        kind: what kind of module or kernel.
        ms: of one run.
        percent: of all kinds.
        calls: kernels or operators in one run.
    """

    kind: str
    ms: float
    percent: float
    calls: float


@dataclass(frozen=True)
class Change:
    """One row in two benchmarks.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: of the input.
        before_ms: median latency in the old file.
        after_ms: median latency in the new one.
        ratio_change_percent: of times faster than the reference, from the one to the other: what
            two runs should agree on; None without one.
        uncertainty_percent: how much of that the two 95 % intervals leave open.
        moved: whether the ratio changed by more than that and by more than 5 %.
        same_file: whether both timed the same bytes.
    """

    contender: str
    batch: int
    image_size: ImageSize
    before_ms: float
    after_ms: float
    ratio_change_percent: float | None
    uncertainty_percent: float | None
    moved: bool
    same_file: bool


class BenchReport(VersionedSchema):
    """What was measured, and everything needed to measure it again.

    Attributes:
        date: when (ISO 8601, UTC).
        model: what was timed.
        weights: where its weights came from.
        settings: what was asked, with the device, threads and reference that were taken.
        images: what the inputs are, in words.
        machine: where it ran.
        versions: of Python, this program and the runtimes.
        environment: variables that change how fast things run.
        contenders: by name.
        reference: what ratios are against; None where there is none.
        rows: one a contender, batch and image size.
        skipped: of who did not start by name why, one phrase each.
        ceilings: what the device can do; None where it was not measured.
        roofline: each row against them.
        profiles: time by kind of layer at the largest batch, by contender, where asked for.
        best_under_p99: by contender, the row of most images a second under the limit that was
            asked for, if one was; None where no batch keeps it.
        seconds: from the first to the last (``wall``), and in timed calls (``timed``).
        warnings: what to keep in mind, one sentence each.
        changes: since an older benchmark that this one is compared with.
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
    roofline: tuple[Reached, ...]
    profiles: dict[str, tuple[ProfileLine, ...]]
    best_under_p99: dict[str, Row | None] | None
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    changes: tuple[Change, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every contender that started could be timed."""
        return bool(self.rows) and not any(row.error for row in self.rows)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def read_report(path: Path) -> BenchReport:
    """Return a benchmark's JSON file.

    Raises:
        InputError: it cannot be read, is something else, or is of another version.
    """
    remedy = "Measure one with `van-deploy bench BUNDLE --output FILE` of this version."
    return read_document(BenchReport, path, "benchmark", InputError, remedy)


def record(report: BenchReport, bundle: Bundle) -> None:
    """Keep a report in a bundle as ``bench.json``, and its figures in the manifest's ``checks``.

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


def compared(old: BenchReport, new: BenchReport) -> BenchReport:
    """Return ``new`` with what changed since ``old``, row by row.

    Raises:
        UsageError: they come from different devices, TensorRT majors or numbers of
            threads or streams, have different references, or no row in common.
    """
    now = _comparable(new)
    for what, before in _comparable(old).items():
        if before != (after := now[what]):
            raise UsageError(
                f"The two benchmarks cannot be compared: {what} was {before}, now it is {after}.",
                "Measure both on the same machine, with the same settings.",
            )
    rows = {(row.contender, row.batch, row.image_size): row for row in old.rows}
    changes = []
    for row in new.rows:
        place = (row.contender, row.batch, row.image_size)
        before = rows.get(place)
        if before and before.latency and row.latency:
            percent, left_open = _ratio_change(before.ratio, row.ratio)
            moved = abs(percent or 0.0) > max(AGREE_WITHIN_PERCENT, left_open or 0.0)
            same = old.contenders[row.contender].sha256 == new.contenders[row.contender].sha256
            times = (before.latency.p50_ms, row.latency.p50_ms)
            changes.append(Change(*place, *times, percent, left_open, moved, same))
    if not changes:
        raise UsageError(
            "The two benchmarks have no row in common.",
            "Measure the same runners at the same batch sizes.",
        )
    return new.model_copy(update={"changes": tuple(changes)})


def _comparable(report: BenchReport) -> dict[str, object]:
    """Return what two benchmarks must have in common, by what it is called."""
    cpu, settings = report.machine.cpu, report.settings
    gpus = "".join(f", {gpu.name}" for gpu in report.machine.gpus)
    return {
        "the device": f"{settings.device} of {cpu.name}, {cpu.cores_allowed} cores{gpus}",
        "TensorRT's major version": report.versions.get("tensorrt", "none").partition(".")[0],
        "the number of threads": settings.threads,
        "the number of streams": settings.streams,
        "the reference": report.reference,
    }


def _ratio_change(old: Ratio | None, new: Ratio | None) -> tuple[float | None, float | None]:
    """Return a ratio's change in percent, and how much of it the two intervals leave open.

    The ends that face each other count, added as independent errors are.
    """
    if old is None or new is None:
        return None, None
    change = math.log(new.median / old.median)
    ends = (old.high, new.low) if change > 0 else (old.low, new.high)
    spans = (abs(math.log(end / r.median)) for end, r in zip(ends, (old, new), strict=True))
    return 100 * math.expm1(change), 100 * math.expm1(math.hypot(*spans))
