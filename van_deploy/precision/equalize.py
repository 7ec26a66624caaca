"""Exact changes of a network's weights, after which its tensors round better.

A tensor rounded to int8 with one scale for all channels rounds best when every channel
fills the same range around zero. Write ``x' = (x - shift) / factor`` by channel. Where the
neighbours are linear they take both in, and the network computes what it did before:

=================  ======================================================================
``cross_layer``    cross-layer equalisation (arXiv 1906.04721, section 4.1): a factor
                   between ``conv_spatial`` and ``conv1``, and from ``conv1`` through the
                   gate into ``proj_2``; in scope ``all`` also between ``conv0`` and
                   ``conv_spatial``, and between ``fc1`` and the depth-wise convolution
``shift``          channel-wise shifting (arXiv 2304.09145) of what only 1x1 convolutions
                   and additions read: the residual stream, and ``conv1``'s input. It goes
                   out of one bias and into the next (not before a padded convolution,
                   whose zeros would have to be shifted too)
``shift_scale``    shifting and scaling by channel of what comes out of GELU and goes into
                   ``fc2``. No neighbour before it is linear: it is one Mul and one Add a
                   block, which TensorRT computes in the kernel that GELU and the rounding
                   are in anyway (`docs/precision.md` counts them)
=================  ======================================================================

A factor is the width of the channel's range to the power :data:`STRENGTH`, SmoothQuant's
migration strength (arXiv 2211.10438): with 1 the channels would round alike, and the weights
behind them would pay for it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from van_deploy.graph.export import RebuiltVan
from van_deploy.graph.fold import RewrittenBlock, RewrittenVan
from van_deploy.precision.scales import ChannelAffine, ChannelRange, Floats, percentile_range

TECHNIQUES = ("cross_layer", "shift_scale", "shift")

STRENGTH = 0.75
# What a channel's range holds: its largest values decide neither shift nor factor.
RANGE_PERCENTILE = 99.99
FACTOR_LIMIT = 64.0  # largest factor, either way: FP16 must hold the result


@dataclass
class Equalization:
    """A changed network, and what was done to its tensors.

    Attributes:
        network: computes in real arithmetic what it did before.
        affines: by the name of each tensor that is another one now.
        inserted: by module, what its input goes through now before it: one Mul and one Add.
    """

    network: RebuiltVan
    affines: dict[str, ChannelAffine] = field(default_factory=dict)
    inserted: dict[str, ChannelAffine] = field(default_factory=dict)


class ShiftScale(nn.Module):
    """Shifts and scales by channel: ``x * multiplier + offset``, both ``(C, 1, 1)`` float32."""

    def __init__(self, affine: ChannelAffine) -> None:
        super().__init__()
        multiplier, offset = affine.multiply_add()
        self.multiplier = nn.Parameter(torch.from_numpy(multiplier)[:, None, None], False)
        self.offset = nn.Parameter(torch.from_numpy(offset)[:, None, None], False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        return x * self.multiplier + self.offset


@torch.no_grad()
def equalize(
    network: RebuiltVan,
    ranges: Mapping[str, ChannelRange],
    layers: Collection[str],
    techniques: Collection[str] = TECHNIQUES,
) -> Equalization:
    """Return a copy of ``network`` in which the inputs of ``layers`` are easier to round.

    Args:
        network: it is not changed.
        ranges: of its tensors, counted where ``layers`` read.
        layers: modules that will be quantised.
        techniques: some of :data:`TECHNIQUES`.
    """
    changed = Equalization(replace(network, model=copy.deepcopy(network.model)))

    def absorb_(tensor: str, source: str, reader: str) -> None:
        """Change ``tensor``, which ``source`` decides by channel and ``reader`` alone reads."""
        made, read = _conv(changed, source), _conv(changed, reader)
        shift = "shift" in techniques and tensor == source and read.kernel_size == (1, 1)
        affine = _affine(ranges[tensor], shift=shift, scale=True)
        factor = torch.from_numpy(affine.factor)
        made.weight.copy_(made.weight.double() / factor[:, None, None, None])
        _set_bias_(made, (_bias(made) - torch.from_numpy(affine.shift)) / factor)
        _take_in_(read, affine)
        changed.affines[tensor] = affine

    for name, block in _blocks(changed.network.model):
        unit, mlp = f"{name}.attn.spatial_gating_unit", f"{name}.mlp"
        sites = (
            (f"{unit}.conv0", f"{unit}.conv0", f"{unit}.conv_spatial"),
            (f"{mlp}.fc1", f"{mlp}.fc1", f"{mlp}.dwconv.dwconv"),
            (f"{unit}.conv_spatial", f"{unit}.conv_spatial", f"{unit}.conv1"),
            (unit, f"{unit}.conv1", f"{name}.attn.proj_2"),
        )
        for tensor, source, reader in sites if "cross_layer" in techniques else ():
            if reader in layers:
                absorb_(tensor, source, reader)
        if unit in changed.affines:
            changed.affines[f"{unit}.conv1"] = changed.affines[unit]
        if "shift_scale" in techniques and f"{mlp}.fc2" in layers:
            affine = _affine(ranges[f"{mlp}.act"], shift=True, scale=True)
            changed.inserted[f"{mlp}.fc2"] = affine
            block.mlp.act = nn.Sequential(block.mlp.act, ShiftScale(affine))  # type: ignore[assignment]
            _take_in_(block.mlp.fc2, affine)
    if "shift" in techniques:
        for stage in network.model.config.stages:
            _shift_stream_(changed, ranges, layers, stage)
    return changed


def _affine(record: ChannelRange, *, shift: bool, scale: bool) -> ChannelAffine:
    """Return the change after which the channels of a tensor fill more equal ranges."""
    low, high = percentile_range(record, RANGE_PERCENTILE)
    middle = (low + high) / 2 if shift else np.zeros(len(low))
    width = np.maximum(np.maximum(high - middle, middle - low), 1e-12)
    relative = np.maximum(width, width.max() / FACTOR_LIMIT)
    relative /= np.exp(np.log(relative).mean())
    factor = np.clip(relative, 1 / FACTOR_LIMIT, FACTOR_LIMIT) ** STRENGTH
    return ChannelAffine(middle, factor if scale else np.ones(len(low)))


def _shift_stream_(
    changed: Equalization, ranges: Mapping[str, ChannelRange], layers: Collection[str], stage: int
) -> None:
    """Centre the residual stream of a stage wherever a layer reads it.

    What adds to the stream subtracts the new centre in its bias, and the last addition
    returns the stream to what it was.
    """
    blocks = dict(_blocks(changed.network.model, stage))
    embed = f"patch_embed{stage}.proj"
    readers = [f"{name}.{part}" for name in blocks for part in ("attn.proj_1", "mlp.fc1")]
    sources = [f"{name}.{part}" for name in blocks for part in ("attn.proj_2", "mlp.fc2")]
    tensors = [tensor for name in blocks for tensor in (f"{name}.add", name)]
    skip_gains = [skip_gain for block in blocks.values() for skip_gain in (block.skip_gain, None)]
    before: Floats = np.zeros(len(ranges[embed].minimum))
    for tensor, source, reader, skip_gain in zip(
        [embed, *tensors], [embed, *sources], [*readers, ""], [None, *skip_gains], strict=True
    ):
        carried = before if skip_gain is None else before * skip_gain.double().numpy()
        affine = ChannelAffine(np.zeros(len(before)), np.ones(len(before)))
        if reader in layers:
            affine = _affine(ranges[tensor], shift=True, scale=False)
            _take_in_(_conv(changed, reader), affine)
        conv, moved = _conv(changed, source), affine.shift - carried
        _set_bias_(conv, _bias(conv) - torch.from_numpy(moved))
        changed.affines[source] = ChannelAffine(moved, affine.factor)
        changed.affines[tensor] = affine
        before = affine.shift


def _take_in_(conv: nn.Conv2d, affine: ChannelAffine) -> None:
    """Make ``conv`` take the changed tensor where it took the original."""
    factor, shift = torch.from_numpy(affine.factor), torch.from_numpy(affine.shift)
    weight = conv.weight.double()
    if affine.shift.any():
        _set_bias_(conv, _bias(conv) + weight[:, :, 0, 0] @ shift)
    depthwise = conv.groups > 1
    conv.weight.copy_(
        weight * (factor[:, None, None, None] if depthwise else factor[:, None, None])
    )


def _conv(changed: Equalization, name: str) -> nn.Conv2d:
    return cast("nn.Conv2d", changed.network.model.get_submodule(name))


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(len(conv.weight)).double() if conv.bias is None else conv.bias.double()


def _set_bias_(conv: nn.Conv2d, bias: Tensor) -> None:
    if conv.bias is not None or bias.any():
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)


def _blocks(model: RewrittenVan, *stages: int) -> Iterator[tuple[str, RewrittenBlock]]:
    """Yield the blocks of some stages (of all by default) with their paths."""
    for stage in stages or model.config.stages:
        for index, block in enumerate(model.stage_blocks(stage)):
            yield f"block{stage}.{index}", block
