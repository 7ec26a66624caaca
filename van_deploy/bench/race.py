"""The race on a CPU: each contender in its own process, one awake at a time, many short rounds.

In each round every contender is woken, warmed and timed for one slice, and the reference
before and after every few of them. A contender's ratio in that round is to what the reference
took just before and just after, interpolated to its own turn: a steady drift cancels. The order
turns round from one round to the next. A contender is timed until its ratio has settled or its
budget is spent.

A neighbour on the same processor slows some runners more than others, in a way that no load
figure shows; a product of two matrices shows it. It is timed beside every slice, and rounds in
which it took more than a tenth longer than undisturbed do not count for a ratio, unless nearly
all are such.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.gpu_state import GpuState
from van_deploy.bench.process import WorkerError, WorkerProcess
from van_deploy.bench.timing import Latency, Ratio, latency_of, percentile, ratio_of
from van_deploy.config.bench import LEAST_ROUNDS, Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["Lane", "Loading", "Race", "Row", "between", "nearest", "with_reference"]

REWARM_S = 0.02
"""Unmeasured seconds after a process was woken: its threads start, its weights come back into
the caches. The first measured call is then as long as those after it."""

WARM_CALLS = 3  # the fastest of them tells how long a call takes
SIDE, PRODUCTS = 384, 10  # about 10 ms on two cores
QUIET_LIMIT, UNDISTURBED = 1.1, 0.1
"""How much longer than undisturbed the product may take; the share of all looks that may be
faster than the one that stands for undisturbed."""

Progress = Callable[[str], None]


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


class Race:
    """The contenders' processes. Open it with ``with``; it ends them on leaving.

    Args:
        contenders: who runs; names are unique.
        threads: for each process.
        streams: calls each keeps in flight.
        preprocessing: mean and std, for graphs with embedded preprocessing.
        progress: told what is going on.

    Attributes:
        lanes: one a contender.
        looks: what the product took, in ms, whenever it was timed.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        threads: int,
        *,
        streams: int = 1,
        preprocessing: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.threads, self.streams = threads, streams
        self.lanes = [Lane(contender) for contender in contenders]
        self.looks: list[float] = []
        self._preprocessing = preprocessing
        self._say = progress or (lambda _: None)
        self._stack = ExitStack()

    def __enter__(self) -> Race:
        """Start and load every contender, one after the other."""
        for lane in self.lanes:
            self._start(lane)
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        self._stack.close()

    @property
    def limit_ms(self) -> float:
        """How long the product may take in a quiet moment, by all that was seen so far."""
        return QUIET_LIMIT * percentile(self.looks, UNDISTURBED) if self.looks else math.inf

    def run(
        self,
        images: Path,
        batch: int,
        image_size: ImageSize,
        budget: Budget,
        reference: str,
        only: set[str] | None = None,
    ) -> list[Row]:
        """Return one row a contender at one batch size.

        Args:
            images: ``.npy`` file of ``(N, C, S, S)`` float32, ``N >= batch``.
            batch: images a call.
            image_size: S.
            budget: how long.
            reference: the contender the others are compared with.
            only: the contenders to run; None for all.
        """
        lanes = [lane for lane in self.lanes if only is None or lane.contender.name in only]
        for lane in lanes:
            self._feed(lane, images, batch, budget)
        base = next((x for x in lanes if x.contender.name == reference and not x.failure), None)
        slice_s = budget.slice_s(base.call_s if base else 0.0)
        for turn in count():
            waiting = [
                lane
                for lane in lanes
                if not lane.is_done(budget, self.limit_ms, compared=_compared(lane, base))
            ]
            if not waiting:
                break
            self._say(_where(batch, turn, budget, len(waiting)))
            self._round(waiting if turn % 2 == 0 else waiting[::-1], base, slice_s)
        if base is not None and base.failure is not None:
            for lane in lanes:
                lane.ratios.clear()  # one that died is no reference
        rows = (Row(lane.contender.name, batch, image_size, self.streams) for lane in lanes)
        return [
            lane.row(row, budget, self.limit_ms, compared=_compared(lane, base))
            for lane, row in zip(lanes, rows, strict=True)
        ]

    def look(self) -> float:
        """Time the product of two matrices; return its milliseconds."""
        import numpy as np

        a = np.full((SIDE, SIDE), 0.5, np.float32)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            a @ a
        self.looks.append(1e3 * (time.perf_counter() - start) / PRODUCTS)
        return self.looks[-1]

    def _round(self, waiting: Sequence[Lane], base: Lane | None, slice_s: float) -> None:
        """Time one slice of each, and of the reference between them."""
        others = [lane for lane in waiting if lane is not base]
        order = others if base is None else with_reference(others, base)
        times: list[float | None] = []
        looks = [self.look()]
        for lane in order:
            times.append(lane.time_slice(slice_s))
            looks.append(self.look())
        marks = [ms if lane is base else None for lane, ms in zip(order, times, strict=True)]
        for place, (lane, ms) in enumerate(zip(order, times, strict=True)):
            if lane is base or ms is None:
                continue
            beside = nearest(marks, place)
            lane.rounds.append((ms, max(max(looks[i : i + 2]) for i in (place, *beside))))
            if beside:
                lane.ratios.append(between(marks, place) / ms)
        own = [ms for ms in marks if ms is not None]
        if base is not None and own:
            base.rounds.append((statistics.geometric_mean(own), max(looks)))
            base.ratios.append(1.0)

    def _start(self, lane: Lane) -> None:
        self._say(f"Loading {lane.contender.name}")
        keeps = lane.contender.keeps_memory
        process = WorkerProcess(self.threads, keeps_memory=keeps)
        lane.load(self._stack.enter_context(process), self.streams)

    def _feed(self, lane: Lane, images: Path, batch: int, budget: Budget) -> None:
        if lane.failure is not None and lane.failure.kind == "killed":
            self._start(lane)  # a new process for a new batch
        if lane.failure is not None and not lane.loaded:
            return  # it never opened, and will not now
        self._say(f"Batch {batch}: warming {lane.contender.name}")
        lane.feed(images, batch, self._preprocessing, budget.warmup_s)


def with_reference(others: Sequence[Lane], base: Lane) -> list[Lane]:
    """Return the order of a round: the reference first, last, and after every few others.

    Of ``n`` others, after each group of about the square root of ``n``: the
    reference is in every ratio, and so many times the slices of one other is
    where more of it stops paying (Dunnett, 1955, on comparing with a control).
    """
    if not others:
        return [base]
    size = math.isqrt(len(others) - 1) + 1  # the root, rounded up
    order = [base]
    for start in range(0, len(others), size):
        order += [*others[start : start + size], base]
    return order


def nearest(marks: Sequence[float | None], place: int) -> tuple[int, ...]:
    """Return where the marks next to a place are, before it and after it, as far as they are.

    >>> nearest([2.0, None, None, 16.0], 1), nearest([2.0, None], 1), nearest([None], 0)
    ((0, 3), (0,), ())
    """
    before = [i for i in range(place) if marks[i] is not None][-1:]
    after = [i for i in range(place + 1, len(marks)) if marks[i] is not None][:1]
    return (*before, *after)


def between(marks: Sequence[float | None], place: int) -> float:
    """Return what the marks nearest before and after a place say of it, by their distance.

    Interpolated in the logarithm, so that a drift of so many percent a place cancels.

    >>> between([2.0, None, None, 16.0], 1), between([2.0, None], 1)
    (4.0, 2.0)

    Raises:
        ValueError: there is no mark.
    """
    beside = nearest(marks, place)
    known = [mark for mark in (marks[i] for i in beside) if mark is not None]
    if not known:
        raise ValueError("no mark")
    if len(known) == 1:
        return known[0]
    share = (place - beside[0]) / (beside[1] - beside[0])
    return round(known[0] * (known[1] / known[0]) ** share, 12)


def _compared(lane: Lane, base: Lane | None) -> bool:
    """Return whether a contender has a reference other than itself."""
    return base is not None and base.failure is None and lane is not base


def _where(batch: int, turn: int, budget: Budget, waiting: int) -> str:
    further = "" if turn < budget.rounds else f", {waiting} not settled yet"
    return f"Batch {batch}, round {turn + 1} of {max(budget.rounds, turn + 1)}{further}"
