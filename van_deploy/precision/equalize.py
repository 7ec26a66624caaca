"""Exact changes of a graph's weights after which its tensors round better.

A tensor ``x`` that is rounded to int8 with one step for all its channels rounds
best when every channel fills the same range around zero. Write ``x' = (x - c) / d``
per channel. Wherever the neighbours are linear, they take ``c`` and ``d`` in and
the network computes what it did before:

===========  =================================================================
``spatial``  between two convolutions (``conv_spatial -> conv1``, and in scope
             ``all`` also ``conv0 -> conv_spatial`` and ``fc1 -> dwconv``): the
             first one's output channels are divided by ``d``, the second one's
             input channels multiplied
``gate``     ``conv1 -> gate -> proj_2``: the product of the gate is divided by
             dividing ``conv1``'s output channels
``centre``   ``c`` for the residual stream and for ``conv_spatial -> conv1``:
             subtracted in the bias of whatever adds to the tensor, returned in
             the bias of the 1x1 convolutions that read it, and cancelled at the
             next addition of the stream. (Not before a padded convolution: its
             zeros would have to be ``-c``.)
``shift``    ``c`` for what comes out of GELU and goes into ``fc2``. GELU ends at
             -0.17, so half of the integers -127..127 would stand for nothing.
             No neighbour can take this one in: it is one Add a block, which
             TensorRT for RTX computes in the kernel that GELU and the rounding
             are in anyway
===========  =================================================================

The input of ``fc2`` cannot be divided: GELU does not commute with a factor, and
neither can the residual stream without a multiply a stage, since the scale that
:mod:`van_deploy.graph.fold` gave it is fixed by its end.

``c`` and ``d`` are chosen by error, not by maximum: for each channel the step
with the least squared error, clipping included, then the exponent of these
steps with the least predicted error at the output of the convolutions that
read the tensor, their own rounded weights included. An offset makes the mean
error of rounded weights larger: correct the biases afterwards
(:func:`van_deploy.precision.refine.corrected_biases`), or ``centre`` and
``shift`` lose more than they bring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from van_deploy.errors import ImageError
from van_deploy.precision.absorb import Absorber
from van_deploy.precision.channels import (
    ChannelHistogram,
    ChannelMoments,
    best_steps,
    channel_histograms,
    rounding_error,
)
from van_deploy.precision.plan import INT8_LIMIT

__all__ = ["EqualizeReport", "EqualizeSettings", "EqualizedTensor", "equalize"]

SCALE_LIMIT = 64.0
"""Largest factor, either way, by which a channel is re-scaled: FP16 must hold the result."""

_EXPONENTS = (0.5, 0.75, 1.0)
_CLIPS = np.geomspace(0.15, 1.0, 16)
_INDIFFERENT = 0.98  # a centre must bring 2 % less error to be preferred to none

Floats = npt.NDArray[np.float64]
Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EqualizeSettings:
    """Which exact changes to consider; see the module's table."""

    spatial: bool = True
    gate: bool = True
    centre: bool = True
    shift: bool = True
    stretch: bool = True


@dataclass(frozen=True)
class EqualizedTensor:
    """What was done to one tensor.

    Attributes:
        name: the tensor.
        kind: ``spatial``, ``gate``, ``stream`` or ``gelu``: what makes it.
        exponent: of the channels' own best steps; 0 where no channel was re-scaled.
        centred: channels that were centred.
        channels: how many it has.
        added: nodes that were put behind it.
        gain_db: predicted decrease of the rounding error at the output of the
            quantised convolutions that read it.
    """

    name: str
    kind: str
    exponent: float
    centred: int
    channels: int
    added: int
    gain_db: float


@dataclass(frozen=True)
class EqualizeReport:
    """An equalised graph, and what was done.

    Attributes:
        model: the new graph; in real arithmetic it computes what the old one did.
        tensors: the tensors that were changed, in the graph's order.
        additions: nodes that ``shift`` and ``stretch`` put into the graph.
        images: how many images the ranges were taken from.
    """

    model: ModelProto
    tensors: tuple[EqualizedTensor, ...]
    additions: int
    images: int

    @property
    def modified(self) -> bool:
        """Whether anything was changed."""
        return bool(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "images": self.images,
            "additions": self.additions,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def equalize(
    model: ModelProto,
    batches: Iterable[Images],
    nodes: Collection[str],
    settings: EqualizeSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> EqualizeReport:
    """Return ``model`` with the inputs of ``nodes`` easier to round, otherwise the same function.

    Call it before the ranges are recorded: ``record_ranges(report.model, ...)`` and
    ``initial_plan(report.model, ...)`` follow. 64 to 128 images are plenty.

    Args:
        model: the FP32 graph; it is not changed.
        batches: normalised images ``(N, C, S, S)`` float32, a batch at a time.
        nodes: names of the convolutions that will be quantised.
        settings: which changes to consider (default: all).
        progress: called after each batch with the images seen so far.

    Raises:
        ImageError: there was no image.
        ConversionError: the graph is not one of this project's.
    """
    result = ModelProto()
    result.CopyFrom(model)
    absorber = Absorber(result)
    sites = _sites(absorber, nodes, settings or EqualizeSettings())
    histograms, seen = channel_histograms(model, batches, [site.tensor for site in sites], progress)
    if not seen:
        raise ImageError("There is no image to equalise with.", "Pass a folder with --images DIR.")
    changed = [_change_(absorber, site, histograms[site.tensor]) for site in sites]
    tensors = tuple(tensor for tensor in changed if tensor is not None)
    additions = sum(tensor.added for tensor in tensors)
    return EqualizeReport(absorber.finished(), tensors, additions, seen)


@dataclass(frozen=True)
class _Site:
    """A tensor that may be changed: what may be done to it, and the quantised readers."""

    tensor: str
    kind: str
    divide: bool
    centre: bool
    readers: tuple[NodeProto, ...]


@dataclass(frozen=True)
class _Choice:
    """A candidate's ``c`` and ``d``, both ``(C,)``, and the error they are predicted to leave."""

    centre: Floats
    scale: Floats
    exponent: float
    error: float


def _sites(absorber: Absorber, nodes: Collection[str], settings: EqualizeSettings) -> list[_Site]:
    sites = []
    for tensor in absorber.inputs_of(nodes):
        readers = tuple(node for node in absorber.readers(tensor) if node.name in nodes)
        divider, subtractor = absorber.divider(tensor), absorber.subtractor(tensor)
        gate = divider is not None and divider.output[0] != tensor
        divide = divider is not None and (settings.gate if gate else settings.spatial)
        if subtractor is not None:
            kind, centre = ("stream" if divider is None else "spatial"), settings.centre
        elif divider is None:
            open_ended = absorber.open_ended(tensor)
            divide, centre = settings.stretch and open_ended, settings.shift and open_ended
            kind = "gelu"
        else:
            kind, centre = ("gate" if gate else "spatial"), False
        if readers and (divide or centre):
            sites.append(_Site(tensor, kind, divide, centre, readers))
    return sites


def _change_(
    absorber: Absorber, site: _Site, histogram: ChannelHistogram
) -> EqualizedTensor | None:
    """Carry out the best choice for one tensor; return what it was, None for nothing."""
    choices = _choices(absorber, site, histogram)
    plain, best = choices[0], min(choices, key=lambda choice: choice.error)
    if best is plain:
        return None
    centred, added = int(np.count_nonzero(best.centre)), 0
    if site.kind == "gelu":
        added = absorber.insert_affine_(site.tensor, best.centre, best.scale)
    else:
        if best.exponent:
            absorber.divide_(site.tensor, best.scale)
        if centred:
            absorber.subtract_(site.tensor, best.centre / best.scale)
    gain = 10 * math.log10(plain.error / best.error)
    return EqualizedTensor(
        site.tensor, site.kind, best.exponent, centred, len(best.scale), added, round(gain, 2)
    )


def _choices(absorber: Absorber, site: _Site, histogram: ChannelHistogram) -> list[_Choice]:
    """Return every candidate for one tensor; the first is to leave it as it is."""
    size = len(histogram.minimum)
    weights = [absorber.weight(reader) for reader in site.readers]
    gains = np.sum([_input_gains(weight, size) for weight in weights], axis=0)
    filled = histogram.filled()
    zeros, ones = np.zeros(size), np.ones(size)
    variance = rounding_error(filled, histogram.mean, ones)[1]
    choices = []
    for centred in (False, True) if site.centre else (False,):
        middle = (histogram.maximum + histogram.minimum) / 2 if centred else zeros
        steps = _relative(best_steps(histogram, middle)[0])
        for exponent in (0.0, *_EXPONENTS) if site.divide else (0.0,):
            scale = steps**exponent
            centre, error = _with_common_step(histogram, filled, scale, gains, centred)
            error += sum(_weight_error(weight, scale, variance) for weight in weights)
            choices.append(_Choice(centre, scale, exponent, error))
    return choices


def _relative(steps: Floats) -> Floats:
    """Return ``steps`` over their geometric mean, none more than the limit away from one."""
    floored = np.maximum(steps, steps.max() / SCALE_LIMIT)
    relative = floored / np.exp(np.log(floored).mean())
    return np.asarray(np.clip(relative, 1 / SCALE_LIMIT, SCALE_LIMIT))


def _with_common_step(
    histogram: ChannelHistogram,
    filled: ChannelMoments,
    scale: Floats,
    gains: Floats,
    centred: bool,
) -> tuple[Floats, float]:
    """Return the centres ``(C,)`` and the error of the best step for all channels of ``x / scale``.

    The error is what arrives at the readers' outputs: each channel's times its gain.
    """
    low, high = histogram.minimum, histogram.maximum
    zeros = np.zeros(len(scale))
    reach = np.maximum((high - low) / 2, 0.0) if centred else np.maximum(high, -low)
    best = (zeros, math.inf)
    for step in _CLIPS * max(float((reach / scale).max()), 1e-12) / INT8_LIMIT:
        steps = step * scale
        error, _ = rounding_error(filled, zeros, steps)
        centre, penalised = zeros, error * _INDIFFERENT
        for other in _centres(low, high, steps) if centred else ():
            found, _ = rounding_error(filled, other, steps)
            better = found < penalised
            centre, error = np.where(better, other, centre), np.where(better, found, error)
            penalised = np.where(better, found, penalised)
        total = float((gains * error).sum())
        if total < best[1]:
            best = (centre, total)
    return best


def _centres(low: Floats, high: Floats, steps: Floats) -> tuple[Floats, Floats, Floats]:
    """Return three places for the middle of the integers: mid-range, and clipping one end only."""
    middle, reach = (low + high) / 2, INT8_LIMIT * steps
    return middle, np.minimum(low + reach, middle), np.maximum(high - reach, middle)


def _input_gains(weight: Floats, channels: int) -> Floats:
    """Return the sum of squares of the weights that each input channel meets, ``(C,)``."""
    groups = channels // weight.shape[1]
    grouped = np.square(weight).reshape(groups, -1, *weight.shape[1:])  # (g, O/g, I/g, kh, kw)
    return np.asarray(grouped.sum(axis=(1, 3, 4)).reshape(-1))


def _weight_error(weight: Floats, scale: Floats, variance: Floats) -> float:
    """Return the error that rounding ``weight * scale`` brings at the output.

    Offsets bring none: their part is constant, and corrected in the bias.
    """
    groups = len(scale) // weight.shape[1]
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    largest = np.abs(grouped * scale.reshape(groups, 1, -1, 1, 1)).max(axis=(2, 3, 4))  # (g, O/g)
    taps = weight.shape[2] * weight.shape[3]
    power = taps * (variance / np.square(scale)).reshape(groups, -1).sum(axis=1)
    return float((np.square(largest / INT8_LIMIT).sum(axis=1) / 12 * power).sum())
