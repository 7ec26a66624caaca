"""Fold BatchNorms, layer scales and redundant biases into convolutions, exactly.

Every rewrite is an identity in real arithmetic, computed here in float64. Below,
``BN(x) = s * x + t`` per channel, with ``s = weight / sqrt(var + eps)`` and
``t = bias - mean * s``; ``W`` and ``b`` are a convolution's weight and bias.

====================  ========================================================
``patch_norm``        the patch embedding's BatchNorm into its convolution
``block_norm``        ``norm1`` into ``proj_1`` and ``norm2`` into ``fc1``:
                      ``W' = W diag(s)``, ``b' = b + W t``. Exact because both
                      are 1x1 and unpadded. The shift of the inner shortcut goes
                      into ``proj_2``'s bias, its scale into the skip gain
``layer_scale``       ``layer_scale_1`` into ``proj_2``, ``_2`` into ``fc2``
``spatial_bias``      ``conv_spatial``'s bias through the 1x1 ``conv1``:
                      ``b1' = b1 + W1 b``. (``conv0``'s bias stays, because
                      ``conv_spatial`` pads with zeros.)
``final_norm``        the last LayerNorm's scale and shift into the head, since the
                      mean over tokens between them is linear (a backbone has no
                      head and keeps them), and the BatchNorms of a sequential head
                      into the linear layer after or before them
``residual_stream``   the per-channel skip gain ``D = 1 + layer_scale_1 * s`` that
                      ``block_norm`` and ``layer_scale`` leave on the residual
                      stream, by rescaling the stream: see :func:`_rescale_stream_`
====================  ========================================================

The exporter receives a :class:`RewrittenVan`. Its module paths are those of
:mod:`van_deploy.model.van`, so that every tensor of the graph can be traced back to a module of
the original network. Without any rewrite it computes exactly the original.
"""

# PyTorch types every attribute of a module as `Tensor | Module`, so the code below
# would need a cast on every line; the tests run all of it.
# mypy: disable-error-code="operator,arg-type,assignment,misc,index,union-attr"

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from van_deploy.documents import Verdict
from van_deploy.model.van import VAN, Block, PatchEmbed
from van_deploy.model.variants import STAGES

# Largest accepted relative error between the original and the rewritten network in float64.
FOLD_TOLERANCE = 1e-10
# Largest factor (and inverse) by which a residual channel is rescaled. Float32 allows far larger
# factors; the limit leaves headroom in FP16's range (6.1e-5 to 65504). Beyond it, a channel keeps
# the multiply in that block and restarts with a factor of 1.
SKIP_GAIN_LIMIT = 256.0
REWRITES = (
    *("patch_norm", "block_norm", "layer_scale", "spatial_bias", "final_norm"),
    "residual_stream",
)
NO_OPS = (nn.Dropout, nn.Identity, nn.Flatten)  # layers of a head that change nothing


# --- the network -----------------------------------------------------------------------------


class RewrittenBlock(nn.Module):
    """A VAN block with optional normalisations and scales.

    Attributes:
        norm1: BatchNorm before the attention, or None if folded into ``proj_1``.
        norm2: BatchNorm before the MLP, or None if folded into ``fc1``.
        layer_scale_1: ``(C,)``, or None if folded into ``proj_2``.
        layer_scale_2: ``(C,)``, or None if folded into ``fc2``.
        skip_gain: ``(C,)`` factor of the residual stream in the attention
            half, or None (1).
    """

    norm1: nn.Module | None
    norm2: nn.Module | None
    layer_scale_1: Tensor | None
    layer_scale_2: Tensor | None
    skip_gain: Tensor | None

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1, self.attn = block.norm1, block.attn
        self.norm2, self.mlp = block.norm2, block.mlp
        self.layer_scale_1, self.layer_scale_2 = block.layer_scale_1, block.layer_scale_2
        self.register_buffer("skip_gain", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        x = _scale(x, self.skip_gain) + self._attention(x)
        hidden = x if self.norm2 is None else self.norm2(x)
        return x + _scale(self.mlp(hidden), self.layer_scale_2)

    def _attention(self, x: Tensor) -> Tensor:
        attn = self.attn
        normed = x if self.norm1 is None else self.norm1(x)
        y = attn.proj_2(attn.spatial_gating_unit(attn.activation(attn.proj_1(normed))))
        if self.norm1 is not None:
            y = y + normed
        return _scale(y, self.layer_scale_1)


class StageNorm(nn.LayerNorm):
    """A stage's LayerNorm over channels, permuted so that no shape depends on the batch.

    Args:
        norm: the LayerNorm that provides the weights.
        last: pool the tokens, as the last stage of a classifier does; other stages return maps.
    """

    def __init__(self, norm: nn.LayerNorm, last: bool) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, dtype=norm.weight.dtype)
        self.weight, self.bias = norm.weight, norm.bias
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape, or to ``(N, C)`` in the last stage."""
        x = super().forward(x.permute(0, 2, 3, 1))  # (N, H, W, C)
        return x.mean(dim=(1, 2)) if self.last else x.permute(0, 3, 1, 2)


class RewrittenVan(nn.Module):
    """A VAN assembled from rewritten blocks, which takes over the modules of ``model``.

    Args:
        model: the original network. Its modules are not copied, so it
            must not be used afterwards.
    """

    def __init__(self, model: VAN) -> None:
        super().__init__()
        self.config = model.config
        classifies = not self.config.out_indices
        for stage in self.config.stages:
            self.add_module(f"patch_embed{stage}", model.get_submodule(f"patch_embed{stage}"))
            originals: nn.ModuleList = model.get_submodule(f"block{stage}")
            self.add_module(f"block{stage}", nn.ModuleList(map(RewrittenBlock, originals)))
            norm, last = model.get_submodule(f"norm{stage}"), classifies and stage == STAGES
            self.add_module(f"norm{stage}", StageNorm(norm, last))
        self.head = model.head

    def stage_blocks(self, stage: int) -> list[RewrittenBlock]:
        """Return the blocks of ``stage`` (1 to 4) in order."""
        blocks: nn.ModuleList = self.get_submodule(f"block{stage}")
        return list(blocks)

    def named_blocks(self, *stages: int) -> Iterator[tuple[str, RewrittenBlock]]:
        """Yield the blocks of the given stages (default: all) with their module paths."""
        for stage in stages or self.config.stages:
            for index, block in enumerate(self.stage_blocks(stage)):
                yield f"block{stage}.{index}", block

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map normalised images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

        With ``config.out_indices``, return the maps ``(N, C, h, w)`` of these stages.
        """
        maps = []
        for stage in self.config.stages:
            x = self.get_submodule(f"patch_embed{stage}")(x)
            for block in self.stage_blocks(stage):
                x = block(x)
            x = self.get_submodule(f"norm{stage}")(x)
            if stage - 1 in self.config.out_indices:
                maps.append(x)
        return tuple(maps) if maps else self.head(x)


def _scale(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``x (N, C, H, W)`` times ``scale (C,)``, or ``x`` without a scale."""
    return x if scale is None else x * scale[:, None, None]


# --- folding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldReport(Verdict):
    """Result of folding a network.

    Attributes:
        model: the rewritten network, float32, eval mode.
        rewrites: names of the rewrites; empty if the network was not folded.
        batchnorms_folded: number of removed BatchNorms.
        batchnorms_left: number of BatchNorms still in the network.
        layer_scales_folded: number of removed layer scales.
        multiplies_left: number of blocks whose skip gain is still a multiply in the graph.
        relative_error: ``max|difference| / max|logit|`` between the original
            and the rewritten network, both in float64, on ``images_compared`` images;
            for feature maps, the largest of any stage.
        images_compared: number of images.
    """

    model: RewrittenVan
    rewrites: tuple[str, ...]
    batchnorms_folded: int
    batchnorms_left: int
    layer_scales_folded: int
    multiplies_left: int
    relative_error: float
    images_compared: int

    @property
    def passed(self) -> bool:
        """Whether the relative error is within :data:`FOLD_TOLERANCE`."""
        return self.relative_error <= FOLD_TOLERANCE  # False for NaN

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        figures = {k: v for k, v in vars(self).items() if k != "model"}
        figures["relative_error_float64"] = figures.pop("relative_error")
        return {**figures, "tolerance": FOLD_TOLERANCE, "passed": self.passed}


@torch.no_grad()
def fold_van(model: VAN, images: Tensor, *, fold: bool = True) -> FoldReport:
    """Return ``model`` rewritten for export and compared with the original on ``images``.

    Args:
        model: the original network in eval mode, which stays unchanged.
        images: ``(N, in_chans, H, W)`` normalised, real or with natural
            statistics. Both networks process them in float64.
        fold: apply the rewrites.
    """
    work = copy.deepcopy(model).double().eval()
    batchnorms = _count_batchnorms(work)
    expected = _float64_outputs(work, images)
    rewritten = RewrittenVan(work).eval()
    if fold:
        _rewrite_(rewritten)
    pairs = zip(_float64_outputs(rewritten, images), expected, strict=True)
    remaining = _count_batchnorms(rewritten)
    blocks = [block for _, block in rewritten.named_blocks()]
    scales = [scale for b in blocks for scale in (b.layer_scale_1, b.layer_scale_2)]
    return FoldReport(
        model=rewritten.float().requires_grad_(False),
        rewrites=REWRITES if fold else (),
        batchnorms_folded=batchnorms - remaining,
        batchnorms_left=remaining,
        layer_scales_folded=sum(scale is None for scale in scales),
        multiplies_left=sum(block.skip_gain is not None for block in blocks),
        relative_error=float(torch.stack([_relative_error(a, e) for a, e in pairs]).max()),
        images_compared=len(images),
    )


def _rewrite_(model: RewrittenVan) -> None:
    """Apply all rewrites to ``model`` (float64) in the order of their dependencies."""
    for stage in model.config.stages:
        embed, blocks = model.get_submodule(f"patch_embed{stage}"), model.stage_blocks(stage)
        _fold_patch_norm_(embed)
        for block in blocks:
            _fold_block_norms_(block)
            _fold_layer_scales_(block)
            _fold_spatial_bias_(block)
        _rescale_stream_(embed, blocks)
    _fold_final_norm_(model)


def _fold_patch_norm_(embed: PatchEmbed) -> None:
    scale, shift = _affine(embed.norm)
    _scale_outputs_(embed.proj, scale)
    embed.proj.bias += shift
    embed.norm = nn.Identity()


def _fold_block_norms_(block: RewrittenBlock) -> None:
    scale, shift = _affine(block.norm1)
    _absorb_input_(block.attn.proj_1, scale, shift)
    block.attn.proj_2.bias += shift  # shift of the inner shortcut, before any layer scale
    block.skip_gain = 1 + block.layer_scale_1 * scale
    block.norm1 = None
    _absorb_input_(block.mlp.fc1, *_affine(block.norm2))
    block.norm2 = None


def _fold_layer_scales_(block: RewrittenBlock) -> None:
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
        _fold_head_norms_(head)
        head = next((layer for layer in head if not isinstance(layer, NO_OPS)), head)
    if not isinstance(head, nn.Linear):
        return  # another layer precedes the first linear one
    head.bias += head.weight @ norm.bias
    head.weight *= norm.weight
    norm.weight.fill_(1)  # the ONNX operator requires a scale
    norm.bias = None


def _fold_head_norms_(head: nn.Sequential) -> None:
    names = [name for name, layer in head.named_children() if not isinstance(layer, NO_OPS)]
    for name, next_name in pairwise(names):
        layer, following = head.get_submodule(name), head.get_submodule(next_name)
        if isinstance(layer, nn.BatchNorm1d) and isinstance(following, nn.Linear):
            scale, shift = _affine(layer)
            following.bias += following.weight @ shift
            following.weight *= scale
            setattr(head, name, nn.Identity())
        elif isinstance(layer, nn.Linear) and isinstance(following, nn.BatchNorm1d):
            scale, shift = _affine(following)
            layer.weight *= scale[:, None]
            layer.bias.mul_(scale).add_(shift)
            setattr(head, next_name, nn.Identity())


def _rescale_stream_(embed: PatchEmbed, blocks: list[RewrittenBlock]) -> None:
    """Absorb the skip gains of one stage by rescaling its residual stream.

    Let ``x_k`` be the stream before block ``k``, ``D_k`` the skip gain of that block, and
    ``x_k = P_k y_k``. Then ``x' = D x + f(x)`` becomes
    ``y' = (D_k P_k / P_{k+1}) y + f(P_k y) / P_{k+1}``, and ``P_k = P_{k+1} / D_k``
    removes the multiply. The 1x1 convolutions on both sides absorb every ``P``. Going
    *backwards* from ``P = 1`` after the last block leaves the LayerNorm unchanged, and
    the patch embedding absorbs the first ``P``.

    Channels are independent: one whose ``P`` would exceed :data:`SKIP_GAIN_LIMIT` keeps
    its skip gain in that block's multiply and restarts from ``P = 1``; the other channels'
    factor in this multiply is 1. If a block keeps its multiply, channels beyond the square
    root of the limit also restart, which costs nothing and avoids later multiplies.
    """
    after = torch.ones_like(embed.proj.bias)
    for block in reversed(blocks):
        before = after / block.skip_gain
        absorbed = _within(before, SKIP_GAIN_LIMIT)
        remaining = None
        if not absorbed.all():
            absorbed = _within(before, math.sqrt(SKIP_GAIN_LIMIT))
            remaining = torch.where(absorbed, 1.0, block.skip_gain / after)
            before = torch.where(absorbed, before, 1.0)
        block.skip_gain = remaining
        _scale_inputs_(block.attn.proj_1, before)
        _scale_outputs_(block.attn.proj_2, 1 / after)
        _scale_inputs_(block.mlp.fc1, after)
        _scale_outputs_(block.mlp.fc2, 1 / after)
        after = before
    _scale_outputs_(embed.proj, 1 / after)


def _within(factor: Tensor, limit: float) -> Tensor:
    return (factor.abs() <= limit) & (factor.abs() >= 1 / limit)


def _float64_outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """Return the logits of a float64 network, or its feature maps.

    PyTorch has no float64 kernel for depth-wise convolutions and computes one small
    product per channel, which would dominate the time of an export. This function
    replaces them with one product over all channels.
    """
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    for conv in depthwise:
        conv.forward = functools.partial(_depthwise_convolution, conv)
    try:
        outputs = model(images.double())
        return outputs if isinstance(outputs, tuple) else (outputs,)
    finally:
        for conv in depthwise:
            del conv.forward


def _depthwise_convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a depth-wise convolution with stride 1 of ``x (N, C, H, W)``."""
    batch, channels, height, width = x.shape
    taps = conv.weight.reshape(channels, -1)
    columns = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding)
    columns = columns.reshape(batch, channels, taps.shape[1], height * width)
    y = torch.einsum("nctp,ct->ncp", columns, taps).reshape(x.shape)
    return y if conv.bias is None else y + conv.bias[:, None, None]


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # 0 for a zero head
    return (actual - expected).abs().max() / largest


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, both ``(C,)``, of a BatchNorm in eval mode."""
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _absorb_input_(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Change a 1x1 ``conv`` so that its input is ``x`` instead of ``scale * x + shift``."""
    conv.bias += conv.weight[:, :, 0, 0] @ shift
    _scale_inputs_(conv, scale)


def _scale_inputs_(conv: nn.Conv2d, scale: Tensor) -> None:
    conv.weight *= scale[None, :, None, None]


def _scale_outputs_(conv: nn.Conv2d, scale: Tensor) -> None:
    conv.weight *= scale[:, None, None, None]
    conv.bias *= scale


def _count_batchnorms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())
