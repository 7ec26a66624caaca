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

``c`` and ``d`` are chosen by the error they leave (:mod:`van_deploy.precision.choices`).
An offset makes the mean
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
from van_deploy.precision.channels import ChannelHistogram, channel_histograms
from van_deploy.precision.choices import choices_of

__all__ = ["EqualizeReport", "EqualizeSettings", "EqualizedTensor", "equalize"]

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
    weights = [absorber.weight(reader) for reader in site.readers]
    choices = choices_of(histogram, weights, divide=site.divide, centre=site.centre)
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
