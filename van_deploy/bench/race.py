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
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bench.document import Contender, Latency, ProfileLine, Ratio, Row
from van_deploy.bench.worker import WorkerError, WorkerProcess
from van_deploy.config import BenchSettings, Budget
from van_deploy.config.commands import LEAST_ROUNDS
from van_deploy.config.sizes import ImageSize
from van_deploy.stopwatch import Progress, silent

SIDE, PRODUCTS = 384, 10  # about 10 ms on two cores
QUIET_LIMIT, UNDISTURBED = 1.1, 0.1
"""How much longer than undisturbed the product may take; the share of all looks that may be
faster than the one that stands for undisturbed."""


class Lane:
    """A contender, its process, and what was measured of it at the current batch.

    Args:
        contender: which one.
        images: folder with a ``.npy`` file of images for each kind of input.
        image_size: of them.

    Attributes:
        load_s: what loading it took; None before, and where it failed.
        failure: why it does not run at this batch.
        latencies: in ms, of all calls.
        rounds: of each its mean in ms, what the product took at most beside it, and the ratio to
            the reference; None without one.
        timed_s: seconds of timed calls at this batch.
        call_ms: the fastest call while warming up.
    """

    def __init__(self, contender: Contender, images: Path, image_size: ImageSize) -> None:
        self.contender, self.images, self.image_size = contender, images, image_size
        self.load_s: float | None = None
        self.failure: WorkerError | None = None

    def load(self, process: WorkerProcess, streams: int) -> None:
        """Open the contender in ``process``, once a stream; a failure is kept."""
        self.process, self.failure = process, None
        given = {"contender": self.contender, "threads": process.threads, "streams": streams}
        self.load_s = self.ask("load", **given) or self.load_s

    def start(self, batch: int) -> dict[str, Any]:
        """Forget the last batch; return which images the process is to take for this one."""
        self.latencies: list[float] = []
        self.rounds: list[tuple[float, float, float | None]] = []
        self.timed_s, self.call_ms, self.peak_rss = 0.0, 0.0, 0
        self.first_call_ms: float | None = None
        low, high = self.contender.min_batch, self.contender.max_batch
        if self.load_s:  # else it will not open now
            refusal = f"batch {batch} is outside the engine's profile ({low} to {high})"
            fits = high is None or low <= batch <= high
            self.failure = None if fits else WorkerError(refusal)
        self._row = Row(self.contender.name, batch, self.image_size, self.load_s)
        return {"images": self.images / f"{self.contender.embedded}.npy", "batch": batch}

    def feed(self, batch: int, warmup_s: float) -> None:
        """Take the next batch and warm up; a failure is kept."""
        if answer := self.ask("feed", **self.start(batch), warmup_s=warmup_s):
            self.first_call_ms, self.call_ms = answer

    def on_gpu(self, batch: int, budget: Budget) -> Row:
        """Return what was measured of a batch on the device itself."""
        given = {"seconds": budget.seconds, "calls": budget.calls}
        return self.row(**self.ask("resident", **self.start(batch), **given) or {})

    def time_slice(self, seconds: float) -> float:
        """Time calls for ``seconds``, one at least; return their mean in ms, 0 on failure.

        The mean, not the median: that forgets a short disturbance where a slice holds many
        calls and cannot where it holds one, and so would flatter the faster of two.
        """
        if (answer := self.ask("time", seconds=seconds)) is None:
            return 0.0
        latencies, wall_s, self.peak_rss = answer
        self.latencies += latencies
        self.timed_s += wall_s
        return statistics.fmean(latencies)

    def profile(self) -> tuple[ProfileLine, ...]:
        """Return the time by kind of layer at the last batch; nothing on failure."""
        self.failure = self.failure if self.load_s is None else None
        return tuple(self.ask("profile") or ())

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the process's answer; None once it has failed, and the failure is kept."""
        if self.failure is None:
            try:
                return self.process.ask(do, **arguments)
            except WorkerError as error:
                self.failure = error
        return None

    def ratio(self, limit_ms: float) -> Ratio | None:
        """Return the ratio over the quiet rounds; None where they are too few to stand alone."""
        quiet = [ratio for _, look, ratio in self.rounds if look <= limit_ms and ratio]
        return Ratio.of(quiet) if len(quiet) >= LEAST_ROUNDS else None

    def row(self, **figures: Any) -> Row:
        """Return what was measured, with further figures; or why nothing was."""
        if self.failure is not None:
            return replace(self._row, error=self.failure.message)
        return replace(self._row, **figures)


class Race:
    """The contenders' processes. Open it with ``with``; it ends them on leaving.

    Args:
        contenders: who runs; names are unique.
        settings: how long, with which threads and streams, and compared with which contender.
        images: folder with a ``.npy`` file of images for each kind of input.
        image_size: of them.
        progress: told what is going on.

    Attributes:
        lanes: one a contender.
        looks: what the product took, in ms, whenever it was timed.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        settings: BenchSettings,
        images: Path,
        image_size: ImageSize,
        progress: Progress = silent,
    ) -> None:
        self.settings, self._say = settings, progress
        self.lanes = [Lane(contender, images, image_size) for contender in contenders]
        self.looks: list[float] = []
        self._stack = ExitStack()

    def __enter__(self) -> Race:
        """Start and load every contender, one after the other."""
        for lane in self.lanes:
            self._load(lane)
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        self._stack.close()

    @property
    def limit_ms(self) -> float:
        """How long the product may take in a quiet moment, by all that was seen so far."""
        if not self.looks:
            return math.inf
        return QUIET_LIMIT * float(np.quantile(self.looks, UNDISTURBED, method="inverted_cdf"))

    def run(self, batch: int, only: Container[str] | None = None) -> list[Row]:
        """Return one row a contender at one batch size; ``only`` of some, where given."""
        budget, reference = self.settings.budget, self.settings.reference
        lanes = [lane for lane in self.lanes if only is None or lane.contender.name in only]
        for lane in lanes:
            if lane.failure is not None and lane.failure.killed:
                self._load(lane)  # a new process for a new batch
            self._say(f"Batch {batch}: warming {lane.contender.name}")
            if self.settings.device == "cpu":
                lane.feed(batch, budget.warmup_s)
        if self.settings.device != "cpu":
            return [lane.on_gpu(batch, budget) for lane in lanes]
        base = next((x for x in lanes if x.contender.name == reference and not x.failure), None)
        slice_s = budget.slice_s(base.call_ms / 1e3 if base else 0.0)
        for turn in count():
            waiting = [lane for lane in lanes if not self._is_done(lane, base)]
            if not waiting:
                break
            further = f", {len(waiting)} not settled yet" * (turn >= budget.rounds)
            self._say(f"Batch {batch}, round {turn + 1} of {max(budget.rounds, turn + 1)}{further}")
            self._round(waiting if turn % 2 == 0 else waiting[::-1], base, slice_s)
        return [self._row(lane, base, batch) for lane in lanes]

    def _row(self, lane: Lane, base: Lane | None, batch: int) -> Row:
        limit_ms, has_reference = self.limit_ms, base is not None and base.failure is None
        if lane.failure is not None:
            return lane.row()
        ratio = lane.ratio(limit_ms) or Ratio.of([ratio for *_, ratio in lane.rounds if ratio])
        is_compared = has_reference and ratio and lane is not base
        return lane.row(
            latency=Latency.of(lane.latencies),
            images_per_s=batch * len(lane.latencies) / lane.timed_s,
            ratio=ratio if has_reference else None,  # one that died is no reference
            settled=self._is_settled(lane) if is_compared else None,
            rounds=len(lane.rounds),
            quiet_rounds=sum(look <= limit_ms for _, look, _ in lane.rounds),
            first_call_ms=lane.first_call_ms,
            peak_rss_bytes=lane.peak_rss,
        )

    def look(self) -> float:
        """Time the product of two matrices; return its milliseconds."""
        a = np.full((SIDE, SIDE), 0.5, np.float32)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            a @ a
        self.looks.append(1e3 * (time.perf_counter() - start) / PRODUCTS)
        return self.looks[-1]

    def _is_done(self, lane: Lane, base: Lane | None) -> bool:
        """Return whether a contender need not be timed again at this batch."""
        budget, rounds = self.settings.budget, len(lane.rounds)
        if lane.failure is not None or budget.is_over(lane.timed_s, rounds):
            return True
        alone = base is None or base.failure is not None or lane is base
        met = budget.is_met(lane.timed_s, len(lane.latencies), rounds)
        return met and (alone or self._is_settled(lane))

    def _is_settled(self, lane: Lane) -> bool:
        """Return whether the ratio over the quiet rounds is known well enough."""
        ratio, tolerance = lane.ratio(self.limit_ms), self.settings.budget.tolerance_percent
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

    def _load(self, lane: Lane) -> None:
        self._say(f"Loading {lane.contender.name}")
        process = WorkerProcess(self.settings.threads or 1)
        lane.load(self._stack.enter_context(process), self.settings.streams)


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
