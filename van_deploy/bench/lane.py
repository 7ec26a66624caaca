"""One contender in a race: its process, and what was measured of it at the current batch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.gpu_state import GpuState
from van_deploy.bench.process import WorkerError, WorkerProcess
from van_deploy.bench.timing import Latency, Ratio, latency_of, ratio_of
from van_deploy.config.bench import LEAST_ROUNDS, Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["Lane", "Loading", "Row"]

REWARM_S = 0.02
"""Unmeasured seconds after a process was woken: its threads start, its weights come back into
the caches. The first measured call is then as long as those after it."""

WARM_CALLS = 3  # the fastest of them tells how long a call takes


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

    @property
    def rate(self) -> float:
        """Images a second; 0 where it failed."""
        return self.images_per_s or 0.0

    @property
    def times(self) -> Latency:
        """The latency of a row with figures.

        Raises:
            ValueError: it has none.
        """
        if self.latency is None:
            raise ValueError(f"{self.contender} at batch {self.batch} has no figures")
        return self.latency


@dataclass
class Lane:
    """A contender, its process, and what was measured of it at the current batch.

    Attributes:
        contender: which one.
        process: its process; None before :meth:`load`.
        loaded: what loading it took; None before, and where it failed.
        failure: why it does not run at this batch.
        latencies: in ms, of all calls.
        rounds: of each round its mean in ms and what the product took at most beside it.
        ratios: of each round; none without a reference.
        timed_s: seconds of timed calls at this batch.
        calls: how many those were.
        call_s: the fastest call while warming up.
        first_call_ms: the first call with this batch.
        peak_rss: of its process, in bytes.
    """

    contender: Contender
    process: WorkerProcess | None = None
    loaded: Loading | None = None
    failure: WorkerError | None = None
    latencies: list[float] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    timed_s: float = 0.0
    calls: int = 0
    call_s: float = 0.0
    first_call_ms: float | None = None
    peak_rss: int = 0

    def load(self, process: WorkerProcess, streams: int) -> None:
        """Open the contender in ``process``; a failure is kept."""
        self.process, self.failure = process, None
        given = {"contender": asdict(self.contender), "threads": process.threads}
        if answer := self.ask("load", **given, streams=streams):
            self.loaded = Loading(**answer)

    def feed(
        self, images: Path, batch: int, preprocessing: Mapping[str, Any] | None, warmup_s: float
    ) -> None:
        """Forget the last batch, take the next and warm up; a failure is kept."""
        self.failure = None
        self.latencies, self.rounds, self.ratios = [], [], []
        self.timed_s, self.calls, self.call_s, self.peak_rss = 0.0, 0, 0.0, 0
        if refusal := self.contender.refuses(batch):
            self.failure = WorkerError("batch", refusal)
            return
        given = {"images": str(images), "batch": batch, "preprocessing": preprocessing}
        if answer := self.ask("feed", **given):
            self.first_call_ms = 1e3 * answer["first_call_s"]
            warm = self.ask("time", seconds=warmup_s, calls=WARM_CALLS, limit_s=max(warmup_s, 60))
            self.call_s = min(warm["latencies_ms"]) / 1e3 if warm else 0.0

    def time_slice(self, seconds: float) -> float | None:
        """Time calls for ``seconds``, one at least; return their mean in ms, None on failure.

        The mean, not the median: that forgets a short disturbance where a slice holds many
        calls and cannot where it holds one, and so would flatter the faster of two.
        """
        self.ask("time", seconds=REWARM_S, calls=1, limit_s=REWARM_S)
        answer = self.ask("time", seconds=seconds, calls=1, limit_s=max(seconds, 1e-3))
        if not answer:
            return None
        self.latencies += answer["latencies_ms"]
        self.peak_rss = max(self.peak_rss, answer["peak_rss_bytes"])
        self.calls += answer["calls"]
        self.timed_s += answer["wall_s"]
        return statistics.fmean(answer["latencies_ms"])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Return the process's answer; nothing once it has failed, and the failure is kept."""
        if self.failure is None and self.process is not None:
            try:
                return self.process.ask(do, **arguments)
            except WorkerError as error:
                self.failure = error
        return {}

    def quiet_ratio(self, limit_ms: float) -> Ratio | None:
        """Return the ratio over the quiet rounds; None where they are too few to stand alone."""
        looks = [look for _, look in self.rounds]
        quiet = [r for r, look in zip(self.ratios, looks, strict=False) if look <= limit_ms]
        return ratio_of(quiet) if len(quiet) >= LEAST_ROUNDS else None

    def is_settled(self, budget: Budget, limit_ms: float) -> bool:
        """Return whether the ratio over the quiet rounds is known well enough."""
        ratio = self.quiet_ratio(limit_ms)
        return ratio is not None and ratio.is_within(budget.tolerance_percent)

    def is_done(self, budget: Budget, limit_ms: float, *, compared: bool) -> bool:
        """Return whether it need not be timed again.

        Args:
            budget: how long it is to be timed.
            limit_ms: what the product takes at most when the machine is quiet.
            compared: whether it is compared with a reference other than itself.
        """
        if self.failure is not None or budget.is_over(self.timed_s, len(self.rounds)):
            return True
        met = budget.is_met(self.timed_s, self.calls, len(self.rounds))
        return met and (not compared or self.is_settled(budget, limit_ms))

    def row(self, row: Row, budget: Budget, limit_ms: float, *, compared: bool) -> Row:
        """Return ``row`` with what was measured; see :meth:`is_done` on the others."""
        if self.failure is not None or not self.latencies:
            failure = self.failure or WorkerError("failed", "nothing was measured")
            return replace(row, error=failure.message, error_kind=failure.kind)
        ratio = self.quiet_ratio(limit_ms) or ratio_of(self.ratios)
        return replace(
            row,
            latency=latency_of(self.latencies),
            images_per_s=row.batch * self.calls / self.timed_s,
            ratio=ratio,
            settled=self.is_settled(budget, limit_ms) if ratio and compared else None,
            round_ms=tuple(ms for ms, _ in self.rounds),
            round_ratios=tuple(self.ratios),
            round_quiet=tuple(look <= limit_ms for _, look in self.rounds),
            first_call_ms=self.first_call_ms,
            peak_rss_bytes=self.peak_rss,
        )
