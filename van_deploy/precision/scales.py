"""Record the range of every tensor on real images, and choose the scales of 8-bit integers.

The network runs once as a PyTorch module with a hook on every tensor. A histogram bin is the sign,
the exponent and the first :data:`MANTISSA_BITS` mantissa bits of a float32. A bin is therefore 6
to 12 % wide everywhere, the range need not be known in advance, and no histogram is rebinned.
Every value of every image is counted. Memory use does not depend on the number of images. The
calibration method selects the scale:

==============  =================================================================
``minmax``      represents the largest magnitude: nothing is clipped
``percentile``  represents the range that at most 0.001 % of all values exceed at each end,
                to within half a bin
``mse``         has the smallest squared error over the histogram, including clipping
==============  =================================================================
"""

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
# Smaller magnitudes share the first bin, which represents 0: with the smallest scale, 2^-14, they
# round to 0. Larger magnitudes, beyond FP16's range, share the last bin.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -15, 16
# Bins of a channel: negative values first, from the largest magnitude down.
BINS = 2 * ((LARGEST_EXPONENT - SMALLEST_EXPONENT) << MANTISSA_BITS)
# Largest number of pixels in one batch while ranges are recorded: five images of 224 x 224.
BATCH_PIXELS = 2**18
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (SMALLEST_EXPONENT + 127) << MANTISSA_BITS  # 127: the exponent's bias in a float32
_CHUNK = 2**19  # values counted at once; fits into the CPU cache

PERCENTILE = 99.999  # ONNX Runtime's default
INT8_LIMIT = 127  # -128 is not used, so that the range is symmetric
UNSIGNED_ZERO = 128  # zero-point of an unsigned tensor with one scale per channel
# Smallest normal FP16 number, 6.1e-5. A smaller scale would be denormal or zero as FP16, and
# TensorRT refuses zero.
SMALLEST_SCALE = 2.0**-14
FP16_LARGEST = 65504.0
# Largest magnitude of the sum of two neighbouring weights: x86 processors without VNNI add two
# products of uint8 and int8 in 16 bits (``vpmaddubsw``), which saturates for larger sums times 255
# (ONNX Runtime's page on quantisation, "When and why do I need to try U8U8?").
PAIR_LIMIT = 128
SMALLEST_FP32_SCALE = 2.0**-60  # a smaller one times the activation scale may be denormal
LARGEST_BIAS = 2.0**30  # half of int32's range, which leaves headroom for the accumulator
_GRID = 24  # clipping values in the coarse search, and again in the fine search
_SMALLEST_CLIP = 1 / 64  # start of the search, relative to the largest magnitude

Images = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating]
Method = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class ChannelRange:
    """Range of each channel of one tensor over all images.

    Attributes:
        minimum: ``(C,)`` smallest values, float64.
        maximum: ``(C,)`` largest values, float64.
        counts: histogram ``(C, BINS)``; ``(C, 0)`` if none was recorded.
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
    """Per-channel affine of a tensor: ``x' = (x - shift) / factor``.

    Attributes:
        shift: ``(C,)`` float64.
        factor: ``(C,)`` float64, positive.
    """

    shift: Floats
    factor: Floats

    def apply(self, values: Floats) -> Floats:
        """Return the transformed ``values (..., C)``."""
        return np.asarray((values - self.shift) / self.factor)

    def multiply_add(self) -> tuple[Images, Images]:
        """Return ``multiplier`` and ``offset`` of ``x * multiplier + offset``, ``(C,)`` float32."""
        multiplier = (1 / self.factor).astype(np.float32)
        return multiplier, (-self.shift / self.factor).astype(np.float32)


IDENTITY = ChannelAffine(np.zeros(1), np.ones(1))


@dataclass(frozen=True)
class Quantizer:
    """Scale and zero-point of 8-bit integers ``clip(round(x / scale) + zero_point)``.

    Attributes:
        scale: positive; a scalar, or ``(C,)``.
        zero_point: the integer that represents 0.
        signed: -128..127, otherwise 0..255.
    """

    scale: Floats
    zero_point: int = 0
    signed: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer, minus the zero-point."""
        low, high = (-128, 127) if self.signed else (0, 255)
        return low - self.zero_point, high - self.zero_point


# --- histograms ------------------------------------------------------------------------------


@functools.cache
def bin_values() -> npt.NDArray[np.float64]:
    """Return the centre of each bin, ``(BINS,)``, in ascending order."""
    index = np.arange(BINS // 2) + _FIRST
    parts = 1 << MANTISSA_BITS
    magnitude = np.ldexp(1 + (index % parts + 0.5) / parts, index // parts - 127)
    magnitude[0] = 0.0
    return np.concatenate([-magnitude[::-1], magnitude])


def channel_range(values: Tensor, histogram: bool) -> ChannelRange:
    """Return the range of ``values (N, C, H, W)`` or ``(N, C)``, float32."""
    rows = values.movedim(1, -1).reshape(-1, values.shape[1])  # a view of channels-last values
    low, high = rows.amin(0).double().numpy(), rows.amax(0).double().numpy()
    channels = len(low)
    counts = np.zeros(channels * BINS if histogram else 0, np.uint32)
    start = torch.arange(channels, dtype=torch.int32) * BINS + BINS // 2
    for chunk in rows.split(max(_CHUNK, counts.size) // channels) if histogram else ():
        bits = chunk.contiguous().view(torch.int32)
        code = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
        code.clamp_(_FIRST, _FIRST + BINS // 2 - 1).sub_(_FIRST)
        code.bitwise_xor_(bits >> 31).add_(start)  # ~code = -code - 1 for negative values
        counts += torch.bincount(code.flatten(), minlength=counts.size).numpy().astype(np.uint32)
    return ChannelRange(low, high, counts.reshape(channels, -1))


def range_batch_size(pixels: int) -> int:
    """Return the batch size for recording ranges of images with ``pixels`` pixels."""
    return min(max(BATCH_PIXELS // pixels, 1), 32)


def observe_ranges(
    network: RebuiltVan, batches: Iterable[Images], histograms: Collection[str]
) -> dict[str, ChannelRange]:
    """Return the range of every tensor of ``network``, by its name in the graph.

    Args:
        network: runs in float32.
        batches: normalised images ``(N, C, S, S)``.
        histograms: names of the tensors to record a histogram of.

    Raises:
        ConversionError: a tensor is infinite or NaN.
    """
    ranges: dict[str, ChannelRange] = {}

    def add(tensor: str, values: Tensor) -> None:
        batch = channel_range(values, tensor in histograms)
        if not np.isfinite([batch.minimum, batch.maximum]).all():
            raise ConversionError(
                f"The tensor '{tensor}' is infinite or NaN on the calibration images.",
                "Check the weights with `van-deploy inspect`, and the images' preprocessing.",
            )
        total = ranges.setdefault(tensor, batch)
        if total is not batch:
            np.minimum(total.minimum, batch.minimum, out=total.minimum)
            np.maximum(total.maximum, batch.maximum, out=total.maximum)
            np.add(total.counts, batch.counts, out=total.counts)

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
    for name, block in network.model.named_blocks():
        if block.skip_gain is not None:  # a multiply, which no module computes
            read = ranges[network.reads[f"{name}.attn.proj_1"]]
            ends = np.array([read.minimum, read.maximum]) * block.skip_gain.double().numpy()
            ranges[f"{name}.mul"] = ChannelRange(ends.min(0), ends.max(0), read.counts[:, :0])
    return ranges


# --- weights ---------------------------------------------------------------------------------


def fp16_scales(scales: npt.ArrayLike) -> Images:
    """Return positive ``scales`` as float32 numbers that are exact in FP16.

    Scales are rounded up, so that they still cover the same range, and are at least
    :data:`SMALLEST_SCALE`. Integers therefore have the same meaning in a file with FP16 scales.

    >>> fp16_scales([0.0, 0.1]).tolist()
    [6.103515625e-05, 0.10003662109375]
    """
    exact = np.clip(np.asarray(scales, np.float64), SMALLEST_SCALE, FP16_LARGEST)
    half = exact.astype(np.float16)
    too_small = half.astype(np.float64) < exact
    rounded_up = np.nextafter(half, np.where(too_small, np.float16(np.inf), half))
    return np.asarray(rounded_up, dtype=np.float32)


def weight_scales(weight: Floats) -> Images:
    """Return each output channel's scale ``(O,)``: largest magnitude / 127, exact in FP16."""
    return fp16_scales(np.abs(weight.reshape(len(weight), -1)).max(axis=1) / INT8_LIMIT)


def pair_sums(weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return each output channel's largest ``|w + v|`` of two neighbouring weights, ``(O,)``.

    Neighbours are in the order in which ONNX Runtime multiplies them: kernel row, kernel column,
    input channel.

    >>> pair_sums(np.array([[3.0, 4.0, -5.0, 1.0]]))
    array([7.])
    """
    rows = np.moveaxis(weight.astype(np.float64), 1, -1).reshape(len(weight), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return np.asarray(np.abs(rows[:, ::2] + rows[:, 1::2]).max(axis=1))


def cpu_weight_scales(
    weight: Floats, bias: Floats, activation_scale: Floats, *, depthwise: bool = False
) -> Images:
    """Return each output channel's scale ``(O,)``, large enough for ONNX Runtime's kernels.

    The sum of two products does not overflow (:data:`PAIR_LIMIT`; rounding increases a sum by at
    most one), and the bias fits into 32 bits. A depth-wise convolution accumulates in 32 bits; a
    stem of one input channel does not. Scales stay FP32, so channels with tiny weights keep their
    scale.
    """
    bias_limit = np.abs(bias) / (float(activation_scale) * LARGEST_BIAS)
    weight_limit = np.abs(weight.reshape(len(weight), -1)).max(axis=1) / INT8_LIMIT
    pair_limit = 0.0 if depthwise else pair_sums(weight) / (PAIR_LIMIT - 1)
    limits = (weight_limit, pair_limit, bias_limit, SMALLEST_FP32_SCALE)
    return np.asarray(functools.reduce(np.maximum, limits), np.float32)


def quantize_weight(weight: Floats, scales: Floats) -> npt.NDArray[np.int8]:
    """Return ``weight (O, ...)`` as integers with ``scales (O,)``, rounded to nearest."""
    integers = np.rint(weight / scales.reshape(-1, *(1,) * (weight.ndim - 1)))
    return np.clip(integers, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)


# --- activations -----------------------------------------------------------------------------


def symmetric_quantizer(
    record: ChannelRange, method: Method, affine: ChannelAffine = IDENTITY
) -> Quantizer:
    """Return a signed quantiser with zero-point 0 and a scale that is exact in FP16.

    Args:
        record: range of the tensor, with a histogram.
        method: for the scale.
        affine: applied to the tensor of ``record`` before quantisation.
    """
    low, high = _full_range(record, method, affine)
    largest = max(high, -low)
    if method == "mse" and largest > 0:
        sums = _HistogramSums(record, affine)
        largest = _minimize_error(lambda clip: sums.error(clip / INT8_LIMIT, -clip, clip), largest)
    return Quantizer(fp16_scales(largest / INT8_LIMIT))


def unsigned_quantizer(
    record: ChannelRange, method: Method, affine: ChannelAffine = IDENTITY, lowest: float = -np.inf
) -> Quantizer:
    """Return an unsigned quantiser with a zero-point, for a tensor with an asymmetric range.

    Zero is always exactly representable. ``mse`` minimises the squared error over the two ends
    of the range, one end at a time.

    Args:
        record: range of the tensor, with a histogram.
        method: for the scale.
        affine: applied to the tensor of ``record`` before quantisation.
        lowest: smallest value to represent.
    """

    def quantizer(low: float, high: float) -> Quantizer:  # represents both ends and zero
        scale = min(max((high - low) / 255, SMALLEST_SCALE), FP16_LARGEST)
        return Quantizer(np.array(scale), int(np.clip(round(-low / scale), 0, 255)), signed=False)

    def error(low: float, high: float) -> float:
        candidate = quantizer(low, high)
        first, last = (limit * float(candidate.scale) for limit in candidate.limits)
        return sums.error(float(candidate.scale), first, last)

    low, high = _full_range(record, method, affine)
    low = max(low, lowest)
    if method == "mse" and low < high:
        sums, minimum, maximum = _HistogramSums(record, affine), low, high
        for _ in range(2):
            high = _minimize_error(functools.partial(error, low), maximum)
            low = -_minimize_error(lambda clip, high=high: error(-clip, high), -minimum)  # type: ignore[misc]
    return quantizer(low, high)


def per_channel_quantizer(record: ChannelRange, affine: ChannelAffine = IDENTITY) -> Quantizer:
    """Return an unsigned quantiser with one scale per channel that clips nothing."""
    ends = np.abs([affine.apply(record.minimum), affine.apply(record.maximum)])
    scale = ends.max(axis=0) / (255 - UNSIGNED_ZERO)
    return Quantizer(np.clip(scale, SMALLEST_SCALE, FP16_LARGEST), UNSIGNED_ZERO, signed=False)


def percentile_range(record: ChannelRange, percentile: float) -> tuple[Floats, Floats]:
    """Return the lower and upper end of each channel, ``(C,)``, that contain ``percentile`` %.

    Each end is the centre of a bin (at most the extreme value); the bins beyond it contain at most
    ``100 - percentile`` % of the values.
    """
    low, high = _percentile_ends(bin_values()[None], record.counts, percentile)
    return np.maximum(low, record.minimum), np.minimum(high, record.maximum)


def _percentile_ends(
    values: Floats, counts: npt.NDArray[np.uint32], percentile: float
) -> tuple[Floats, Floats]:
    """Return the first and the last of ascending ``values`` in each row within the percentile."""
    totals = np.cumsum(counts, axis=1, dtype=np.float64)
    cut = (1 - percentile / 100) * totals[:, -1:]
    first, last = (totals > cut).argmax(axis=1), (totals >= totals[:, -1:] - cut).argmax(axis=1)
    return values[..., first].reshape(-1), values[..., last].reshape(-1)


def _full_range(record: ChannelRange, method: Method, affine: ChannelAffine) -> tuple[float, float]:
    """Return the range of a tensor including zero, before ``mse`` clips it."""
    low, high = affine.apply(record.minimum).min(), affine.apply(record.maximum).max()
    if method == "percentile":
        counts = record.counts
        values = np.broadcast_to(affine.apply(bin_values()[:, None]).T, counts.shape)
        order = np.argsort(values, axis=None)
        ends = _percentile_ends(values.flat[order][None], counts.flat[order][None], PERCENTILE)
        low, high = max(low, ends[0][0]), min(high, ends[1][0])
    return min(float(low), 0.0), max(float(high), 0.0)


class _HistogramSums:
    """Cumulative sums of a histogram that give the squared error of any scale.

    The rounding error is modelled as uniform noise, ``scale^2 / 12``, except for values that
    round to zero or are clipped. No value has to be quantised to evaluate a scale.
    """

    def __init__(self, record: ChannelRange, affine: ChannelAffine) -> None:
        counts = record.counts
        if affine is IDENTITY:  # all channels have the same bins
            counts = counts.sum(axis=0, keepdims=True, dtype=np.uint64)
        used = np.flatnonzero(counts.any(axis=0))
        self.affine, self.values, self.rows = affine, bin_values()[used], np.arange(len(counts))
        powers = np.stack([self.values**power for power in range(3)])[:, None, :]
        sums = np.cumsum(counts[:, used] * powers, axis=2)
        self.sums = np.concatenate([np.zeros((3, len(counts), 1)), sums], axis=2)  # (3, C, B + 1)

    def error(self, scale: float, low: float, high: float) -> float:
        """Return the squared error of ``x'`` for integers that represent ``low`` to ``high``."""
        noise = scale / np.sqrt(12)
        ends = [-np.inf, low, max(-noise, low), min(noise, high), high, np.inf]
        shift, factor = self.affine.shift, self.affine.factor
        indices = np.searchsorted(self.values, np.multiply.outer(ends, factor) + shift)
        intervals = np.diff(self.sums[:, self.rows, indices], axis=1)  # (3, 5, C)

        def squares(interval: int, centre: float) -> Floats:  # sum of (x' - centre)^2
            zeroth, first, second = intervals[:, interval]
            point = centre * factor + shift
            return np.asarray((second - 2 * point * first + point**2 * zeroth) / factor**2)

        rounding = (intervals[0, 1] + intervals[0, 3]) * noise**2
        return float((squares(0, low) + rounding + squares(2, 0.0) + squares(4, high)).sum())


def _minimize_error(error: Callable[[float], float], largest: float) -> float:
    """Return the clipping value up to ``largest`` with the smallest error (coarse, then fine)."""
    if largest <= 0:
        return 0.0
    grid = np.geomspace(largest * _SMALLEST_CLIP, largest, _GRID)
    best = int(np.argmin([error(float(clip)) for clip in grid]))
    around = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)], _GRID)
    return float(around[int(np.argmin([error(float(clip)) for clip in around]))])
