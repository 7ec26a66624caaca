"""Confidence intervals of shares, paired differences and medians. Pure functions.

Shares are 0 to 1. Two networks on the same images are compared as pairs, not as independent
samples.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]

CONFIDENCE = 0.95
"""Confidence level of all intervals."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)

_BISECTIONS = 60  # from a width of 2 to below 1e-17


def wilson_interval(hits: int, total: int) -> Interval:
    """Return Wilson's score interval of the share ``hits / total``.

    Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22, 1927. Without images: (0, 1).

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    if total == 0:
        return 0.0, 1.0
    share, weight = hits / total, _Z * _Z / total
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = max(0.0, centre - half) if hits else 0.0  # exactly: rounding leaves 1e-18
    high = min(1.0, centre + half) if hits < total else 1.0
    return low, high


def tango_interval(lost: float, won: float, total: float) -> Interval:
    """Return Tango's score interval of ``(lost - won) / total``, a difference of paired shares.

    Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998: the differences that the score test
    (:func:`tango_score`) does not reject. Unlike Wald's interval, it keeps its coverage if few or
    no pairs differ. Without images: (-1, 1).

    Args:
        lost: pairs in which only the first is correct.
        won: pairs in which only the second is correct.
        total: number of pairs.

    >>> low, high = tango_interval(9, 3, 32)  # the example in section 6.2
    >>> round(low, 3), round(high, 3)
    (-0.027, 0.39)
    """
    if not total:
        return -1.0, 1.0
    estimate = (lost - won) / total
    # The score falls as the difference rises: it is above z below the interval, under -z above it.
    low = _bisect(lambda end: tango_score(lost, won, total, end) - _Z, -1.0, estimate)
    high = _bisect(lambda end: tango_score(lost, won, total, end) + _Z, estimate, 1.0)
    return low, high


def tango_score(lost: float, won: float, total: float, difference: float) -> float:
    """Return Tango's score statistic for the hypothesis that the shares differ by ``difference``.

    With ``difference`` 0 it is McNemar's ``(lost - won) / sqrt(lost + won)``. The standard error
    is that of the maximum-likelihood shares under the hypothesis.
    """
    excess = lost - won - total * difference
    b = (2 * total - lost + won) * difference - lost - won
    root = math.sqrt(max(b * b + 8 * total * won * difference * (1 - difference), 0.0))
    nuisance = (root - b) / (4 * total)  # constrained share of the won pairs
    variance = total * (2 * nuisance + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def _bisect(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Return the root of a decreasing function between ``low`` and ``high`` by bisection."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2


def mcnemar_exact(lost: int, won: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Under the null hypothesis each image that only one of two networks classifies correctly is
    equally likely to be ``lost`` or ``won``.

    >>> mcnemar_exact(0, 0), mcnemar_exact(6, 0)
    (1.0, 0.03125)
    """
    flips = lost + won
    tail = sum(math.comb(flips, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**flips)


def median_interval(values: Sequence[float]) -> Interval:
    """Return the distribution-free interval of a median, between two of the ``values``.

    The ranks are those of the sign test (Conover, "Practical Nonparametric Statistics", 3.2);
    with fewer than 6 values the interval is all of them.
    """
    ordered, count = sorted(values), len(values)
    rank, ways, below = 0, 1, 0
    # ways: of rank values below the median. Divided as integers: 2**1024 is no float.
    while (below + ways) / 2**count <= (1 - CONFIDENCE) / 2:
        below += ways
        ways = ways * (count - rank) // (rank + 1)
        rank += 1
    first = max(rank - 1, 0)
    return ordered[first], ordered[count - 1 - first]


def unseen_share(total: int) -> float:
    """Return the largest share of a kind of images that none of ``total`` images shows.

    It is the upper end of Wilson's and of Tango's interval for 0 of ``total``.
    """
    return wilson_interval(0, total)[1]


def bootstrap_interval(
    statistic: Callable[[npt.NDArray[np.int64]], float], rows: int, unit: float = 1.0
) -> Interval:
    """Return the percentile interval of a statistic over 1,000 resamples of images.

    Resamples only have what the images show, and with few images they may all be equal. So the
    interval extends by :func:`unseen_share` of ``unit`` or more to both sides of the statistic.

    Args:
        statistic: function of the indices ``(rows,)`` of one resample.
        rows: number of images.
        unit: the statistic's change if all images change.
    """
    rng, value = np.random.default_rng(0), statistic(np.arange(rows))
    values = [statistic(rng.integers(0, rows, rows)) for _ in range(1000)]
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    unseen = unit * unseen_share(rows)
    return min(float(low), value - unseen), max(float(high), value + unseen)
