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
from itertools import count
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane, Row
from van_deploy.bench.process import WorkerProcess
from van_deploy.bench.timing import percentile
from van_deploy.config import Budget
from van_deploy.config.sizes import ImageSize

__all__ = ["Progress", "Race", "between", "nearest", "with_reference"]

SIDE, PRODUCTS = 384, 10  # about 10 ms on two cores
QUIET_LIMIT, UNDISTURBED = 1.1, 0.1
"""How much longer than undisturbed the product may take; the share of all looks that may be
faster than the one that stands for undisturbed."""

Progress = Callable[[str], None]


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
