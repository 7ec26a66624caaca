"""One contender in a race: its process, and what was measured of it at the current batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.process import WorkerError, WorkerProcess
from van_deploy.bench.timing import Latency, Ratio, latency_of, quiet_rounds, ratio_of, slice_ms
from van_deploy.config.bench import LEAST_ROUNDS, Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["Lane", "Loading", "Row"]

REWARM_CALLS, REWARM_S = 1, 0.02
"""Unmeasured calls after a process was woken: its threads start, its weights come back
into the caches. The first measured call is then as long as those after it."""

WARM_CALLS = 3  # the fastest of them tells how long a call takes


@dataclass(frozen=True)
class Loading:
    """What loading a contender took.

    Attributes:
        import_s: to import its runtime.
        load_s: to open the file, once a stream.
        rss_imported_bytes: resident memory in between.
        rss_loaded_bytes: resident memory after it.
        versions: of what runs it, by package.
        threads_each: of each stream.
    """

    import_s: float
    load_s: float
    rss_imported_bytes: int
    rss_loaded_bytes: int
    versions: Mapping[str, str]
    threads_each: int


@dataclass(frozen=True)
class Row:
    """One contender at one batch size.

    Attributes:
        contender: which one.
        batch: images a call.
        image_size: of the input in pixels: a side, or height and width.
        streams: calls in flight at the same time.
        latency: of all calls, seen from the process; None where it failed.
        images_per_s: over all streams; None where it failed.
        ratio: times faster than the reference at this batch, over the quiet rounds, or over
            all where those were too few; None where one of the two failed.
        settled: whether the ratio's interval came within the budget's tolerance, over
            quiet rounds; None without a ratio, and for the reference's own, which is 1.
        round_ms: each round's mean.
        round_ratios: each round's ratio, to the reference just before and just after.
        round_quiet: whether the machine was left alone in each (:mod:`van_deploy.bench.quiet`).
        first_call_ms: the first call with this batch.
        peak_rss_bytes: largest resident memory of the process at this batch.
        device: latency the device itself measured, without transfers; None on a CPU.
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
    device: Latency | None = None
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
        process: its process; None before :meth:`start`.
        loaded: what loading it took; None before, and where it failed.
        failure: why it does not run at this batch.
        round_ms: the mean of each round, filled in by the race.
        round_ratios: the ratio of each round, filled in by the race.
        round_looks: what the work of :mod:`van_deploy.bench.quiet` took at most around the
            slices of each round's ratio, in ms, filled in by the race.
        timed_s: seconds of timed calls at this batch.
        calls: how many those were.
        call_s: the fastest call while warming up.
        all_timed_s: seconds of timed calls, of all batches.
    """

    contender: Contender
    process: WorkerProcess | None = None
    loaded: Loading | None = None
    failure: WorkerError | None = None
    round_ms: list[float] = field(default_factory=list)
    round_ratios: list[float] = field(default_factory=list)
    round_looks: list[float] = field(default_factory=list)
    timed_s: float = 0.0
    calls: int = 0
    call_s: float = 0.0
    all_timed_s: float = 0.0
    _latencies: list[float] = field(default_factory=list)
    _device_ms: list[float] = field(default_factory=list)
    _first_call_ms: float | None = None
    _peak_rss: int = 0

    @property
    def rounds(self) -> int:
        """Return in how many rounds it was timed."""
        return len(self.round_ms)

    def load(self, process: WorkerProcess, streams: int) -> None:
        """Open the contender in ``process``; a failure is kept."""
        self.process, self.failure = process, None
        try:
            answer = process.ask(
                "load",
                contender=asdict(self.contender),
                threads=process.threads,
                streams=streams,
            )
            self.loaded = Loading(**answer)
        except WorkerError as error:
            self.failure = error

    def feed(
        self, images: Path, batch: int, preprocessing: Mapping[str, Any] | None, warmup_s: float
    ) -> None:
        """Forget the last batch, take the next and warm up; a failure is kept."""
        self._forget()
        refusal = self.contender.refuses(batch)
        if refusal:
            self.failure = WorkerError("batch", refusal)
            return
        try:
            answer = self._ask("feed", images=str(images), batch=batch, preprocessing=preprocessing)
            self._first_call_ms = 1e3 * answer["first_call_s"]
            self.call_s = self._ask("warm", seconds=warmup_s, calls=WARM_CALLS)["call_s"]
        except WorkerError as error:
            self.failure = error

    def time_slice(self, seconds: float) -> float | None:
        """Time calls for ``seconds``, one at least; return their mean in ms, None on failure."""
        try:
            self._ask("warm", seconds=REWARM_S, calls=REWARM_CALLS)
            answer = self._ask("measure", seconds=seconds, calls=1, limit_s=max(seconds, 1e-3))
        except WorkerError as error:
            self.failure = error
            return None
        self._latencies += answer["latencies_ms"]
        self._device_ms += answer["device_ms"]
        self._peak_rss = max(self._peak_rss, answer["peak_rss_bytes"])
        self.calls += answer["calls"]
        self.timed_s += answer["wall_s"]
        self.all_timed_s += answer["wall_s"]
        return slice_ms(answer["latencies_ms"])

    def is_done(self, budget: Budget, limit_ms: float, *, compared: bool) -> bool:
        """Return whether it need not be timed again.

        Args:
            budget: how long it is to be timed.
            limit_ms: what the work of :mod:`van_deploy.bench.quiet` takes at most when quiet.
            compared: whether it is compared with a reference other than itself.
        """
        if self.failure is not None or budget.is_over(self.timed_s, self.rounds):
            return True
        met = budget.is_met(self.timed_s, self.calls, self.rounds)
        return met and (not compared or self._is_settled(budget, limit_ms))

    def row(
        self,
        batch: int,
        image_size: ImageSize,
        streams: int,
        budget: Budget,
        limit_ms: float,
        *,
        compared: bool,
    ) -> Row:
        """Return what was measured; see :meth:`is_done` on the last three."""
        row = Row(self.contender.name, batch, image_size, streams)
        if self.failure is not None or not self._latencies:
            failure = self.failure or WorkerError("failed", "nothing was measured")
            return replace(row, error=failure.message, error_kind=failure.kind)
        ratio = ratio_of(self._quiet(limit_ms)) or ratio_of(self.round_ratios)
        return replace(
            row,
            latency=latency_of(self._latencies),
            images_per_s=batch * self.calls / self.timed_s,
            ratio=ratio,
            settled=self._is_settled(budget, limit_ms) if ratio and compared else None,
            round_ms=tuple(self.round_ms),
            round_ratios=tuple(self.round_ratios),
            round_quiet=tuple(look <= limit_ms for look in self.round_looks),
            first_call_ms=self._first_call_ms,
            peak_rss_bytes=self._peak_rss,
            device=latency_of(self._device_ms) if self._device_ms else None,
        )

    def _quiet(self, limit_ms: float) -> list[float]:
        """Return the ratios of the quiet rounds; none where they are too few to stand alone."""
        quiet = quiet_rounds(self.round_ratios, self.round_looks, limit_ms)
        return quiet if len(quiet) >= LEAST_ROUNDS else []

    def _is_settled(self, budget: Budget, limit_ms: float) -> bool:
        ratio = ratio_of(self._quiet(limit_ms))
        return ratio is not None and ratio.is_within(budget.tolerance_percent)

    def _forget(self) -> None:
        self.failure = None
        self.round_ms, self.round_ratios, self.round_looks = [], [], []
        self._latencies, self._device_ms = [], []
        self.timed_s, self.calls, self.call_s = 0.0, 0, 0.0
        self._first_call_ms, self._peak_rss = None, 0

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self.process is None:
            raise WorkerError("failed", "it was not started")
        return self.process.ask(do, **arguments)
