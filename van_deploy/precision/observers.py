"""The range of every tensor, and a histogram of each channel, in one pass over the images.

The network runs as a PyTorch module with a hook on each of its parts. A histogram bin is
the sign, the exponent and the first :data:`MANTISSA_BITS` mantissa bits of a float32, so a
bin is 6 to 12 % wide wherever it lies, no range has to be known beforehand, and nothing is
ever binned again. Every value of every image is counted, never a sample.
Memory is that of one batch and of the records, whatever the number of images.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from van_deploy.errors import ConversionError
from van_deploy.graph.rebuilt import RebuiltVan

MANTISSA_BITS = 3
SMALLEST_EXPONENT, LARGEST_EXPONENT = -15, 16
"""Smaller magnitudes share the first bin, and stand for 0: the smallest scale, 2^-14, rounds
them to it. Larger ones, which no FP16 number reaches, share the last."""

BINS = 2 * ((LARGEST_EXPONENT - SMALLEST_EXPONENT) << MANTISSA_BITS)
"""Of a channel: negative values first, from the largest magnitude down."""

BATCH_PIXELS = 2**18
"""Images that are looked at together have at most so many pixels: five of 224 x 224."""

_SHIFT = 23 - MANTISSA_BITS
_FIRST = (SMALLEST_EXPONENT + 127) << MANTISSA_BITS  # 127: the exponent's bias in a float32
_CHUNK = 2**19  # values counted together, few enough for a cache

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ChannelRange:
    """What the channels of one tensor were, over every image.

    Attributes:
        minimum: ``(C,)`` smallest values.
        maximum: ``(C,)`` largest values.
        counts: ``(C, BINS)`` how often each bin occurred; ``(C, 0)`` where it was not counted.
    """

    minimum: Floats
    maximum: Floats
    counts: npt.NDArray[np.uint32]

    @property
    def largest(self) -> float:
        """The largest magnitude of any channel."""
        return float(max(self.maximum.max(), -self.minimum.min()))

    def add_(self, values: ChannelRange) -> None:
        """Take in more values of the same tensor."""
        np.minimum(self.minimum, values.minimum, out=self.minimum)
        np.maximum(self.maximum, values.maximum, out=self.maximum)
        np.add(self.counts, values.counts, out=self.counts)


@functools.cache
def bin_values() -> Floats:
    """Return the value in the middle of each bin, ``(BINS,)``, rising."""
    index = np.arange(BINS // 2) + _FIRST
    parts = 1 << MANTISSA_BITS
    magnitude = np.ldexp(1 + (index % parts + 0.5) / parts, index // parts - 127)
    magnitude[0] = 0.0
    return np.concatenate([-magnitude[::-1], magnitude])


def range_of(values: Tensor, counted: bool) -> ChannelRange:
    """Return the range of ``values (N, C, H, W)`` or ``(N, C)``, float32."""
    rows = values.movedim(1, -1).reshape(-1, values.shape[1])  # a view of channels-last values
    low, high = rows.amin(0).double().numpy(), rows.amax(0).double().numpy()
    none = np.zeros((len(low), 0), np.uint32)
    return ChannelRange(low, high, _counts(rows) if counted else none)


def _counts(rows: Tensor) -> npt.NDArray[np.uint32]:
    """Return how often each bin occurs in each channel of ``rows (N, C)``: ``(C, BINS)``."""
    channels = rows.shape[1]
    start = torch.arange(channels, dtype=torch.int32) * BINS + BINS // 2
    counts = np.zeros(channels * BINS, np.uint32)
    for some in rows.split(max(_CHUNK, counts.size) // channels):
        bits = some.contiguous().view(torch.int32)
        code = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
        code.clamp_(_FIRST, _FIRST + BINS // 2 - 1).sub_(_FIRST)
        code.bitwise_xor_(bits >> 31).add_(start)  # ~code = -code - 1 where the sign is set
        counts += torch.bincount(code.flatten(), minlength=counts.size).numpy().astype(np.uint32)
    return counts.reshape(channels, BINS)


def images_at_once(pixels: int) -> int:
    """Return how many images of ``pixels`` each are looked at together."""
    return min(max(BATCH_PIXELS // pixels, 1), 32)


def observe(
    network: RebuiltVan,
    batches: Iterable[npt.NDArray[np.float32]],
    counted: Collection[str],
) -> dict[str, ChannelRange]:
    """Return the range of every tensor of ``network``, by its name in the graph.

    Args:
        network: runs in float32.
        batches: normalised images ``(N, C, S, S)``, a batch at a time.
        counted: tensors whose values are counted.

    Raises:
        ConversionError: a tensor became infinite or NaN.
    """
    ranges: dict[str, ChannelRange] = {}

    def add(tensor: str, values: Tensor) -> None:
        found = range_of(values, tensor in counted)
        if not np.isfinite([found.minimum, found.maximum]).all():
            raise ConversionError(
                f"The tensor '{tensor}' is infinite or NaN on the calibration images.",
                "Check the weights with `van-deploy inspect`, and the images' preprocessing.",
            )
        if tensor in ranges:
            ranges[tensor].add_(found)
        else:
            ranges[tensor] = found

    with ExitStack() as stack, torch.inference_mode():
        for tensor, (name, is_output) in network.tensors.items():
            module = network.model.get_submodule(name)
            if is_output:
                hook = module.register_forward_hook(lambda _m, _a, y, t=tensor: add(t, y))
            else:
                hook = module.register_forward_pre_hook(lambda _m, x, t=tensor: add(t, x[0]))
            stack.callback(hook.remove)
        for images in batches:
            network.model(torch.from_numpy(images).contiguous(memory_format=torch.channels_last))
    return ranges
