"""What one tensor's values were on every image: extremes, small magnitudes, a histogram."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from van_deploy.precision.histogram import Histogram, leading_bits

__all__ = ["FP16_SMALLEST", "FP16_SMALLEST_NORMAL", "TensorRange"]

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_SMALLEST = 2.0**-25  # rounds to the smallest FP16 number; below it, to zero

Extremes = npt.NDArray[np.float32]
Bins = npt.NDArray[np.uint32]
_FEW = 1 << 18  # values looked at together: 1 MiB, few enough for a cache
_ROW = 1 << 11  # of which so many have one smallest magnitude


@dataclass
class TensorRange:
    """What one tensor's values were, over every image.

    Attributes:
        minimum: smallest value.
        maximum: largest value.
        images: how many images were seen.
        mean_minimum: mean over the images of each one's smallest value.
        mean_maximum: mean over the images of each one's largest value.
        smallest: smallest magnitude that is not zero; ``inf`` if all are.
        channels: whether each channel's extremes are recorded as well.
        channel_minimum: ``(C,)`` smallest value along the second axis, for those tensors.
        channel_maximum: ``(C,)`` likewise the largest.
        count: how many values.
        subnormal: how many non-zero values are below FP16's normal numbers (6.1e-5).
        vanishing: how many non-zero values FP16 rounds to zero. With a histogram, these
            three are known once :meth:`close_` was called.
        histogram: of all values, for the tensors it was asked for.
    """

    minimum: float = np.inf
    maximum: float = -np.inf
    images: int = 0
    mean_minimum: float = 0.0
    mean_maximum: float = 0.0
    smallest: float = np.inf
    channels: bool = False
    channel_minimum: Extremes = field(default_factory=lambda: np.array(np.inf, np.float32))
    channel_maximum: Extremes = field(default_factory=lambda: np.array(-np.inf, np.float32))
    count: int = 0
    subnormal: int = 0
    vanishing: int = 0
    histogram: Histogram | None = None

    @property
    def largest(self) -> float:
        """The largest magnitude; 0 where nothing was seen."""
        return max(self.maximum, -self.minimum, 0.0)

    def add_(self, values: npt.NDArray[np.float32], bins: Bins | None = None) -> bool:
        """Take in one batch ``(N, ...)``; return whether all of it was finite.

        Args:
            values: C-contiguous.
            bins: memory for as many indices as there are values, to be written over.
        """
        parts = values.reshape(len(values) * _parts(values[0].size), -1)
        low, high = np.empty(len(parts), np.float32), np.empty(len(parts), np.float32)
        if self.histogram is not None:
            bins = np.empty(values.size, np.uint32) if bins is None else bins[: values.size]
        step = max(1, _FEW // parts.shape[1])
        for start in range(0, len(parts), step):  # every value leaves the memory once
            some = parts[start : start + step]
            low[start : start + step] = some.min(axis=1)
            high[start : start + step] = some.max(axis=1)
            flat = some.reshape(-1)
            if self.histogram is None or bins is None:
                self._add_small_(flat)
            else:
                at = start * parts.shape[1]
                leading_bits(flat, bins[at : at + flat.size])
        if not (np.isfinite(low).all() and np.isfinite(high).all()):  # NaN is passed on by both
            return False
        self._add_extremes_(values, low, high)
        if self.histogram is not None and bins is not None:
            self.histogram.count_(bins)
        return True

    def _add_extremes_(
        self, values: npt.NDArray[np.float32], low: Extremes, high: Extremes
    ) -> None:
        """Take in the extremes of equally many parts of each image."""
        lows, highs = low.reshape(len(values), -1), high.reshape(len(values), -1)
        self.minimum = min(self.minimum, float(low.min()))
        self.maximum = max(self.maximum, float(high.max()))
        before, self.images = self.images, self.images + len(values)
        lowest, highest = float(lows.min(axis=1).sum()), float(highs.max(axis=1).sum())
        self.mean_minimum = (self.mean_minimum * before + lowest) / self.images
        self.mean_maximum = (self.mean_maximum * before + highest) / self.images
        self.count += values.size
        if self.histogram is not None:
            self.histogram.minimum, self.histogram.maximum = self.minimum, self.maximum
        if self.channels:
            flat = values.reshape(len(values), values.shape[1], -1)  # (N, C, rest)
            self.channel_minimum = np.minimum(self.channel_minimum, flat.min(axis=(0, 2)))
            self.channel_maximum = np.maximum(self.channel_maximum, flat.max(axis=(0, 2)))

    def _add_small_(self, flat: npt.NDArray[np.float32]) -> None:
        """Count the small magnitudes of a tensor without a histogram."""
        magnitude = np.abs(flat)
        whole = flat.size - flat.size % _ROW
        rows, tail = magnitude[:whole].reshape(-1, _ROW), magnitude[whole:]
        lows = rows.min(axis=1)
        least = min(float(lows.min(initial=np.inf)), float(tail.min(initial=np.inf)))
        if least < FP16_SMALLEST_NORMAL:  # most rows hold nothing so small, and are done with
            few = np.concatenate([rows[lows < FP16_SMALLEST_NORMAL].reshape(-1), tail])
            small = few[(few < FP16_SMALLEST_NORMAL) & (few > 0)]
            self.subnormal += small.size
            self.vanishing += int(np.count_nonzero(small <= FP16_SMALLEST))
            rest = small if small.size else magnitude[magnitude > 0]
            least = float(rest.min(initial=np.inf))
        self.smallest = min(self.smallest, least)

    def merged(self, other: TensorRange) -> TensorRange:
        """Return the range of both sets of images."""
        images = max(self.images + other.images, 1)
        ours, theirs = self.images / images, other.images / images
        histogram = self.histogram
        if histogram is not None and other.histogram is not None:
            histogram = histogram.merged(other.histogram)
        return TensorRange(
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
            images=self.images + other.images,
            mean_minimum=self.mean_minimum * ours + other.mean_minimum * theirs,
            mean_maximum=self.mean_maximum * ours + other.mean_maximum * theirs,
            smallest=min(self.smallest, other.smallest),
            channels=self.channels,
            channel_minimum=np.minimum(self.channel_minimum, other.channel_minimum),
            channel_maximum=np.maximum(self.channel_maximum, other.channel_maximum),
            count=self.count + other.count,
            subnormal=self.subnormal + other.subnormal,
            vanishing=self.vanishing + other.vanishing,
            histogram=histogram,
        )

    def close_(self) -> None:
        """Take the counts of small magnitudes from the histogram, whose bins end at them."""
        histogram = self.histogram
        if histogram is None:
            return
        self.subnormal = histogram.below(FP16_SMALLEST_NORMAL) - histogram.zeros
        self.vanishing = histogram.below(FP16_SMALLEST) - histogram.zeros
        self.smallest = histogram.smallest


def _parts(size: int) -> int:
    """Return into how many equal parts ``size`` values fall that are at most :data:`_FEW`."""
    least = -(-size // _FEW)
    return next((n for n in range(max(least, 1), 2 * least + 8) if size % n == 0), 1)
