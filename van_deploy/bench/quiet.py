"""Whether the machine was left alone: a fixed piece of work, timed between the slices.

A neighbour on the same processor slows this machine in a way that no load figure shows,
and slows one runner more than another: on a virtual machine of two cores the same graph
took 21 ms or 29 ms a call for seconds at a time, and PyTorch beside it hardly changed
(`python benchmarks/processes.py` shows both). A product of two matrices tells the two
states apart. So it is timed before and after every slice, the next slice waits for a
quiet moment within reason, and rounds that were disturbed do not count for a ratio. The
work is the same whoever runs: what it leaves out favours nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from van_deploy.bench.process import WorkerError
from van_deploy.bench.timing import percentile

__all__ = ["LOOKS_FIRST", "QUIET_LIMIT", "Gauge", "Product", "Quiet"]

SIDE, WARM, REPEATS = 384, 2, 8
"""Three float32 matrices of this side are 1.8 MB; ten products take about 10 ms on two cores."""

QUIET_LIMIT = 1.1
"""How much longer than undisturbed the work may take. Where two states were seen, the work
took 0.8 to 0.88 ms in one of them and 1.0 ms or more in the other."""

UNDISTURBED = 0.1  # the share of looks that may be faster than the one that stands for quiet
LOOKS_FIRST = 20
LOOK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Quiet:
    """How quiet the machine was.

    Attributes:
        work: what was timed to see it.
        limit_ms: what that may take in a quiet moment.
        looks: how often it was timed.
        quiet_share: of the looks, 0 to 1.
        waited_s: for quiet moments.
    """

    work: str
    limit_ms: float
    looks: int
    quiet_share: float
    waited_s: float


class Product:
    """The piece of work, in a worker: products of two float32 matrices by NumPy."""

    def __init__(self) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        shape = (3, SIDE, SIDE)
        self._left, self._right, self._out = rng.random(shape, np.float32)
        self._multiply: Callable[..., Any] = np.matmul

    def ms(self) -> float:
        """Return the mean milliseconds of a product."""
        for _ in range(WARM):
            self._multiply(self._left, self._right, out=self._out)
        start = time.perf_counter()
        for _ in range(REPEATS):
            self._multiply(self._left, self._right, out=self._out)
        return 1e3 * (time.perf_counter() - start) / REPEATS


class Gauge:
    """What the piece of work took, and what that says of the machine.

    Args:
        work: does it once and returns its milliseconds; None where nothing watches, and
            every moment then counts as quiet.
        sleep: called with seconds.

    Attributes:
        waited_s: seconds spent waiting for quiet moments.
    """

    def __init__(
        self, work: Callable[[], float] | None, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.waited_s = 0.0
        self._work = work
        self._sleep = sleep
        self._looks: list[float] = []
        self._last = 0.0
        for _ in range(LOOKS_FIRST):
            self.look()

    @property
    def limit_ms(self) -> float:
        """How long the work may take in a quiet moment, by all that was seen so far."""
        if not self._looks:
            return float("inf")
        return QUIET_LIMIT * percentile(self._looks, UNDISTURBED)

    def look(self) -> float:
        """Do the work once; return its milliseconds, 0 where nothing watches."""
        self._last = self._measured()
        if self._work is not None:
            self._looks.append(self._last)
        return self._last

    def quiet_moment(self, patience_s: float) -> float:
        """Return what the work took last, once that is quiet or ``patience_s`` are over.

        What is seen meanwhile does not count for what is quiet: a long disturbance
        would become the measure.
        """
        start, limit = time.perf_counter(), self.limit_ms
        while self._last > limit and time.perf_counter() - start < patience_s:
            self._sleep(LOOK_AGAIN_S)
            self._last = self._measured()
        self.waited_s += time.perf_counter() - start
        return self._last

    def seen(self) -> Quiet | None:
        """Return what was seen; None where nothing watched."""
        if not self._looks:
            return None
        quiet = sum(look <= self.limit_ms for look in self._looks)
        return Quiet(
            work=f"{REPEATS} products of {SIDE} x {SIDE} float32 matrices",
            limit_ms=self.limit_ms,
            looks=len(self._looks),
            quiet_share=quiet / len(self._looks),
            waited_s=self.waited_s,
        )

    def _measured(self) -> float:
        if self._work is None:
            return 0.0
        try:
            return self._work()
        except WorkerError:
            self._work = None  # the race goes on unwatched
            self._looks.clear()
            return 0.0
