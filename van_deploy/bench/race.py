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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bench.document import Contender, Latency, ProfileLine, Ratio, Row
from van_deploy.bench.worker import WorkerError, WorkerGoneError, WorkerProcess
from van_deploy.config import BenchSettings, Budget
from van_deploy.config.commands import MIN_ROUNDS
from van_deploy.config.sizes import ImageSize
from van_deploy.stopwatch import Progress, no_progress

SIDE, PRODUCTS = 384, 10  # about 10 ms on two cores
# How much longer than undisturbed the product may take; the share of all looks that may be
# faster than the one that stands for undisturbed.
QUIET_LIMIT, UNDISTURBED = 1.1, 0.1


class Lane(WorkerProcess):
    """A contender's process, and what was measured of it at the current batch.

    Args:
        contender: which one.
        images: a ``.npy`` file of its inputs.
        image_size: of them.
        settings: the threads and streams.

    Attributes:
        load_s: what loading it took; None before, and where it failed.
        failure: why it does not run at this batch.
        latencies: in ms, of all calls.
        rounds: of each its mean in ms, what the product took at most beside it, and the ratio to
            the reference; None without one.
        timed_s: seconds of timed calls at this batch.
        call_ms: the fastest call while warming up.
        row: what was measured of the whole batch so far.
    """

    def __init__(
        self, contender: Contender, images: Path, image_size: ImageSize, settings: BenchSettings
    ) -> None:
        super().__init__(settings.threads or 1)
        self.contender, self.images, self.streams = contender, images, settings.streams
        self.name, self.row = contender.name, Row(contender.name, 0, image_size)
        self.load_s: float | None = None
        self.failure: WorkerError | None = None

    def __enter__(self) -> Lane:
        """Start the process and open the contender in it; a failure is kept."""
        super().__enter__()
        self.failure = None
        given = {"contender": self.contender, "threads": self.threads, "streams": self.streams}
        self.load_s = self.answer("load", **given)
        return self

    def start(self, batch: int) -> dict[str, Any]:
        """Forget the last batch; return which images the process is to take for this one."""
        self.latencies, self.timed_s, self.call_ms = list[float](), 0.0, 0.0
        self.rounds = list[tuple[float, float, float | None]]()
        self.row = Row(self.name, batch, self.row.image_size, self.load_s)
        low, high = self.contender.min_batch, self.contender.max_batch
        if self.load_s:  # else it will not open now
            refusal = f"batch {batch} is outside the engine's profile ({low} to {high})"
            fits = high is None or low <= batch <= high
            self.failure = None if fits else WorkerError(refusal)
        return {"images": self.images, "batch": batch}

    def feed(self, batch: int, warmup_s: float) -> None:
        """Take the next batch and warm up; a failure is kept."""
        if answer := self.answer("feed", **self.start(batch), warmup_s=warmup_s):
            first_ms, self.call_ms = answer
            self.row = replace(self.row, first_call_ms=first_ms)

    def on_gpu(self, batch: int, budget: Budget) -> None:
        """Measure a batch on the device itself."""
        given = {**self.start(batch), "seconds": budget.seconds, "calls": budget.calls}
        if figures := self.answer("resident", **given):
            self.row = replace(self.row, **figures)

    def time_slice(self, seconds: float) -> float:
        """Time calls for ``seconds``, one at least; return their mean in ms, 0 on failure.

        The mean, not the median: that forgets a short disturbance where a slice holds many
        calls and cannot where it holds one, and so would flatter the faster of two.
        """
        if (answer := self.answer("time", seconds=seconds)) is None:
            return 0.0
        latencies, wall_s, peak_rss = answer
        self.latencies += latencies
        self.timed_s += wall_s
        self.row = replace(self.row, peak_rss_bytes=peak_rss)
        return statistics.fmean(latencies)

    def profile(self) -> tuple[ProfileLine, ...]:
        """Return the time by kind of layer at the last batch; nothing on failure."""
        self.failure = self.failure if self.load_s is None else None
        return tuple(self.answer("profile") or ())

    def answer(self, do: str, **arguments: Any) -> Any:
        """Return the process's answer; None once it has failed, and the failure is kept."""
        if self.failure is None:
            try:
                return self.ask(do, **arguments)
            except WorkerError as error:
                self.failure = error
        self.row = replace(self.row, error=self.failure.message)
        return None

    def quiet_ratio(self, limit_ms: float) -> Ratio | None:
        """Return the ratio over the quiet rounds; None where they are too few to stand alone."""
        quiet = [ratio for _, look, ratio in self.rounds if look <= limit_ms and ratio]
        return Ratio.of(quiet) if len(quiet) >= MIN_ROUNDS else None


class Race(ExitStack):
    """The contenders' processes. Open it with ``with``; it ends them on leaving.

    Args:
        lanes: who runs; names are unique.
        settings: how long, with which threads and streams, and compared with which contender.
        say: told what is going on.

    Attributes:
        looks: what the product took, in ms, whenever it was timed.
    """

    def __init__(
        self, lanes: list[Lane], settings: BenchSettings, say: Progress = no_progress
    ) -> None:
        super().__init__()
        self.lanes, self.settings, self._say = lanes, settings, say
        self.looks: list[float] = []

    def __enter__(self) -> Race:
        """Start and load every contender, one after the other."""
        for lane in self.lanes:
            self._say(f"Loading {lane.name}")
            self.enter_context(lane)
        return self

    def sweep(self) -> list[Row]:
        """Return the rows of every batch size; who is too slow for the limit drops out."""
        rows, lanes, limit_ms = list[Row](), self.lanes, self.settings.p99_ms or math.inf
        for batch in sorted(set(self.settings.batches)):
            rows += self.run(batch, lanes)
            slow = {r.contender for r in rows if r.latency and r.latency.p99_ms > limit_ms}
            lanes = [lane for lane in lanes if lane.name not in slow]
        return rows

    def run(self, batch: int, lanes: Sequence[Lane]) -> list[Row]:
        """Return one row a contender at one batch size."""
        budget, on_gpu = self.settings.budget, self.settings.device != "cpu"
        for lane in lanes:
            if isinstance(lane.failure, WorkerGoneError):
                lane.__exit__()
                lane.__enter__()  # a new process for a new batch
            self._say(f"Batch {batch}: warming {lane.name}")
            if on_gpu:
                lane.on_gpu(batch, budget)
            else:
                lane.feed(batch, budget.warmup_s)
        racing = [] if on_gpu else [lane for lane in lanes if not lane.failure]
        base = next((lane for lane in racing if lane.name == self.settings.reference), None)
        slice_s = budget.slice_s(base.call_ms / 1e3 if base else 0.0)
        for turn in count():
            base = base if base and not base.failure else None  # one that died is no reference
            waiting = [lane for lane in racing if not self._is_done(lane, base)]
            if not waiting:
                break
            further = f", {len(waiting)} not settled yet" * (turn >= budget.rounds)
            self._say(f"Batch {batch}, round {turn + 1} of {max(budget.rounds, turn + 1)}{further}")
            self._round(waiting if turn % 2 == 0 else waiting[::-1], base, slice_s)
        for lane in racing:
            if not lane.failure:
                self._sum_up(lane, base)
        return [lane.row for lane in lanes]

    def _sum_up(self, lane: Lane, base: Lane | None) -> None:
        """Put what all rounds say into a contender's row."""
        limit_ms, every = self._limit_ms, [ratio for *_, ratio in lane.rounds if ratio]
        ratio = (lane.quiet_ratio(limit_ms) or Ratio.of(every)) if base else None
        lane.row = replace(
            lane.row,
            latency=Latency.of(lane.latencies),
            images_per_s=lane.row.batch * len(lane.latencies) / lane.timed_s,
            ratio=ratio,
            settled=self._is_settled(lane) if ratio and lane is not base else None,
            rounds=len(lane.rounds),
            quiet_rounds=sum(look <= limit_ms for _, look, _ in lane.rounds),
        )

    def look(self) -> float:
        """Time the product of two matrices; return its milliseconds."""
        a = np.full((SIDE, SIDE), 0.5, np.float32)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            a @ a
        self.looks.append(1e3 * (time.perf_counter() - start) / PRODUCTS)
        return self.looks[-1]

    @property
    def _limit_ms(self) -> float:
        """How long the product may take in a quiet moment, by all that was seen so far."""
        undisturbed = np.quantile(self.looks or [math.inf], UNDISTURBED, method="inverted_cdf")
        return QUIET_LIMIT * float(undisturbed)

    def _is_done(self, lane: Lane, base: Lane | None) -> bool:
        """Return whether a contender need not be timed again at this batch."""
        budget, rounds = self.settings.budget, len(lane.rounds)
        if lane.failure is not None or budget.is_exhausted(lane.timed_s, rounds):
            return True
        met = budget.is_complete(lane.timed_s, len(lane.latencies), rounds)
        return met and (base in (None, lane) or self._is_settled(lane))

    def _is_settled(self, lane: Lane) -> bool:
        """Return whether the ratio over the quiet rounds is known well enough."""
        ratio, tolerance = lane.quiet_ratio(self._limit_ms), self.settings.budget.tolerance_percent
        return ratio is not None and ratio.uncertainty_percent <= tolerance

    def _round(self, waiting: Sequence[Lane], base: Lane | None, slice_s: float) -> None:
        """Time one slice of each, and of the reference between them."""
        others = [lane for lane in waiting if lane is not base]
        order = others if base is None else with_reference(others, base)
        times: list[float] = []  # 0 where it failed
        looks = [self.look()]
        for lane in order:
            times.append(lane.time_slice(slice_s))
            looks.append(self.look())
        at = [place for place, lane in enumerate(order) if lane is base and times[place]]
        own = [times[place] for place in at]
        for place, (lane, ms) in enumerate(zip(order, times, strict=True)):
            if lane is base or not ms:
                continue
            beside = [*[i for i in at if i < place][-1:], *[i for i in at if i > place][:1]]
            look = max(max(looks[i : i + 2]) for i in (place, *beside))
            # interpolated in the logarithm: a drift of so many percent a place cancels
            ratio = math.exp(np.interp(place, at, np.log(own))) / ms if at else None
            lane.rounds.append((ms, look, ratio))
        if base is not None and own:
            base.rounds.append((statistics.geometric_mean(own), max(looks), 1.0))


def with_reference(others: Sequence[Lane], base: Lane) -> list[Lane]:
    """Return the order of a round: the reference first, last, and after every few others.

    Of ``n`` others, after each group of about the square root of ``n``: the
    reference is in every ratio, and so many times the slices of one other is
    where more of it stops paying (Dunnett, 1955, on comparing with a control).
    """
    size = math.isqrt(max(len(others), 1) - 1) + 1  # the root, rounded up
    groups = [others[start : start + size] for start in range(0, len(others), size)]
    return [base, *(lane for group in groups for lane in (*group, base))]
