"""From latencies to figures. Pure functions; times are in milliseconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CV_LIMIT_PERCENT", "Latency", "Ratio", "latency_of", "paired_ratio", "percentile"]

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
        low: the least favourable round.
        high: the most favourable round.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    rounds: int


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


def paired_ratio(reference: Sequence[float], own: Sequence[float]) -> Ratio | None:
    """Return how many times faster ``own`` is, from each round's median of both.

    Dividing within a round cancels what slows the whole machine for a while,
    which dividing two overall medians does not. None without a common round.

    >>> paired_ratio([10.0, 20.0, 12.0], [5.0, 10.0, 4.0])
    Ratio(median=2.0, low=2.0, high=3.0, rounds=3)
    """
    ratios = [slow / fast for slow, fast in zip(reference, own, strict=False)]
    if not ratios:
        return None
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))
