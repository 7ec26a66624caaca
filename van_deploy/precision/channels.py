"""Each channel of a tensor by itself: its histogram, and what rounding it would cost.

What a whole tensor's scale needs is in :mod:`van_deploy.precision.ranges`; here
the question is how the channels of one tensor compare. Bins are an eighth of an
octave (9 %) wide, and rounding errors are taken as evenly spread (``step^2 / 12``),
so that a step is judged without rounding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from van_deploy.precision.plan import INT8_LIMIT
from van_deploy.precision.torch_graph import TorchGraph

__all__ = [
    "ChannelHistogram",
    "ChannelMoments",
    "best_steps",
    "channel_histograms",
    "rounding_error",
]

_MANTISSA_BITS = 3
_SMALLEST_EXPONENT = -20
_LARGEST_EXPONENT = 20
_BINS = (_LARGEST_EXPONENT - _SMALLEST_EXPONENT) << _MANTISSA_BITS
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (_SMALLEST_EXPONENT + 127) << _MANTISSA_BITS
_SIGN = 1 << (8 + _MANTISSA_BITS)
_CLIPS = np.geomspace(0.15, 1.0, 16)  # of a channel's largest magnitude

Floats = npt.NDArray[np.float64]


@dataclass
class ChannelHistogram:
    """How often each channel of a tensor took each magnitude, by sign.

    Attributes:
        counts: ``(C, 2 * bins)``: positive magnitudes, then negative ones.
        minimum: ``(C,)`` smallest values.
        maximum: ``(C,)`` largest values.
        total: ``(C,)`` sums of the values.
    """

    counts: npt.NDArray[np.int64]
    minimum: Floats
    maximum: Floats
    total: Floats

    @classmethod
    def empty(cls, channels: int) -> ChannelHistogram:
        """Return the histogram of nothing."""
        return cls(
            np.zeros((channels, 2 * _BINS), np.int64),
            np.full(channels, np.inf),
            np.full(channels, -np.inf),
            np.zeros(channels),
        )

    @property
    def mean(self) -> Floats:
        """Each channel's mean, ``(C,)``."""
        return self.total / np.maximum(self.counts.sum(axis=1), 1)

    def add_(self, values: npt.NDArray[np.float32]) -> None:
        """Count every value of ``values (N, C, H, W)``."""
        for image in values:
            rows = np.ascontiguousarray(image.reshape(len(image), -1), dtype=np.float32)
            self.minimum = np.minimum(self.minimum, rows.min(axis=1))
            self.maximum = np.maximum(self.maximum, rows.max(axis=1))
            self.total += rows.sum(axis=1, dtype=np.float64)
            code = (rows.view(np.uint32) >> _SHIFT).astype(np.int64)
            negative = code >= _SIGN
            code -= np.where(negative, _SIGN, 0)
            code = np.clip(code - _FIRST, 0, _BINS - 1) + np.where(negative, _BINS, 0)
            code += np.arange(len(rows))[:, None] * (2 * _BINS)
            self.counts += np.bincount(code.ravel(), minlength=self.counts.size).reshape(
                self.counts.shape
            )

    def filled(self) -> ChannelMoments:
        """Return the values that occurred, in the form that rounding is judged with."""
        used = np.flatnonzero(self.counts.sum(axis=0))
        values = _bin_values()[used]
        order = np.argsort(values, kind="stable")
        shares = self.counts[:, used[order]] / np.maximum(self.counts.sum(axis=1), 1)[:, None]
        return ChannelMoments.of(values[order], shares)


@dataclass(frozen=True)
class ChannelMoments:
    """Sums over the smallest values of each channel, from which any stretch of them follows.

    Attributes:
        values: ``(B,)`` the values that occur, rising.
        moments: ``(3, C, B + 1)``: the share of the first values of each channel, and the
            sums of themselves and of their squares, by how many they are.
    """

    values: Floats
    moments: Floats

    @classmethod
    def of(cls, values: Floats, shares: Floats) -> ChannelMoments:
        """Return the moments of ``values (B,)``, rising, with ``shares (C, B)``."""
        powers = shares[None] * np.stack([values**power for power in range(3)])[:, None, :]
        none = np.zeros((3, len(shares), 1))
        return cls(values, np.concatenate([none, np.cumsum(powers, axis=2)], axis=2))

    def between(self, ends: Floats) -> Floats:
        """Return the three moments ``(3, K - 1, C)`` between each two of ``ends (K, C)``."""
        places = np.searchsorted(self.values, ends)
        every = np.arange(ends.shape[1])
        return np.diff(self.moments[:, every, places], axis=1)


def channel_histograms(
    model: ModelProto,
    batches: Iterable[npt.NDArray[np.float32]],
    tensors: Collection[str],
    progress: Callable[[int], None] | None = None,
) -> tuple[Mapping[str, ChannelHistogram], int]:
    """Return the histogram of each of ``tensors`` inside ``model``, and how many images it saw.

    Args:
        model: an FP32 graph.
        batches: normalised images ``(N, C, S, S)`` float32, a batch at a time.
        tensors: names.
        progress: called after each batch with the images seen so far.
    """
    graph = TorchGraph(model)
    histograms: dict[str, ChannelHistogram] = {}
    seen = 0
    for images in batches:
        with torch.inference_mode():
            _, watched = graph.run(torch.from_numpy(images).to(graph.dtype), watch=set(tensors))
        for name, values in watched.items():
            found = histograms.setdefault(name, ChannelHistogram.empty(values.shape[1]))
            found.add_(values.float().numpy())
        seen += len(images)
        if progress is not None:
            progress(seen)
    return histograms, seen


def rounding_error(filled: ChannelMoments, centre: Floats, step: Floats) -> tuple[Floats, Floats]:
    """Return each channel's mean squared error and mean square, both ``(C,)``.

    Args:
        filled: what :meth:`ChannelHistogram.filled` returned.
        centre: ``(C,)`` what is subtracted before rounding.
        step: ``(C,)`` of the integers -127..127.
    """
    step = np.maximum(step, 1e-12)
    clip, fine = INT8_LIMIT * step, step / np.sqrt(12.0)
    rest = np.full(len(step), np.inf)
    ends = [-rest, centre - clip, centre - fine, centre + fine, centre + clip, rest]
    below, left, zero, right, above = filled.between(np.stack(ends)).transpose(1, 0, 2)
    error = _square_about(below, centre - clip) + _square_about(above, centre + clip)
    error += (left[0] + right[0]) * np.square(fine) + _square_about(zero, centre)
    whole = below + left + zero + right + above
    return np.maximum(error, 0.0), np.maximum(_square_about(whole, centre), 0.0)


def _square_about(moments: Floats, point: Floats) -> Floats:
    """Return the sum of squared distances from ``point (C,)`` of what ``moments (3, C)`` sum."""
    return moments[2] - 2 * point * moments[1] + np.square(point) * moments[0]


def best_steps(histogram: ChannelHistogram, centre: Floats) -> tuple[Floats, Floats]:
    """Return each channel's own best step and the mean squared error it leaves, both ``(C,)``."""
    filled = histogram.filled()
    largest = np.maximum(histogram.maximum - centre, centre - histogram.minimum)
    candidates = _CLIPS[:, None] * np.maximum(largest, 1e-12) / INT8_LIMIT
    errors = np.stack([rounding_error(filled, centre, step)[0] for step in candidates])
    best = errors.argmin(axis=0)
    every = np.arange(len(largest))
    return candidates[best, every], errors[best, every]


def _bin_values() -> Floats:
    """Return the value in the middle of each bin, positive ones first."""
    index = np.arange(_BINS) + _FIRST
    fraction = (index & ((1 << _MANTISSA_BITS) - 1)) / (1 << _MANTISSA_BITS)
    exponent = (index >> _MANTISSA_BITS) - 127
    size = np.ldexp(1.0 + fraction + 0.5 / (1 << _MANTISSA_BITS), exponent)
    size[0] = 0.0  # what is smaller than any bin, zeros included
    return np.concatenate([size, -size])
