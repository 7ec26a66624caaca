"""From latencies to figures. Pure functions; times are in milliseconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.config.bench import LEAST_ROUNDS

__all__ = [
    "CV_LIMIT_PERCENT",
    "Latency",
    "Ratio",
    "latency_of",
    "percentile",
    "ratio_of",
]

CV_LIMIT_PERCENT = 2.5
"""Coefficient of variation above which trtexec, too, calls its timings unstable."""


@dataclass(frozen=True)
class Latency:
    """What many calls took.

    Attributes:
        calls: how many.
        p50_ms: median.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        mean_ms: arithmetic mean.
        min_ms: fastest call.
        cv_percent: standard deviation over mean.
    """

    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    cv_percent: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference, paired by round.

    Attributes:
        median: over the rounds.
        low: lower end of the median's 95 % interval.
        high: upper end of it.
        least: the least favourable round.
        most: the most favourable round.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    least: float
    most: float
    rounds: int

    @property
    def uncertainty_percent(self) -> float:
        """How far the interval reaches from the median, in percent of it."""
        return 100 * max(self.high / self.median - 1, 1 - self.low / self.median)

    def is_within(self, percent: float) -> bool:
        """Return whether the rounds suffice for an interval, and it reaches no further."""
        return self.rounds >= LEAST_ROUNDS and self.uncertainty_percent <= percent


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that ``share`` (0 to 1) of all values do not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.99)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    index = -int(-share * len(ordered) // 1) - 1  # ceil, counted from 0
    return ordered[max(0, min(index, len(ordered) - 1))]


def latency_of(milliseconds: Sequence[float]) -> Latency:
    """Return the figures of one or more calls."""
    mean = statistics.fmean(milliseconds)
    return Latency(
        calls=len(milliseconds),
        p50_ms=statistics.median(milliseconds),
        p90_ms=percentile(milliseconds, 0.90),
        p99_ms=percentile(milliseconds, 0.99),
        mean_ms=mean,
        min_ms=min(milliseconds),
        cv_percent=100 * statistics.pstdev(milliseconds) / mean if mean else 0.0,
    )


def ratio_of(rounds: Sequence[float]) -> Ratio | None:
    """Return the median of each round's ratio, and its 95 % interval; None without a round.

    The interval is the one of order statistics, which assumes nothing of how
    the rounds are distributed; fewer than six have none, and get all they span.

    >>> ratio_of([2.0, 3.0, 2.0])
    Ratio(median=2.0, low=2.0, high=3.0, least=2.0, most=3.0, rounds=3)
    """
    if not rounds:
        return None
    ordered = sorted(rounds)
    cut = _cut(len(ordered))
    return Ratio(
        median=statistics.median(ordered),
        low=ordered[cut],
        high=ordered[-1 - cut],
        least=ordered[0],
        most=ordered[-1],
        rounds=len(ordered),
    )


def _cut(count: int) -> int:
    """Return how many values to leave out at either end for 95 % around the median.

    >>> [_cut(n) for n in (5, 6, 8, 9, 20, 30)]
    [0, 0, 0, 1, 5, 9]
    """
    tail = cut = 0
    while True:
        tail += math.comb(count, cut)  # so many of 2^count ways leave at most `cut` below
        if 2 * tail > 0.05 * 2**count:
            return max(0, cut - 1)
        cut += 1
