"""The range of every tensor on real images, and the scales of 8-bit integers read from it.

In one pass the network runs as a PyTorch module with a hook on each of its parts. A histogram
bin is the sign, the exponent and the first :data:`MANTISSA_BITS` mantissa bits of a float32, so
a bin is 6 to 12 % wide wherever it lies, no range has to be known beforehand, and nothing is
ever binned again. Every value of every image is counted, never a sample. Memory is that of one
batch and of the records, whatever the number of images. A scale is read by one method:

==============  =================================================================
``minmax``      the largest magnitude is just representable: nothing is clipped
``percentile``  the magnitude that 99.999 % of all values do not exceed
``mse``         the least squared error over the whole histogram, clipping included
==============  =================================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from van_deploy.errors import ConversionError
from van_deploy.graph.export import RebuiltVan

MANTISSA_BITS = 3
# Smaller magnitudes share the first bin, and stand for 0: the smallest scale, 2^-14, rounds
# them to it. Larger ones, which no FP16 number reaches, share the last.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -15, 16
# Of a channel: negative values first, from the largest magnitude down.
BINS = 2 * ((LARGEST_EXPONENT - SMALLEST_EXPONENT) << MANTISSA_BITS)
# Images that are looked at together have at most so many pixels: five of 224 x 224.
BATCH_PIXELS = 2**18
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (SMALLEST_EXPONENT + 127) << MANTISSA_BITS  # 127: the exponent's bias in a float32
_CHUNK = 2**19  # values counted together, few enough for a cache

PERCENTILE = 99.999  # ONNX Runtime's default
INT8_LIMIT = 127  # -128 is not used, so that a value and its opposite are both there
UNSIGNED_ZERO = 128  # zero-point of an unsigned tensor with a scale for every channel
# Smallest normal FP16 number, 6.1e-5. A smaller scale would be denormal or zero as FP16, and
# TensorRT refuses zero.
SMALLEST_SCALE = 2.0**-14
FP16_LARGEST = 65504.0
# Largest magnitude of the sum of two weights that are multiplied side by side: x86 processors
# without VNNI add two products of uint8 and int8 in 16 bits (``vpmaddubsw``), where 255 times
# more does not fit and is cut off (ONNX Runtime's page on quantisation, "When and why do I need
# to try U8U8?").
PAIR_LIMIT = 128
SMALLEST_FP32_SCALE = 2.0**-60  # a smaller one, times that of the activations, may be denormal
LARGEST_BIAS = 2.0**30  # of an int32, with a factor of two to spare for the sum it joins
_GRID = 24  # clips tried first, then as many around the best
_SMALLEST_CLIP = 1 / 64  # of the largest magnitude, where the search starts

Images = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]
Method = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class ChannelRange:
    """What the channels of one tensor were, over every image.

    Attributes:
        minimum: ``(C,)`` smallest values, float64.
        maximum: ``(C,)`` largest values, float64.
        counts: ``(C, BINS)`` how often each bin occurred; ``(C, 0)`` where it was not counted.
    """

    minimum: Floats
    maximum: Floats
    counts: npt.NDArray[np.uint32]

    @property
    def largest(self) -> float:
        """The largest magnitude of any channel."""
        return float(max(self.maximum.max(), -self.minimum.min()))


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

    def multiply_add(self) -> tuple[Images, Images]:
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


# --- histograms ------------------------------------------------------------------------------


@functools.cache
def bin_values() -> npt.NDArray[np.float64]:
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
    channels = len(low)
    counts = np.zeros(channels * BINS if counted else 0, np.uint32)
    start = torch.arange(channels, dtype=torch.int32) * BINS + BINS // 2
    for some in rows.split(max(_CHUNK, counts.size) // channels) if counted else ():
        bits = some.contiguous().view(torch.int32)
        code = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
        code.clamp_(_FIRST, _FIRST + BINS // 2 - 1).sub_(_FIRST)
        code.bitwise_xor_(bits >> 31).add_(start)  # ~code = -code - 1 where the sign is set
        counts += torch.bincount(code.flatten(), minlength=counts.size).numpy().astype(np.uint32)
    return ChannelRange(low, high, counts.reshape(channels, -1))


def range_batch_size(pixels: int) -> int:
    """Return how many images of ``pixels`` each are looked at together."""
    return min(max(BATCH_PIXELS // pixels, 1), 32)


def observe_ranges(
    network: RebuiltVan, batches: Iterable[Images], counted: Collection[str]
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
        known = ranges.setdefault(tensor, found)
        if known is not found:
            np.minimum(known.minimum, found.minimum, out=known.minimum)
            np.maximum(known.maximum, found.maximum, out=known.maximum)
            np.add(known.counts, found.counts, out=known.counts)

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


# --- weights ---------------------------------------------------------------------------------


def storable_scales(scales: npt.ArrayLike) -> Images:
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


def weight_scales(weight: Floats) -> Images:
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


def cpu_weight_scales(weight: Floats, bias: Floats, activation_scale: Floats) -> Images:
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


# --- activations -----------------------------------------------------------------------------


def symmetric(record: ChannelRange, method: Method, affine: ChannelAffine = UNCHANGED) -> Quantizer:
    """Return signed integers with zero-point 0, whose scale FP16 holds.

    Args:
        record: of the tensor, counted.
        method: how the scale is read.
        affine: what the tensor goes through between ``record`` and the rounding.
    """
    low, high = _ends(record, method, affine)
    largest = max(high, -low)
    if method == "mse" and largest > 0:
        sums = _BinSums(record, affine)
        largest = _least(lambda clip: sums.error(clip / INT8_LIMIT, -clip, clip), largest)
    return Quantizer(storable_scales(largest / INT8_LIMIT))


def unsigned(
    record: ChannelRange,
    method: Method,
    affine: ChannelAffine = UNCHANGED,
    lowest: float = -np.inf,
) -> Quantizer:
    """Return unsigned integers with a zero-point, for a tensor whose two sides differ.

    Zero is always exactly representable. ``mse`` clips the two sides where the squared
    error is least, one side at a time.

    Args:
        record: of the tensor, counted.
        method: how the scale is read.
        affine: what the tensor goes through between ``record`` and the rounding.
        lowest: no integers are spent below this.
    """

    def between(low: float, high: float) -> Quantizer:  # both ends and zero
        scale = min(max((high - low) / 255, SMALLEST_SCALE), FP16_LARGEST)
        return Quantizer(np.array(scale), int(np.clip(round(-low / scale), 0, 255)), signed=False)

    def error(low: float, high: float) -> float:
        found = between(low, high)
        first, last = (limit * float(found.scale) for limit in found.limits)
        return sums.error(float(found.scale), first, last)

    low, high = _ends(record, method, affine)
    low = max(low, lowest)
    if method == "mse" and low < high:
        sums, least, most = _BinSums(record, affine), low, high
        for _ in range(2):
            high = _least(functools.partial(error, low), most)
            low = -_least(lambda clip, high=high: error(-clip, high), -least)  # type: ignore[misc]
    return between(low, high)


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


def _ends(record: ChannelRange, method: Method, affine: ChannelAffine) -> tuple[float, float]:
    """Return the ends of a whole tensor, zero between them; not yet where ``mse`` clips."""
    low, high = affine.of(record.minimum).min(), affine.of(record.maximum).max()
    if method == "percentile":
        counts = record.counts
        values = np.broadcast_to(affine.of(bin_values()[:, None]).T, counts.shape)
        order = np.argsort(values, axis=None)
        found = _within(values.flat[order][None], counts.flat[order][None], PERCENTILE)
        low, high = max(low, found[0][0]), min(high, found[1][0])
    return min(float(low), 0.0), max(float(high), 0.0)


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
        self.affine, self.values, self.every = affine, bin_values()[used], np.arange(len(counts))
        powers = np.stack([self.values**power for power in range(3)])[:, None, :]
        sums = np.cumsum(counts[:, used] * powers, axis=2)
        self.sums = np.concatenate([np.zeros((3, len(counts), 1)), sums], axis=2)  # (3, C, B + 1)

    def error(self, scale: float, low: float, high: float) -> float:
        """Return the squared error of ``x'`` with integers that reach from low to high."""
        fine = scale / np.sqrt(12)
        ends = [-np.inf, low, max(-fine, low), min(fine, high), high, np.inf]
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
