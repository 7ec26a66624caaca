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

__all__ = ["ChannelHistogram", "best_steps", "channel_histograms", "rounding_error"]

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

    def filled(self) -> tuple[Floats, Floats]:
        """Return the values ``(B,)`` that occurred and each channel's shares of them ``(C, B)``."""
        used = np.flatnonzero(self.counts.sum(axis=0))
        shares = self.counts[:, used] / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        return _bin_values()[used], shares


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


def rounding_error(
    histogram: tuple[Floats, Floats], centre: Floats, step: Floats
) -> tuple[Floats, Floats]:
    """Return each channel's mean squared error and mean square, both ``(C,)``.

    Args:
        histogram: what :meth:`ChannelHistogram.filled` returned.
        centre: ``(C,)`` what is subtracted before rounding.
        step: ``(C,)`` of the integers -127..127.
    """
    values, shares = histogram
    size = np.abs(values[None, :] - centre[:, None])
    step = np.maximum(step, 1e-12)[:, None]
    inside = np.minimum(np.square(size), np.square(step) / 12)
    outside = np.maximum(size - INT8_LIMIT * step, 0.0)
    error = np.where(outside > 0, np.square(outside), inside)
    return (shares * error).sum(axis=1), (shares * np.square(size)).sum(axis=1)


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
