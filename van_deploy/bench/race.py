"""The race: every contender in a process of its own, one awake at a time, in many short rounds.

In each round every contender is woken, warmed and timed for one slice, at a quiet moment
of the machine, and the reference before and after every few of them. A contender's ratio
in that round is to what the reference took just before and just after, interpolated to
its own turn: a steady drift cancels. The order turns round from one round to the next. A
contender is timed until its ratio has settled over quiet rounds or its budget is spent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane, Loading, Row
from van_deploy.bench.process import WorkerProcess
from van_deploy.bench.quiet import Gauge
from van_deploy.config import Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["Race", "between", "ceilings_here", "nearest", "with_reference"]

PATIENCE_S = 5.0  # of waiting for quiet moments, before anything was timed

Progress = Callable[[str], None]


class Race:
    """The contenders' processes. Open it with ``with``; it ends them on leaving.

    Args:
        contenders: who runs; names are unique.
        threads: for each process.
        streams: calls each keeps in flight.
        preprocessing: mean and std, for graphs with embedded preprocessing.
        environment: variables of every process.
        progress: told what is going on.

    Attributes:
        gauge: watches whether the machine is left alone, while the race is open.
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        threads: int,
        *,
        streams: int = 1,
        preprocessing: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.threads = threads
        self.streams = streams
        self.environment = dict(environment or {})
        self._lanes = [Lane(contender) for contender in contenders]
        self._preprocessing = preprocessing
        self._say = progress or (lambda _: None)
        self._stack = ExitStack()
        self._spent_s = 0.0
        self.gauge = Gauge(None)

    def __enter__(self) -> Race:
        """Start what watches the machine; start and load every contender, one after the other."""
        watcher = self._stack.enter_context(WorkerProcess(self.threads, self.environment))
        self.gauge = Gauge(lambda: float(watcher.ask("gauge")["ms"]))
        for lane in self._lanes:
            self._start(lane)
        return self

    def __exit__(self, *_: object) -> None:
        """End every process."""
        self._stack.close()

    @property
    def runner_s(self) -> float:
        """Seconds the processes were awake: loading, warming, timing."""
        return self._spent_s + sum(lane.process.busy_s for lane in self._lanes if lane.process)

    @property
    def timed_s(self) -> float:
        """Seconds of timed calls so far."""
        return sum(lane.all_timed_s for lane in self._lanes)

    def loaded(self) -> dict[str, Loading]:
        """Return what loading each contender took, by name; those that failed are absent."""
        return {lane.contender.name: lane.loaded for lane in self._lanes if lane.loaded}

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
        lanes = [lane for lane in self._lanes if only is None or lane.contender.name in only]
        for lane in lanes:
            self._feed(lane, images, batch, budget)
        base = next((x for x in lanes if x.contender.name == reference and not x.failure), None)
        slice_s = budget.slice_s(base.call_s if base else 0.0)
        waited_before = self.gauge.waited_s
        self.gauge.look()
        for turn in count():
            limit_ms = self.gauge.limit_ms
            waiting = [
                lane
                for lane in lanes
                if not lane.is_done(budget, limit_ms, compared=_compared(lane, base))
            ]
            if not waiting:
                break
            self._say(_where(batch, turn, budget, len(waiting)))
            order = waiting if turn % 2 == 0 else waiting[::-1]
            self._round(order, base, slice_s, self._patience_s(lanes, waited_before))
        if base is not None and base.failure is not None:
            for lane in lanes:
                lane.round_ratios.clear()  # one that died is no reference
        limit_ms = self.gauge.limit_ms
        return [
            lane.row(
                batch, image_size, self.streams, budget, limit_ms, compared=_compared(lane, base)
            )
            for lane in lanes
        ]

    def _round(
        self, waiting: Sequence[Lane], base: Lane | None, slice_s: float, patience_s: float
    ) -> None:
        """Time one slice of each, and of the reference between them."""
        others = [lane for lane in waiting if lane is not base]
        order = others if base is None else with_reference(others, base)
        times: list[float | None] = []
        looks: list[float] = []
        for lane in order:
            before = self.gauge.quiet_moment(patience_s / len(order))
            times.append(None if lane.failure else lane.time_slice(slice_s))
            looks.append(max(before, self.gauge.look()))
        marks = [ms if lane is base else None for lane, ms in zip(order, times, strict=True)]
        for place, (lane, ms) in enumerate(zip(order, times, strict=True)):
            if lane is base or ms is None:
                continue
            beside = nearest(marks, place)
            lane.round_ms.append(ms)
            lane.round_looks.append(max(looks[i] for i in (place, *beside)))
            if beside:
                lane.round_ratios.append(between(marks, place) / ms)
        own = [ms for ms in marks if ms is not None]
        if base is not None and own:
            base.round_ms.append(statistics.geometric_mean(own))
            base.round_ratios.append(1.0)
            base.round_looks.append(max(look for look, ms in zip(looks, marks, strict=True) if ms))

    def _patience_s(self, lanes: Sequence[Lane], waited_before_s: float) -> float:
        """Return how long a round may wait: at one batch no longer than was timed, and some."""
        timed = sum(lane.timed_s for lane in lanes)
        return max(0.0, PATIENCE_S + timed - (self.gauge.waited_s - waited_before_s))

    def _start(self, lane: Lane) -> None:
        self._say(f"Loading {lane.contender.name}")
        if lane.process is not None:
            self._spent_s += lane.process.busy_s
        process = WorkerProcess(
            self.threads, self.environment, keeps_memory=lane.contender.keeps_memory
        )
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


def ceilings_here(threads: int, seconds: float = 0.5) -> Ceilings:
    """Return this machine's measured limits, from a process of their own.

    Raises:
        WorkerError: they could not be measured.
    """
    with WorkerProcess(threads) as process:
        return Ceilings(**process.ask("ceilings", threads=threads, seconds=seconds))


def _compared(lane: Lane, base: Lane | None) -> bool:
    """Return whether a contender has a reference other than itself."""
    return base is not None and base.failure is None and lane is not base


def _where(batch: int, turn: int, budget: Budget, waiting: int) -> str:
    further = "" if turn < budget.rounds else f", {waiting} not settled yet"
    return f"Batch {batch}, round {turn + 1} of {max(budget.rounds, turn + 1)}{further}"
