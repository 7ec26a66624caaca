"""What was measured of a contender, and how figures come from latencies. Times are in ms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.config.sizes import ImageSize


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


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference, paired by round.

    Attributes:
        median: over the rounds.
        low: lower end of the median's 95 % interval.
        high: upper end of it.
        least: the least favourable round.
        most: the most favourable round.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    rounds: int

    @property
    def uncertainty_percent(self) -> float:
        """How far the interval reaches from the median, in percent of it."""
        return 100 * max(self.high / self.median - 1, 1 - self.low / self.median)


@dataclass(frozen=True)
class Loading:
    """What loading a contender took.

    Attributes:
        import_s: to import its runtime.
        load_s: to open the file, once a stream.
        rss_imported_bytes: resident memory in between.
        rss_loaded_bytes: resident memory after it.
        threads_each: of each stream.
    """

    import_s: float
    load_s: float
    rss_imported_bytes: int
    rss_loaded_bytes: int
    threads_each: int


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
        streams: calls in flight at the same time.
        latency: of all calls; on a GPU of one launch alone. None where it failed.
        images_per_s: over all streams; on a GPU of launches queued ahead. None where it failed.
        ratio: times faster than the reference at this batch, over the quiet rounds, or over
            all where those were too few; None where one of the two failed.
        settled: whether the ratio's interval came within the budget's tolerance; None without
            a ratio, on a GPU, and for the reference's own, which is 1.
        round_ms: each round's mean.
        round_ratios: each round's ratio, to the reference just before and just after.
        round_quiet: whether the machine was left alone in each.
        first_call_ms: the first call with this batch.
        peak_rss_bytes: largest resident memory of the process at this batch.
        queued_ms: on a GPU, a launch among queued ones.
        upload_ms: on a GPU, the images from pinned memory to it.
        download_ms: on a GPU, the outputs from it to pinned memory.
        steady: on a GPU, whether its clock was steady when timing began.
        gpu: its state while this ran.
        throttled: why the GPU was slowed down.
        error: why there are no figures; "" where there are.
        error_kind: ``memory``, ``missing``, ``killed``, ``failed``, ``batch`` or "".
    """

    contender: str
    batch: int
    image_size: ImageSize
    streams: int
    latency: Latency | None = None
    images_per_s: float | None = None
    ratio: Ratio | None = None
    settled: bool | None = None
    round_ms: tuple[float, ...] = ()
    round_ratios: tuple[float, ...] = ()
    round_quiet: tuple[bool, ...] = ()
    first_call_ms: float | None = None
    peak_rss_bytes: int | None = None
    queued_ms: float | None = None
    upload_ms: float | None = None
    download_ms: float | None = None
    steady: bool | None = None
    gpu: GpuState | None = None
    throttled: tuple[str, ...] = ()
    error: str = ""
    error_kind: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` (0 to 1) of all values do not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.99)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    index = -int(-share * len(ordered) // 1) - 1  # ceil, counted from 0
    return ordered[max(0, min(index, len(ordered) - 1))]


def latency_of(milliseconds: Sequence[float]) -> Latency:
    """Return the figures of one or more calls."""
    mean = statistics.fmean(milliseconds)
    return Latency(
        calls=len(milliseconds),
        p50_ms=statistics.median(milliseconds),
        p90_ms=percentile(milliseconds, 0.90),
        p99_ms=percentile(milliseconds, 0.99),
        mean_ms=mean,
        min_ms=min(milliseconds),
        cv_percent=100 * statistics.pstdev(milliseconds) / mean if mean else 0.0,
    )


def ratio_of(rounds: Sequence[float]) -> Ratio | None:
    """Return the median of each round's ratio, and its 95 % interval; None without a round.

    The interval is the one of order statistics, which assumes nothing of how
    the rounds are distributed; fewer than six have none, and get all they span.

    >>> ratio_of([2.0, 3.0, 2.0])
    Ratio(median=2.0, low=2.0, high=3.0, least=2.0, most=3.0, rounds=3)
    """
    if not rounds:
        return None
    ordered = sorted(rounds)
    cut = _cut(len(ordered))
    ends = (ordered[cut], ordered[-1 - cut], ordered[0], ordered[-1])
    return Ratio(statistics.median(ordered), *ends, rounds=len(ordered))


def _cut(count: int) -> int:
    """Return how many values to leave out at either end for 95 % around the median.

    >>> [_cut(n) for n in (5, 6, 8, 9, 20, 30)]
    [0, 0, 0, 1, 5, 9]
    """
    tail = cut = 0
    while True:
        tail += math.comb(count, cut)  # so many of 2^count ways leave at most `cut` below
        if 2 * tail > 0.05 * 2**count:
            return max(0, cut - 1)
        cut += 1
