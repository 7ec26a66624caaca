"""From a tensor's histogram to the scale of its 8-bit integers. Pure functions.

==============  =================================================================
``minmax``      the largest magnitude is just representable: nothing is clipped
``percentile``  the magnitude that 99.999 % of all values do not exceed
``mse``         the least squared error over the whole histogram, clipping included
==============  =================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from van_deploy.precision.observers import ChannelRange, bin_values

DEFAULT_PERCENTILE = 99.999
"""ONNX Runtime's default."""

INT8_LIMIT = 127
"""Symmetric: -128 is not used, so that a value and its opposite are both there."""

UNSIGNED_ZERO = 128
"""Zero-point of an unsigned tensor with a scale for every channel."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal FP16 number, 6.1e-5. A smaller scale would be denormal or zero as FP16,
and TensorRT refuses zero."""

FP16_LARGEST = 65504.0

PAIR_LIMIT = 128
"""Largest magnitude of the sum of two weights that are multiplied side by side: x86 processors
without VNNI add two products of uint8 and int8 in 16 bits (``vpmaddubsw``), where 255 times
more does not fit and is cut off (ONNX Runtime's page on quantisation, "When and why do I
need to try U8U8?")."""

SMALLEST_FP32_SCALE = 2.0**-60
"""A smaller scale, times that of the activations, could be denormal as float32."""

LARGEST_BIAS = 2.0**30  # of an int32, with a factor of two to spare for the sum it joins

_GRID = 24  # clips tried first, then as many around the best
_SMALLEST_CLIP = 1 / 64  # of the largest magnitude, where the search starts

Floats = npt.NDArray[np.floating]


Method = Literal["minmax", "percentile", "mse"]
"""How a scale is read from a histogram."""


@dataclass(frozen=True)
class ChannelAffine:
    """An exact change of a tensor by channel: ``x' = (x - shift) / factor``.

    Attributes:
        shift: ``(C,)`` float64.
        factor: ``(C,)`` float64, positive.
    """

    shift: Floats
    factor: Floats

    def of(self, values: Floats) -> Floats:
        """Return ``values (..., C)`` after the change."""
        return np.asarray((values - self.shift) / self.factor)

    def multiply_add(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the change as ``x * multiplier + offset``, ``(C,)`` float32 each."""
        multiplier = (1 / self.factor).astype(np.float32)
        return multiplier, (-self.shift / self.factor).astype(np.float32)


UNCHANGED = ChannelAffine(np.zeros(1), np.ones(1))


@dataclass(frozen=True)
class Quantizer:
    """8-bit integers ``clip(round(x / scale) + zero_point)`` and what they stand for.

    Attributes:
        scale: positive; one number, or ``(C,)``.
        zero_point: the integer that stands for 0.
        signed: -128..127, else 0..255.
    """

    scale: Floats
    zero_point: int = 0
    signed: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer, without the zero-point."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return low - self.zero_point, high - self.zero_point


def storable_scales(scales: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Return positive ``scales`` as float32 numbers that FP16 holds exactly.

    Each is rounded up, so that what a scale covered is still covered, and is at
    least :data:`SMALLEST_SCALE`. Integers rounded with these scales mean the same
    in a file whose scales are FP16.

    >>> storable_scales([0.0, 0.1]).tolist()
    [6.103515625e-05, 0.10003662109375]
    """
    wanted = np.clip(np.asarray(scales, np.float64), SMALLEST_SCALE, FP16_LARGEST)
    half = wanted.astype(np.float16)
    short = half.astype(np.float64) < wanted
    up = np.nextafter(half, np.where(short, np.float16(np.inf), half))
    return np.asarray(up, dtype=np.float32)


def weight_scales(weight: Floats) -> npt.NDArray[np.float32]:
    """Return each output channel's scale ``(O,)``: its largest magnitude over 127, storable."""
    return storable_scales(np.abs(weight.reshape(len(weight), -1)).max(axis=1) / INT8_LIMIT)


def pair_sums(weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return each output channel's largest ``|w + v|`` of two neighbouring weights, ``(O,)``.

    Neighbours in the order in which ONNX Runtime multiplies them: kernel row, kernel column,
    input channel. A depth-wise convolution has none: it adds in 32 bits.

    >>> pair_sums(np.array([[3.0, 4.0, -5.0, 1.0]]).reshape(1, 4, 1, 1))
    array([7.])
    """
    if weight.ndim != 4 or weight.shape[1] == 1:
        return np.zeros(len(weight))
    rows = weight.astype(np.float64).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return np.asarray(np.abs(rows[:, ::2] + rows[:, 1::2]).max(axis=1))


def cpu_weight_scales(
    weight: Floats, bias: Floats, activation_scale: Floats
) -> npt.NDArray[np.float32]:
    """Return each output channel's scale ``(O,)``, wide enough for ONNX Runtime's kernels.

    No two products overflow (:data:`PAIR_LIMIT`; rounding lengthens a sum by one at most),
    and the bias fits into 32 bits. Nothing is FP16 there: nearly dead channels keep their scale.
    """
    for_bias = np.abs(bias) / (float(activation_scale) * LARGEST_BIAS)
    finest = np.abs(weight.reshape(len(weight), -1)).max(axis=1) / INT8_LIMIT
    least = np.maximum(pair_sums(weight) / (PAIR_LIMIT - 1), for_bias)
    return np.maximum(np.maximum(finest, least), SMALLEST_FP32_SCALE).astype(np.float32)


def rounded(weight: Floats, scales: Floats) -> npt.NDArray[np.int8]:
    """Return ``weight (O, ...)`` in integers of ``scales (O,)``, rounded to nearest."""
    integers = np.rint(weight / scales.reshape(-1, *(1,) * (weight.ndim - 1)))
    return np.clip(integers, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)


# --- activations ---------------------------------------------------------------------------


def symmetric(
    record: ChannelRange,
    method: Method,
    percentile: float = DEFAULT_PERCENTILE,
    affine: ChannelAffine = UNCHANGED,
) -> Quantizer:
    """Return signed integers with zero-point 0, whose scale FP16 holds.

    Args:
        record: of the tensor, counted.
        method: how the scale is read.
        percentile: for that method, in percent.
        affine: what the tensor goes through between ``record`` and the rounding.
    """
    low, high = _ends(record, method, percentile, affine)
    largest = max(high, -low)
    if method == "mse" and largest > 0:
        sums = _BinSums(record, affine)
        largest = _least(lambda clip: sums.error(clip / INT8_LIMIT, -clip, clip), largest)
    return Quantizer(storable_scales(largest / INT8_LIMIT))


def unsigned(
    record: ChannelRange,
    method: Method,
    percentile: float = DEFAULT_PERCENTILE,
    affine: ChannelAffine = UNCHANGED,
    lowest: float = -np.inf,
) -> Quantizer:
    """Return unsigned integers with a zero-point, for a tensor whose two sides differ.

    Zero is always exactly representable. ``mse`` clips the two sides where the squared
    error is least, one side at a time.

    Args:
        record: of the tensor, counted.
        method: how the scale is read.
        percentile: for that method, in percent.
        affine: what the tensor goes through between ``record`` and the rounding.
        lowest: no integers are spent below this.
    """
    low, high = _ends(record, method, percentile, affine)
    low = max(low, lowest)
    if method == "mse" and low < high:
        sums = _BinSums(record, affine)

        def error(low: float, high: float) -> float:
            found = _between(low, high)
            first, last = (limit * float(found.scale) for limit in found.limits)
            return sums.error(float(found.scale), first, last)

        least, most = low, high
        for _ in range(2):
            high = _least(functools.partial(error, low), most)
            low = -_least(lambda clip, high=high: error(-clip, high), -least)  # type: ignore[misc]
    return _between(low, high)


def by_channel(record: ChannelRange, affine: ChannelAffine = UNCHANGED) -> Quantizer:
    """Return unsigned integers with a scale for every channel, which clip nothing."""
    ends = np.abs([affine.of(record.minimum), affine.of(record.maximum)])
    scale = ends.max(axis=0) / (255 - UNSIGNED_ZERO)
    return Quantizer(np.clip(scale, SMALLEST_SCALE, FP16_LARGEST), UNSIGNED_ZERO, signed=False)


def percentile_range(record: ChannelRange, percentile: float) -> tuple[Floats, Floats]:
    """Return the ends of each channel, ``(C,)`` both, that so many percent of it stay within.

    At each end at most the rest is cut off, by whole bins.
    """
    low, high = _within(bin_values()[None], record.counts, percentile)
    return np.maximum(low, record.minimum), np.minimum(high, record.maximum)


def _within(
    values: Floats, counts: npt.NDArray[np.uint32], percentile: float
) -> tuple[Floats, Floats]:
    """Return the first and the last of rising ``values`` in each row that are not cut off."""
    rising = np.cumsum(counts, axis=1, dtype=np.float64)
    cut = (1 - percentile / 100) * rising[:, -1:]
    first, last = (rising > cut).argmax(axis=1), (rising >= rising[:, -1:] - cut).argmax(axis=1)
    return values[..., first].reshape(-1), values[..., last].reshape(-1)


def _ends(
    record: ChannelRange, method: Method, percentile: float, affine: ChannelAffine
) -> tuple[float, float]:
    """Return the ends of a whole tensor, zero between them; not yet where ``mse`` clips."""
    low, high = affine.of(record.minimum).min(), affine.of(record.maximum).max()
    if method == "percentile":
        counts = record.counts
        values = np.broadcast_to(affine.of(bin_values()[:, None]).T, counts.shape)
        order = np.argsort(values, axis=None)
        found = _within(values.flat[order][None], counts.flat[order][None], percentile)
        low, high = max(low, found[0][0]), min(high, found[1][0])
    return min(float(low), 0.0), max(float(high), 0.0)


def _between(low: float, high: float) -> Quantizer:
    """Return the unsigned integers that cover both ends and zero."""
    scale = min(max((high - low) / 255, SMALLEST_SCALE), FP16_LARGEST)
    return Quantizer(np.array(scale), int(np.clip(round(-low / scale), 0, 255)), signed=False)


class _BinSums:
    """Sums over the smallest values of each channel, from which any scale's error follows.

    An error of rounding is taken as evenly spread, ``scale^2 / 12``, except where all values
    round to zero, and where they are clipped: so a scale is judged without rounding anything.
    """

    def __init__(self, record: ChannelRange, affine: ChannelAffine) -> None:
        counts = record.counts
        if affine is UNCHANGED:  # all channels alike
            counts = counts.sum(axis=0, keepdims=True, dtype=np.uint64)
        used = np.flatnonzero(counts.any(axis=0))
        values = bin_values()[used]
        powers = counts[:, used] * np.stack([values**power for power in range(3)])[:, None, :]
        none = np.zeros((3, len(counts), 1))
        self.values = values
        self.sums = np.concatenate([none, np.cumsum(powers, axis=2)], axis=2)  # (3, C, B + 1)
        self.affine = affine
        self.every = np.arange(len(counts))

    def error(self, scale: float, low: float, high: float) -> float:
        """Return the squared error of ``x'`` with integers that reach from low to high."""
        fine = scale / np.sqrt(12)
        rest = np.inf
        ends = [-rest, low, max(-fine, low), min(fine, high), high, rest]
        shift, factor = self.affine.shift, self.affine.factor
        places = np.searchsorted(self.values, np.multiply.outer(ends, factor) + shift)
        parts = np.diff(self.sums[:, self.every, places], axis=1)  # (3, 5, C)

        def squares(part: int, about: float) -> Floats:  # of x' - about
            zeroth, first, second = parts[:, part]
            point = about * factor + shift
            return np.asarray((second - 2 * point * first + point**2 * zeroth) / factor**2)

        spread = (parts[0, 1] + parts[0, 3]) * fine**2
        return float((squares(0, low) + spread + squares(2, 0.0) + squares(4, high)).sum())


def _least(error: Callable[[float], float], largest: float) -> float:
    """Return the clip up to ``largest`` with the least error: a coarse grid, then a fine one."""
    if largest <= 0:
        return 0.0
    grid = np.geomspace(largest * _SMALLEST_CLIP, largest, _GRID)
    best = int(np.argmin([error(float(clip)) for clip in grid]))
    around = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)], _GRID)
    return float(around[int(np.argmin([error(float(clip)) for clip in around]))])
