"""What can be said about accuracy from a finite number of images.

Shares and differences come with 95 % intervals; two answers to the same images
are compared as pairs, not as two independent samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "ECE_BINS",
    "bootstrap",
    "expected_calibration_error",
    "mcnemar_exact",
    "paired_difference_interval",
    "wilson_interval",
]

CONFIDENCE = 0.95
ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al., "On Calibration of Modern
Neural Networks", ICML 2017."""

Interval = tuple[float, float]
Array = npt.NDArray[np.float64]


def wilson_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of the share ``hits / total`` (0 to 1).

    Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22, 1927. Without images nothing is known: (0, 1).

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    if total == 0:
        return 0.0, 1.0
    z = _quantile(confidence)
    share, weight = hits / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_exact(lost: int, won: int) -> float:
    """Return the two-sided p-value that as many were ``lost`` as ``won`` but for chance.

    McNemar's test in its exact form: of the images that only one of two
    networks gets right, each is a fair coin.

    Args:
        lost: images only the reference gets right.
        won: images only the artefact gets right.

    >>> mcnemar_exact(0, 0), mcnemar_exact(6, 0)
    (1.0, 0.03125)
    """
    flips = lost + won
    tail = sum(math.comb(flips, count) for count in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**flips)


def paired_difference_interval(
    lost: int, won: int, total: int, confidence: float = CONFIDENCE
) -> Interval:
    """Return an interval of ``(won - lost) / total``, the change of a share in paired answers.

    Wald's interval after adding half a case to each of the four cells (Agresti
    and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005), which covers well also
    where few or no answers changed. Without images: (-1, 1).

    >>> low, high = paired_difference_interval(10, 4, 1000)
    >>> round(low, 5), round(high, 5)
    (-0.01355, 0.00158)
    """
    if total == 0:
        return -1.0, 1.0
    b, c, n = lost + 0.5, won + 0.5, total + 2
    centre = (c - b) / n
    half = _quantile(confidence) * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def expected_calibration_error(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, bins: int = ECE_BINS
) -> float:
    """Return how far confidence is from being right, 0 to 1: the ECE.

    The mean over images of ``|accuracy - mean confidence|`` of each image's bin.

    Args:
        confidence: ``(N,)`` probability of the first class, 0 to 1.
        correct: ``(N,)`` whether the first class was right.
        bins: equal-width bins ``(k/bins, (k+1)/bins]``.
    """
    scores = np.asarray(confidence, np.float64)
    right = np.asarray(correct, np.float64)
    if not len(scores):
        return 0.0
    index = np.clip(np.ceil(scores * bins).astype(int) - 1, 0, bins - 1)
    surplus = np.bincount(index, weights=scores - right, minlength=bins)
    return float(np.abs(surplus).sum() / len(scores))


def bootstrap(
    rows: int, figure: Callable[[npt.NDArray[np.int64]], float], resamples: int, seed: int = 0
) -> Array:
    """Return ``figure`` of that many resamples of the rows, drawn with replacement.

    Args:
        rows: how many there are.
        figure: takes the indices ``(rows,)`` of one resample.
        resamples: how many to draw.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    return np.array([figure(rng.integers(0, rows, rows)) for _ in range(resamples)])


def _quantile(confidence: float) -> float:
    """Return ``z`` with which a normal variable is inside ``+-z`` that often."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
