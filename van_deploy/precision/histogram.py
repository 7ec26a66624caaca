"""How often every magnitude occurred, in memory that does not grow with the data.

A bin is the sign, the exponent and the first :data:`MANTISSA_BITS` mantissa bits
of a float32: bins are equally wide in proportion (0.1 to 0.2 %), every range fits
without being known beforehand, and nothing is ever binned again. Filling one is
a shift and a count, so every value of every image is counted, never a sample.

PyTorch does the counting: its ``bincount`` takes 32-bit indices, NumPy's only 64-bit
ones, which takes twice as long a value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "BINS",
    "LARGEST_EXPONENT",
    "MANTISSA_BITS",
    "SMALLEST_EXPONENT",
    "Histogram",
    "bin_centres",
    "bin_edges",
    "leading_bits",
]

MANTISSA_BITS = 9
SMALLEST_EXPONENT = -26
"""Magnitudes below 2^-26, which FP16 rounds to zero, share one bin."""

LARGEST_EXPONENT = 40
"""Magnitudes from 2^40 on share the last bin; the exact extremes are kept beside the bins."""

BINS = (LARGEST_EXPONENT - SMALLEST_EXPONENT) << MANTISSA_BITS
"""Bins of one sign, 33792; with counts of 8 bytes both signs take half a MiB."""

_SHIFT = 23 - MANTISSA_BITS
_FIRST = (SMALLEST_EXPONENT + 127) << MANTISSA_BITS  # 127: the exponent's bias in a float32
_SIGN = 1 << (8 + MANTISSA_BITS)
_CHUNK = 1 << 20  # values counted at a time: four for every possible bin

Counts = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


@functools.cache
def bin_edges() -> npt.NDArray[np.float64]:
    """Return the ``BINS + 1`` magnitudes between which the bins lie, in rising order."""
    index = np.arange(BINS + 1) + _FIRST
    edges = np.ldexp(1.0 + _fraction(index), _exponent(index)).astype(np.float64)
    edges.setflags(write=False)
    return edges


@functools.cache
def bin_centres() -> npt.NDArray[np.float64]:
    """Return the magnitude in the middle of each bin, ``(BINS,)``."""
    edges = bin_edges()
    centres = np.asarray((edges[:-1] + edges[1:]) / 2)
    centres.setflags(write=False)
    return centres


def leading_bits(flat: Values, out: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return sign, exponent and first mantissa bits of ``flat (N,)``, written to ``out (N,)``."""
    return np.right_shift(flat.view(np.uint32), _SHIFT, out=out)


@dataclass
class Histogram:
    """Counts of float32 values by sign and magnitude, and their exact extremes.

    Attributes:
        positive: ``(BINS,)`` counts of positive values.
        negative: ``(BINS,)`` counts of negative values, by magnitude.
        tiny: values of magnitude below ``2 ** SMALLEST_EXPONENT``, zeros included.
        zeros: those of them that are zero (or below 2^-126, as good as).
        minimum: smallest value.
        maximum: largest value.
    """

    positive: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    negative: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    tiny: int = 0
    zeros: int = 0
    minimum: float = np.inf
    maximum: float = -np.inf

    @property
    def count(self) -> int:
        """How many values were counted."""
        return self.tiny + int(self.positive.sum()) + int(self.negative.sum())

    @property
    def largest(self) -> float:
        """The largest magnitude, exactly; 0 where nothing was counted."""
        return max(self.maximum, -self.minimum, 0.0)

    @property
    def magnitudes(self) -> Counts:
        """Counts of both signs, ``(BINS,)``."""
        return self.positive + self.negative

    def add_(self, values: Values) -> None:
        """Count every one of ``values``, an array of any shape without NaN."""
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if flat.size:
            self.minimum = min(self.minimum, float(flat.min()))
            self.maximum = max(self.maximum, float(flat.max()))
            self.count_(leading_bits(flat, np.empty(flat.size, np.uint32)))

    def count_(self, bins: npt.NDArray[np.uint32]) -> None:
        """Count values of which ``bins (N,)`` are the :func:`leading_bits`.

        Their extremes are the caller's to enter.
        """
        for start in range(0, bins.size, _CHUNK):
            piece = bins[start : start + _CHUNK]
            counts = torch.bincount(torch.from_numpy(piece.view(np.int32))).numpy()
            kept = self._add_counts_(counts[:_SIGN], self.positive)
            kept += self._add_counts_(counts[_SIGN:], self.negative)
            self.tiny += piece.size - kept

    def _add_counts_(self, counts: Counts, target: Counts) -> int:
        """Take in how often each bin of one sign occurred; return how many are not tiny."""
        last = _FIRST + BINS
        self.zeros += int(counts[:1].sum())
        kept = counts[_FIRST:last]
        beyond = int(counts[last:].sum())
        target[: kept.size] += kept
        target[-1] += beyond
        return int(kept.sum()) + beyond

    def merged(self, other: Histogram) -> Histogram:
        """Return the histogram of both sets of values."""
        return Histogram(
            positive=self.positive + other.positive,
            negative=self.negative + other.negative,
            tiny=self.tiny + other.tiny,
            zeros=self.zeros + other.zeros,
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
        )

    def magnitude_at(self, share: float) -> float:
        """Return the magnitude that ``share`` (0..1) of all values do not exceed.

        The bin's upper edge, so that it errs on the covering side, but never
        more than :attr:`largest`.
        """
        rising = self.tiny + np.cumsum(self.magnitudes)
        if not rising[-1] or share * rising[-1] <= self.tiny:
            return 0.0
        index = int(np.searchsorted(rising, share * rising[-1]))
        return min(float(bin_edges()[index + 1]), self.largest)

    def below(self, magnitude: float) -> int:
        """Return how many values have a magnitude below ``magnitude``, zeros included.

        Exact where ``magnitude`` is the edge of a bin, as every power of two is;
        else the bin it lies in is left out.
        """
        whole = int(np.searchsorted(bin_edges(), magnitude, side="right")) - 1
        return self.tiny + int(self.magnitudes[: max(whole, 0)].sum())

    @property
    def smallest(self) -> float:
        """The smallest magnitude that is not zero, to a bin's width; ``inf`` if there is none."""
        if self.tiny > self.zeros:
            return float(bin_edges()[0])
        filled = np.flatnonzero(self.magnitudes)
        return float(bin_edges()[filled[0]]) if filled.size else np.inf

    def share_below(self, magnitude: float) -> float:
        """Return which share of the values has a magnitude below ``magnitude``, zeros included."""
        return self.below(magnitude) / max(self.count, 1)


def _fraction(index: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.asarray((index & ((1 << MANTISSA_BITS) - 1)) / float(1 << MANTISSA_BITS))


def _exponent(index: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.asarray((index >> MANTISSA_BITS) - 127)
