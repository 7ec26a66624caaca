"""The race: every contender in a process of its own, one awake at a time, in many short rounds.

In each round every contender is woken, warmed and timed for one slice, and the
reference before and after every few of them. A contender's ratio in that round is
to what the reference took just before and just after, interpolated to its own turn:
a steady drift cancels. The order turns round from one round to the
next. A contender is timed until its ratio has settled or its budget is spent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from van_deploy.bench.budget import Budget
from van_deploy.bench.ceilings import Ceilings
from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane, Row
from van_deploy.bench.process import WorkerProcess

__all__ = ["Race", "between", "ceilings_here", "with_reference"]

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

    def __enter__(self) -> Race:
        """Start and load every contender, one after the other."""
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

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Return what loading each contender took, by name; those that failed are absent."""
        return {lane.contender.name: lane.loaded for lane in self._lanes if lane.loaded}

    def run(
        self,
        images: Path,
        batch: int,
        image_size: int,
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
        for turn in count():
            waiting = [lane for lane in lanes if not _is_done(lane, base, budget)]
            if not waiting:
                break
            self._say(_where(batch, turn, budget, len(waiting)))
            self._round(waiting if turn % 2 == 0 else waiting[::-1], base, slice_s)
        if base is not None and base.failure is not None:
            for lane in lanes:
                lane.round_ratios.clear()  # one that died is no reference
        return [lane.row(batch, image_size, self.streams, budget) for lane in lanes]

    def _round(self, waiting: Sequence[Lane], base: Lane | None, slice_s: float) -> None:
        """Time one slice of each, and of the reference between them."""
        others = [lane for lane in waiting if lane is not base]
        order = others if base is None else with_reference(others, base)
        times = [lane.time_slice(slice_s) if not lane.failure else None for lane in order]
        for lane in waiting if base in waiting or base is None else (*waiting, base):
            own = [ms for x, ms in zip(order, times, strict=True) if x is lane and ms is not None]
            if own:
                lane.round_ms.append(statistics.geometric_mean(own))
        if base is None:
            return
        base.round_ratios.append(1.0)
        marks = [time if lane is base else None for lane, time in zip(order, times, strict=True)]
        for place, (lane, ms) in enumerate(zip(order, times, strict=True)):
            around = between(marks, place)
            if lane is not base and ms is not None and around is not None:
                lane.round_ratios.append(around / ms)

    def _start(self, lane: Lane) -> None:
        self._say(f"Loading {lane.contender.name}")
        if lane.process is not None:
            self._spent_s += lane.process.busy_s
        process = WorkerProcess(self.threads, self.environment)
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


def between(marks: Sequence[float | None], place: int) -> float | None:
    """Return what the marks nearest before and after a place say of it, by their distance.

    Interpolated in the logarithm, so that a drift of so many percent a place cancels.

    >>> between([2.0, None, None, 16.0], 1), between([2.0, None], 1), between([None], 0)
    (4.0, 2.0, None)
    """
    before = next((i for i in range(place - 1, -1, -1) if marks[i] is not None), None)
    after = next((i for i in range(place + 1, len(marks)) if marks[i] is not None), None)
    found = [marks[i] for i in (before, after) if i is not None]
    known = [mark for mark in found if mark is not None]
    if before is None or after is None:
        return known[0] if known else None
    share = (place - before) / (after - before)
    return round(known[0] * (known[1] / known[0]) ** share, 12)


def ceilings_here(threads: int, seconds: float = 0.5) -> Ceilings:
    """Return this machine's measured limits, from a process of their own.

    Raises:
        WorkerError: they could not be measured.
    """
    with WorkerProcess(threads) as process:
        return Ceilings(**process.ask("ceilings", threads=threads, seconds=seconds))


def _is_done(lane: Lane, base: Lane | None, budget: Budget) -> bool:
    """Return whether a contender needs no further round."""
    compared = base is not None and base.failure is None and lane is not base
    return lane.is_done(budget, compared=compared)


def _where(batch: int, turn: int, budget: Budget, waiting: int) -> str:
    further = "" if turn < budget.rounds else f", {waiting} not settled yet"
    return f"Batch {batch}, round {turn + 1} of {max(budget.rounds, turn + 1)}{further}"
