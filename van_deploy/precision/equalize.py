"""Equalise a network's channel ranges exactly, so that INT8 quantisation loses less.

A tensor quantised to int8 with one scale for all channels has the smallest error when every
channel fills the same range around zero. Each technique applies ``x' = (x - shift) / factor`` by
channel. Linear neighbours absorb both, and the network's function does not change:

=================  ======================================================================
``cross_layer``    cross-layer equalisation (arXiv 1906.04721, section 4.1): a factor
                   between ``conv_spatial`` and ``conv1``, and from ``conv1`` through the
                   gate into ``proj_2``; in scope ``all`` also between ``conv0`` and
                   ``conv_spatial``, and between ``fc1`` and the depth-wise convolution
``shift``          channel-wise shifting (arXiv 2304.09145) of tensors that only 1x1
                   convolutions and additions read: the residual stream, and ``conv1``'s
                   input. The shift moves from one bias into the next (not before a padded
                   convolution, whose padding zeros would also have to be shifted)
``shift_scale``    channel-wise shifting and scaling between GELU and ``fc2``. GELU is not
                   linear, so this adds one Mul and one Add per block, which TensorRT fuses
                   into the kernel of GELU and QuantizeLinear (`docs/precision.md` has the
                   kernel counts)
=================  ======================================================================

A factor is the width of the channel's range to the power :data:`STRENGTH`, SmoothQuant's
migration strength (arXiv 2211.10438). A strength of 1 would equalise the activations fully, but
make the weights that follow harder to quantise.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from van_deploy.graph.export import RebuiltVan
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.scales import ChannelAffine, ChannelRange, Floats, percentile_range

TECHNIQUES = ("cross_layer", "shift_scale", "shift")

STRENGTH = 0.75
# Share of a channel's values that its range covers: outliers affect neither shift nor factor.
RANGE_PERCENTILE = 99.99
FACTOR_LIMIT = 64.0  # largest factor and its inverse: the result must fit into FP16


class ShiftScale(nn.Module):
    """Per-channel affine ``x * multiplier + offset``, both ``(C, 1, 1)`` float32."""

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
) -> QuantizationPlan:
    """Return a copy of ``network`` in which the inputs of ``layers`` are easier to quantise.

    The plan quantises no layer yet. Its network is equivalent to the original in real arithmetic.

    Args:
        network: the original, which stays unchanged.
        ranges: of its tensors, with histograms for the inputs of ``layers``.
        layers: modules that will be quantised.
        techniques: some of :data:`TECHNIQUES`.
    """
    result = QuantizationPlan(replace(network, model=copy.deepcopy(network.model)))

    def absorb_(tensor: str, source: str, reader: str) -> None:
        """Change ``tensor``, scaled by channel in ``source`` and read by ``reader`` only."""
        producer, consumer = _conv(result, source), _conv(result, reader)
        pointwise = consumer.kernel_size == (1, 1) and consumer.groups == 1
        shift = "shift" in techniques and tensor == source and pointwise
        affine = _affine(ranges[tensor], shift=shift)
        factor = torch.from_numpy(affine.factor)
        producer.weight.copy_(producer.weight.double() / factor[:, None, None, None])
        _set_bias_(producer, (_bias(producer) - torch.from_numpy(affine.shift)) / factor)
        _absorb_affine_(consumer, affine)
        result.affines[tensor] = affine

    for name, block in result.network.model.named_blocks():
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
        if unit in result.affines:
            result.affines[f"{unit}.conv1"] = result.affines[unit]
        if "shift_scale" in techniques and f"{mlp}.fc2" in layers:
            affine = _affine(ranges[f"{mlp}.act"], shift=True)
            result.inserted[f"{mlp}.fc2"] = affine
            block.mlp.act = nn.Sequential(block.mlp.act, ShiftScale(affine))  # type: ignore[assignment]
            _absorb_affine_(block.mlp.fc2, affine)
    if "shift" in techniques:
        for stage in network.model.config.stages:
            _shift_stream_(result, ranges, layers, stage)
    return result


def _affine(record: ChannelRange, *, shift: bool) -> ChannelAffine:
    """Return the per-channel affine that makes the channel ranges of a tensor more equal."""
    low, high = percentile_range(record, RANGE_PERCENTILE)
    middle = (low + high) / 2 if shift else np.zeros(len(low))
    width = np.maximum(np.maximum(high - middle, middle - low), 1e-12)
    relative = np.maximum(width, width.max() / FACTOR_LIMIT)
    relative /= np.exp(np.log(relative).mean())
    factor = np.clip(relative, 1 / FACTOR_LIMIT, FACTOR_LIMIT) ** STRENGTH
    return ChannelAffine(middle, factor)


def _shift_stream_(
    result: QuantizationPlan,
    ranges: Mapping[str, ChannelRange],
    layers: Collection[str],
    stage: int,
) -> None:
    """Centre the residual stream of a stage wherever a quantised layer reads it.

    Every convolution that adds to the stream subtracts the new centre in its bias, and the last
    addition restores the original stream.
    """
    blocks = dict(result.network.model.named_blocks(stage))
    embed = f"patch_embed{stage}.proj"
    readers = [f"{name}.{part}" for name in blocks for part in ("attn.proj_1", "mlp.fc1")]
    sources = [f"{name}.{part}" for name in blocks for part in ("attn.proj_2", "mlp.fc2")]
    tensors = [tensor for name in blocks for tensor in (f"{name}.add", name)]
    skip_gains = [skip_gain for block in blocks.values() for skip_gain in (block.skip_gain, None)]
    before: Floats = np.zeros(len(ranges[embed].minimum))
    for tensor, source, reader, skip_gain in zip(
        [embed, *tensors], [embed, *sources], [*readers, ""], [None, *skip_gains], strict=True
    ):
        skipped = before if skip_gain is None else before * skip_gain.double().numpy()
        affine = ChannelAffine(np.zeros(len(before)), np.ones(len(before)))
        if reader in layers:
            affine = replace(affine, shift=_affine(ranges[tensor], shift=True).shift)
            _absorb_affine_(_conv(result, reader), affine)
        conv, shift = _conv(result, source), affine.shift - skipped
        _set_bias_(conv, _bias(conv) - torch.from_numpy(shift))
        result.affines[source] = ChannelAffine(shift, affine.factor)
        result.affines[tensor] = affine
        before = affine.shift


def _absorb_affine_(conv: nn.Conv2d, affine: ChannelAffine) -> None:
    """Change ``conv`` so that it gives the same output for the changed input tensor."""
    factor, shift = torch.from_numpy(affine.factor), torch.from_numpy(affine.shift)
    weight = conv.weight.double()
    if affine.shift.any():
        _set_bias_(conv, _bias(conv) + weight[:, :, 0, 0] @ shift)
    depthwise = conv.groups > 1
    conv.weight.copy_(
        weight * (factor[:, None, None, None] if depthwise else factor[:, None, None])
    )


def _conv(result: QuantizationPlan, name: str) -> nn.Conv2d:
    return cast("nn.Conv2d", result.network.model.get_submodule(name))


def _bias(conv: nn.Conv2d) -> Tensor:
    return torch.zeros(len(conv.weight)).double() if conv.bias is None else conv.bias.double()


def _set_bias_(conv: nn.Conv2d, bias: Tensor) -> None:
    if conv.bias is not None or bias.any():
        conv.bias = nn.Parameter(bias.float(), requires_grad=False)
