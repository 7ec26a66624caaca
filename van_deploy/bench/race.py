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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

from van_deploy.bench.contender import Contender
from van_deploy.bench.lane import Lane
from van_deploy.bench.process import WorkerProcess
from van_deploy.bench.timing import Row, percentile
from van_deploy.config import Budget
from van_deploy.config.sizes import ImageSize

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
        progress: Progress | None = None,
    ) -> None:
        self.threads, self.streams = threads, streams
        self.lanes = [Lane(contender) for contender in contenders]
        self.looks: list[float] = []
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
            images: folder with a ``.npy`` file of at least ``batch`` images for each kind of input.
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
        slice_s = budget.slice_s(base.call_ms / 1e3 if base else 0.0)
        for turn in count():
            waiting = [
                lane
                for lane in lanes
                if not lane.is_done(budget, self.limit_ms, compared=_compared(lane, base))
            ]
            if not waiting:
                break
            further = f", {len(waiting)} not settled yet" * (turn >= budget.rounds)
            most = max(budget.rounds, turn + 1)
            self._say(f"Batch {batch}, round {turn + 1} of {most}{further}")
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
        import numpy as np

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
            lane.rounds.append((ms, max(max(looks[i : i + 2]) for i in (place, *beside))))
            if at:  # interpolated in the logarithm: a drift of so many percent a place cancels
                lane.ratios.append(math.exp(np.interp(place, at, np.log(own))) / ms)
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
        self._say(f"Batch {batch}: warming {lane.contender.name}")
        lane.feed(images, batch, budget.warmup_s)


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


def _compared(lane: Lane, base: Lane | None) -> bool:
    """Return whether a contender has a reference other than itself."""
    return base is not None and base.failure is None and lane is not base
