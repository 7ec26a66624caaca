"""From a tensor's recorded range to the step of its integers. Pure functions.

=============  ==================================================================
``minmax``     the largest magnitude is just representable: nothing is clipped
``average``    the mean over the images of each one's largest magnitude
``percentile`` the magnitude that 99.999 % of all values do not exceed
``mse``        the least squared error over the whole histogram, clipping included
``entropy``    the least KL divergence between the histogram and its 8-bit version,
               as TensorRT's and ONNX Runtime's calibrators define it
=============  ==================================================================
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from van_deploy.precision.histogram import Histogram, bin_centres, bin_edges
from van_deploy.precision.plan import FP16_LARGEST, INT8_LIMIT, SMALLEST_SCALE, storable_scales
from van_deploy.precision.tensor_range import TensorRange

__all__ = [
    "DEFAULT_PERCENTILE",
    "UINT8_LIMIT",
    "AffineScale",
    "Method",
    "affine_between",
    "affine_scale",
    "clip_magnitude",
    "symmetric_scale",
]

DEFAULT_PERCENTILE = 0.99999
"""ONNX Runtime's default, 99.999 %."""

UINT8_LIMIT = 255
"""Unsigned: 0..255, with a zero-point."""
_CANDIDATES = 64
_SMALLEST_CLIP = 1 / 128  # of the largest magnitude, where the search for a clip starts

Floats = npt.NDArray[np.float64]
_Error = Callable[[float], float]


class Method(str, enum.Enum):
    """How a scale is read from a range."""

    MINMAX = "minmax"
    AVERAGE = "average"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True)
class AffineScale:
    """The step and the zero-point of an unsigned 8-bit tensor.

    Attributes:
        scale: step, positive.
        zero_point: the integer that stands for 0, in 0..255.
    """

    scale: float
    zero_point: int


def symmetric_scale(
    record: TensorRange,
    method: Method,
    *,
    percentile: float = DEFAULT_PERCENTILE,
) -> float:
    """Return the step of symmetric int8: integers -127..127, zero-point 0.

    It is positive, finite, and a number that FP16 holds.
    """
    clip = clip_magnitude(record, method, percentile)
    return float(storable_scales(clip / INT8_LIMIT))


def clip_magnitude(
    record: TensorRange, method: Method, percentile: float = DEFAULT_PERCENTILE
) -> float:
    """Return the magnitude from which values are clipped; 0 for a tensor of zeros."""
    if method is Method.AVERAGE:
        return max(record.mean_maximum, -record.mean_minimum, 0.0)
    if method is Method.MINMAX or record.histogram is None:
        return record.largest
    if method is Method.PERCENTILE:
        return record.histogram.magnitude_at(percentile)
    if method is Method.ENTROPY:
        return _entropy_clip(record.histogram)
    return _mse_clip(record.histogram)


def affine_scale(
    record: TensorRange,
    method: Method,
    *,
    percentile: float = DEFAULT_PERCENTILE,
    floor: float = SMALLEST_SCALE,
) -> AffineScale:
    """Return the step and zero-point of uint8, for a tensor whose two sides differ.

    Zero is always exactly representable. ``mse`` clips the two sides where the
    squared error is least; the other methods clip both at the symmetric
    magnitude, or at the tensor's own end where that is nearer.
    """
    if method is Method.MSE and record.histogram is not None:
        low, high = _affine_mse_clip(record.histogram)
    elif method is Method.AVERAGE:
        low, high = record.mean_minimum, record.mean_maximum
    else:
        clip = clip_magnitude(record, method, percentile)
        low, high = max(record.minimum, -clip), min(record.maximum, clip)
    return affine_between(low, high, floor)


def affine_between(low: float, high: float, floor: float = SMALLEST_SCALE) -> AffineScale:
    """Return the step, at least ``floor``, and the zero-point that cover both ends and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = min(max((high - low) / UINT8_LIMIT, floor), FP16_LARGEST)
    return AffineScale(scale, int(np.clip(round(-low / scale), 0, UINT8_LIMIT)))


# --- least squared error -------------------------------------------------------------------


class _Side:
    """The squared error of the values on one side of zero, for any step.

    What rounds to zero and what is clipped are sums over bins prepared once; only
    the bins between are rounded for each step.
    """

    def __init__(self, counts: npt.NDArray[np.int64], largest: float) -> None:
        index = np.flatnonzero(counts)
        self.values = np.minimum(bin_centres()[index], largest)
        self.weights = counts[index].astype(np.float64)
        self.zeroth, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(self.weights * self.values**power)])
            for power in range(3)
        )

    def error(self, step: float, levels: int) -> float:
        """Return the sum of squared errors with the integers 0..``levels``."""
        clip = step * levels
        low, high = np.searchsorted(self.values, (step / 2, clip))
        if low >= high:
            low = high
        between = self.values[low:high]
        rounded = self.weights[low:high] @ np.square(np.rint(between / step) * step - between)
        above = self.second[-1] - self.second[high] - 2 * clip * (self.first[-1] - self.first[high])
        clipped = above + clip**2 * (self.zeroth[-1] - self.zeroth[high])
        return float(self.second[low] + rounded + clipped)


def _mse_clip(histogram: Histogram) -> float:
    """Return the clip with the least squared error: a coarse grid, then a fine one."""
    side = _Side(histogram.magnitudes, histogram.largest)
    if not side.values.size:
        return histogram.largest

    def error(clip: float) -> float:
        return side.error(clip / INT8_LIMIT, INT8_LIMIT)

    return _least(error, histogram.largest * _SMALLEST_CLIP, histogram.largest)


def _affine_mse_clip(histogram: Histogram) -> tuple[float, float]:
    """Return the two clips with the least squared error, improving one side at a time."""
    lowest, highest = min(histogram.minimum, 0.0), max(histogram.maximum, 0.0)
    above, below = _Side(histogram.positive, highest), _Side(histogram.negative, -lowest)
    if lowest == highest or not above.values.size + below.values.size:
        return lowest, highest

    def error(low: float, high: float) -> float:
        chosen = affine_between(low, high, 0.0)
        return above.error(chosen.scale, UINT8_LIMIT - chosen.zero_point) + below.error(
            chosen.scale, chosen.zero_point
        )

    low, high = lowest, highest
    if highest > 0:
        high = _least(partial(error, low), highest * _SMALLEST_CLIP, highest)
    if lowest < 0:
        low = -_least(partial(_flipped, error, high), -lowest * _SMALLEST_CLIP, -lowest)
        if highest > 0:
            high = _least(partial(error, low), highest * _SMALLEST_CLIP, highest)
    return low, high


def _flipped(error: Callable[[float, float], float], high: float, clip: float) -> float:
    return error(-clip, high)


def _least(error: _Error, smallest: float, largest: float) -> float:
    """Return the clip between the two with the least error, to a thousandth."""
    grid = np.geomspace(smallest, largest, _CANDIDATES)
    best = int(np.argmin([error(float(clip)) for clip in grid]))
    around = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 33)
    errors = [error(float(clip)) for clip in around]
    return float(around[int(np.argmin(errors))])


# --- entropy -------------------------------------------------------------------------------

_LINEAR_BINS = 2048  # TensorRT's calibrator uses as many
_LEVELS = INT8_LIMIT + 1


def _entropy_clip(histogram: Histogram) -> float:
    """Return the clip whose 8-bit version diverges least from the histogram."""
    if not histogram.largest:
        return 0.0
    counts = _linear_counts(histogram)
    stops = range(_LEVELS, _LINEAR_BINS + 1, 8)
    divergence = [_divergence(counts, stop) for stop in stops]
    best = list(stops)[int(np.argmin(divergence))]
    return histogram.largest * best / _LINEAR_BINS


def _linear_counts(histogram: Histogram) -> Floats:
    """Return the magnitudes' counts in equal bins up to the largest, shared out in proportion.

    The first bin is left out, as in TensorRT's calibrator: it holds zeros, which
    every scale represents exactly.
    """
    rising = np.concatenate([[0.0], np.cumsum(histogram.magnitudes, dtype=np.float64)])
    edges = np.minimum(bin_edges(), histogram.largest)
    wanted = np.linspace(0.0, histogram.largest, _LINEAR_BINS + 1)
    counts: Floats = np.diff(np.interp(wanted, edges, rising))
    counts[0] = counts[1]
    return counts


def _divergence(counts: Floats, stop: int) -> float:
    """Return KL(P || Q) with ``P`` clipped at bin ``stop`` and ``Q`` its 128 levels."""
    reference = counts[:stop].copy()
    reference[-1] += counts[stop:].sum()
    level = np.arange(stop) * _LEVELS // stop
    filled = counts[:stop] > 0
    totals = np.bincount(level, weights=counts[:stop], minlength=_LEVELS)
    sharers = np.bincount(level, weights=filled.astype(np.float64), minlength=_LEVELS)
    shared = np.divide(totals, sharers, out=np.zeros(_LEVELS), where=sharers > 0)
    quantized = np.where(filled, shared[level], 0.0)
    p, q = reference / reference.sum(), quantized / max(quantized.sum(), 1e-30)
    present = p > 0
    q = np.where(q > 0, q, 1e-12)  # a clipped tail that lands in an empty bin
    value = float((p[present] * np.log(p[present] / q[present])).sum())
    return value if math.isfinite(value) else math.inf
