"""A network with its BatchNorms, scales and spare biases folded away, exactly.

Every rewrite is an identity of real arithmetic, done here in float64. Below,
``BN(x) = s * x + t`` per channel, with ``s = weight / sqrt(var + eps)`` and
``t = bias - mean * s``; ``W`` and ``b`` are a convolution's weight and bias.

====================  ========================================================
``patch_norm``        the patch embedding's BatchNorm into its convolution
``block_norm``        ``norm1`` into ``proj_1`` and ``norm2`` into ``fc1``:
                      ``W' = W diag(s)``, ``b' = b + W t``. Exact because both
                      are 1x1 and unpadded. The shift of the inner shortcut
                      goes into ``proj_2``'s bias, its scale into the carry
``layer_scale``       ``layer_scale_1`` into ``proj_2``, ``_2`` into ``fc2``
``spatial_bias``      ``conv_spatial``'s bias through the 1x1 ``conv1``:
                      ``b1' = b1 + W1 b``. (``conv0``'s bias has to stay:
                      ``conv_spatial`` pads with zeros.)
``final_norm``        the last LayerNorm's scale and shift into the head: the
                      mean over tokens between them is linear. A backbone has no
                      head, and keeps them
``channels_last``     LayerNorm through a permutation instead of a reshape, so
                      that nothing in the graph depends on the batch
``residual_stream``   the carry ``D = 1 + layer_scale_1 * s`` that
                      ``block_norm`` and ``layer_scale`` leave on the residual
                      stream, by re-scaling the stream: see :func:`_rescale_stream_`
====================  ========================================================
"""

# PyTorch types every attribute of a module as `Tensor | Module`, so the algebra
# below cannot be typed without a cast on every line; the tests run all of it.
# mypy: disable-error-code="operator,arg-type,assignment,misc,index,union-attr"

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from van_deploy.errors import UsageError
from van_deploy.graph.rewritten import RewrittenBlock, RewrittenVan
from van_deploy.model.van import STAGES, VAN, PatchEmbed

FOLD_TOLERANCE = 1e-10
"""Largest relative error accepted between original and rewritten in float64."""

STREAM_LIMIT = 256.0
"""Largest factor, either way, by which a residual channel may be re-scaled.

Float32 would stand far more; FP16's range (6.1e-5 to 65504) is what this leaves
room for. Past it, a channel keeps its multiply in that block and starts afresh.
"""


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites to make; all of them by default. See the module's table."""

    patch_norm: bool = True
    block_norm: bool = True
    layer_scale: bool = True
    spatial_bias: bool = True
    final_norm: bool = True
    channels_last: bool = True
    residual_stream: bool = True

    @classmethod
    def none(cls) -> Rewrites:
        """Return the choice that leaves the network as it is."""
        return cls(**{field.name: False for field in fields(cls)})

    def __post_init__(self) -> None:
        """Refuse a choice that cannot be carried out."""
        if self.residual_stream and not (self.block_norm and self.layer_scale):
            raise UsageError(
                "The rewrite 'residual_stream' needs 'block_norm' and 'layer_scale': "
                "without them there is no carry to absorb.",
                "Switch 'residual_stream' off as well.",
            )


@dataclass(frozen=True)
class FoldReport:
    """What folding did, and how exactly.

    Attributes:
        model: the rewritten network, float32, eval mode.
        rewrites: what was asked.
        batchnorms_folded: BatchNorms that are gone.
        batchnorms_left: BatchNorms still in the network.
        layer_scales_folded: layer scales that are gone.
        multiplies_kept: blocks whose carry is still a multiply in the graph.
        relative_error: ``max|difference| / max|logit|`` between the original
            and the rewritten network, both in float64, on ``images_compared``;
            of feature maps, the largest of any stage.
        images_compared: how many images that was measured on.
    """

    model: RewrittenVan
    rewrites: Rewrites
    batchnorms_folded: int
    batchnorms_left: int
    layer_scales_folded: int
    multiplies_kept: int
    relative_error: float
    images_compared: int

    @property
    def passed(self) -> bool:
        """Whether the rewritten network is the original within :data:`FOLD_TOLERANCE`."""
        return self.relative_error <= FOLD_TOLERANCE  # False for NaN

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, object]:
        """Return the figures, ready for JSON."""
        return {
            "rewrites": [f.name for f in fields(Rewrites) if getattr(self.rewrites, f.name)],
            "batchnorms_folded": self.batchnorms_folded,
            "batchnorms_left": self.batchnorms_left,
            "layer_scales_folded": self.layer_scales_folded,
            "multiplies_kept": self.multiplies_kept,
            "relative_error_float64": self.relative_error,
            "tolerance": FOLD_TOLERANCE,
            "images_compared": self.images_compared,
            "passed": self.passed,
        }


@torch.no_grad()
def fold_van(model: VAN, images: Tensor, rewrites: Rewrites | None = None) -> FoldReport:
    """Return ``model`` rewritten for export, proved against itself on ``images``.

    Args:
        model: the original network in eval mode; it is not changed.
        images: ``(N, in_chans, H, W)`` normalised, real or of natural
            statistics. Both networks see them in float64.
        rewrites: which rewrites to make (default: all).
    """
    rewrites = Rewrites() if rewrites is None else rewrites
    work = copy.deepcopy(model).double().eval()
    batchnorms = _count(work, nn.BatchNorm2d)
    expected = _answers(work, images)
    rewritten = RewrittenVan(work, rewrites.channels_last).eval()
    _rewrite_(rewritten, rewrites)
    actual = _answers(rewritten, images)
    error = max(
        float((a - e).abs().max() / e.abs().max()) for a, e in zip(actual, expected, strict=True)
    )
    left = _count(rewritten, nn.BatchNorm2d)
    blocks = [block for stage in model.config.stages for block in rewritten.stage_blocks(stage)]
    scales = [scale for b in blocks for scale in (b.layer_scale_1, b.layer_scale_2)]
    return FoldReport(
        model=rewritten.float().requires_grad_(False),
        rewrites=rewrites,
        batchnorms_folded=batchnorms - left,
        batchnorms_left=left,
        layer_scales_folded=sum(scale is None for scale in scales),
        multiplies_kept=sum(block.carry is not None for block in blocks),
        relative_error=error,
        images_compared=len(images),
    )


def _rewrite_(model: RewrittenVan, rewrites: Rewrites) -> None:
    """Carry out ``rewrites`` on ``model`` (float64), in the order they build on each other."""
    for stage in model.config.stages:
        embed, blocks = model.get_submodule(f"patch_embed{stage}"), model.stage_blocks(stage)
        if rewrites.patch_norm:
            _fold_patch_norm_(embed)
        for block in blocks:
            if rewrites.block_norm:
                _fold_block_norms_(block)
            if rewrites.layer_scale:
                _fold_layer_scales_(block)
            if rewrites.spatial_bias:
                _fold_spatial_bias_(block)
        if rewrites.residual_stream:
            _rescale_stream_(embed, blocks)
    if rewrites.final_norm:
        _fold_final_norm_(model)


def _fold_patch_norm_(embed: PatchEmbed) -> None:
    scale, shift = _affine(embed.norm)
    _scale_outputs_(embed.proj, scale)
    embed.proj.bias += shift
    embed.norm = nn.Identity()


def _fold_block_norms_(block: RewrittenBlock) -> None:
    scale, shift = _affine(block.norm1)
    _absorb_input_(block.attn.proj_1, scale, shift)
    block.attn.proj_2.bias += shift  # of the inner shortcut, before any layer scale
    block.carry = 1 + block.layer_scale_1 * scale
    block.norm1 = None
    _absorb_input_(block.mlp.fc1, *_affine(block.norm2))
    block.norm2 = None


def _fold_layer_scales_(block: RewrittenBlock) -> None:
    if block.norm1 is not None:
        block.inner_scale = block.layer_scale_1.data
    _scale_outputs_(block.attn.proj_2, block.layer_scale_1)
    _scale_outputs_(block.mlp.fc2, block.layer_scale_2)
    block.layer_scale_1 = block.layer_scale_2 = None


def _fold_spatial_bias_(block: RewrittenBlock) -> None:
    unit = block.attn.spatial_gating_unit
    unit.conv1.bias += unit.conv1.weight[:, :, 0, 0] @ unit.conv_spatial.bias
    unit.conv_spatial.bias = None


def _fold_final_norm_(model: RewrittenVan) -> None:
    if model.config.out_indices:
        return
    norm, head = model.get_submodule(f"norm{STAGES}"), model.head
    if isinstance(head, nn.Sequential):
        idle = (nn.Dropout, nn.Identity, nn.Flatten)
        head = next((layer for layer in head if not isinstance(layer, idle)), head)
    if not isinstance(head, nn.Linear):
        return  # another layer stands before the first linear one
    head.bias += head.weight @ norm.bias
    head.weight *= norm.weight
    norm.weight.fill_(1)  # the ONNX operator wants a scale
    norm.bias = None


def _rescale_stream_(embed: PatchEmbed, blocks: list[RewrittenBlock]) -> None:
    """Absorb the carries of one stage by re-scaling its residual stream.

    With ``x_k`` the stream before block ``k`` and ``D_k`` that block's carry,
    set ``x_k = P_k y_k``. Then ``x' = D x + f(x)`` becomes
    ``y' = (D_k P_k / P_{k+1}) y + f(P_k y) / P_{k+1}``, and the multiply is gone
    where ``P_k = P_{k+1} / D_k``. The 1x1 convolutions on either side absorb
    every ``P``. Going *backwards* from ``P = 1`` after the last block leaves
    nothing for the LayerNorm, and the first ``P`` goes into the patch embedding.

    Every channel by itself: one whose ``P`` would pass :data:`STREAM_LIMIT` keeps
    its carry in that block's multiply, and starts again from ``P = 1``; the others'
    factor there is 1. Where a multiply stays, channels more than half way to the
    limit start again as well, since it costs nothing and saves later multiplies.
    """
    after = torch.ones_like(embed.proj.bias)
    for block in reversed(blocks):
        before = after / block.carry
        absorbed = _within(before, STREAM_LIMIT)
        left = None
        if not absorbed.all():
            absorbed = _within(before, math.sqrt(STREAM_LIMIT))
            left = torch.where(absorbed, 1.0, block.carry / after)
            before = torch.where(absorbed, before, 1.0)
        block.carry = left
        _scale_inputs_(block.attn.proj_1, before)
        _scale_outputs_(block.attn.proj_2, 1 / after)
        _scale_inputs_(block.mlp.fc1, after)
        _scale_outputs_(block.mlp.fc2, 1 / after)
        after = before
    if isinstance(embed.norm, nn.BatchNorm2d):
        embed.norm.weight /= after
        embed.norm.bias /= after
    else:
        _scale_outputs_(embed.proj, 1 / after)


def _within(factor: Tensor, limit: float) -> Tensor:
    return (factor.abs() <= limit) & (factor.abs() >= 1 / limit)


def _answers(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits of a float64 network, or its feature maps.

    PyTorch has no float64 kernel for depth-wise convolutions and makes one small
    product a channel, which is most of the time an export would take. While this
    runs they are one product over all channels.
    """
    grouped = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    for conv in grouped:
        conv.forward = functools.partial(_depthwise, conv)
    try:
        answers = model(images.double())
        return answers if isinstance(answers, tuple) else (answers,)
    finally:
        for conv in grouped:
            del conv.forward


def _depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a depth-wise convolution with stride 1 of ``x (N, C, H, W)``."""
    batch, channels, height, width = x.shape
    taps = conv.weight.reshape(channels, -1)
    columns = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding)
    columns = columns.reshape(batch, channels, taps.shape[1], height * width)
    y = torch.einsum("nctp,ct->ncp", columns, taps).reshape(x.shape)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm in eval mode as its scale and shift, both ``(C,)``."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _absorb_input_(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Make a 1x1 ``conv`` take ``x`` where it took ``scale * x + shift``."""
    conv.bias += conv.weight[:, :, 0, 0] @ shift
    _scale_inputs_(conv, scale)


def _scale_inputs_(conv: nn.Conv2d, scale: Tensor) -> None:
    conv.weight *= scale[None, :, None, None]


def _scale_outputs_(conv: nn.Conv2d, scale: Tensor) -> None:
    conv.weight *= scale[:, None, None, None]
    conv.bias *= scale


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())
