"""What can be said about accuracy from a finite number of images.

Shares and differences come with 95 % intervals; two answers to the same images
are compared as pairs, not as two independent samples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from van_deploy.intervals import CONFIDENCE, mcnemar_exact, tango_interval, wilson_interval

__all__ = [
    "CONFIDENCE",
    "ECE_BINS",
    "bootstrap",
    "expected_calibration_error",
    "mcnemar_exact",
    "tango_interval",
    "wilson_interval",
]

ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al., "On Calibration of Modern
Neural Networks", ICML 2017."""

Array = npt.NDArray[np.float64]


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
