"""The network after the exact rewrites: what is exported, and nothing else.

Module paths are those of :mod:`van_deploy.model.van`, so that every tensor of
the exported graph can be traced back to a module of the network a user knows.
Which of the optional parts are ``None`` is decided by
:mod:`van_deploy.graph.fold`; with none of them folded, this is the original.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from van_deploy.model.van import STAGES, VAN, Attention, Block, Mlp


class RewrittenBlock(nn.Module):
    """A VAN block whose normalisations and scales may have been folded away.

    Attributes:
        norm1: BatchNorm before the attention, or None once in ``proj_1``.
        norm2: BatchNorm before the MLP, or None once in ``fc1``.
        layer_scale_1: ``(C,)``, or None once in ``proj_2``.
        layer_scale_2: ``(C,)``, or None once in ``fc2``.
        inner_scale: ``(C,)`` factor of the attention's inner shortcut when its
            layer scale was folded but ``norm1`` was not, else None (one).
        carry: ``(C,)`` factor of the residual stream through the attention
            half, or None where it is one.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1: nn.Module | None = block.norm1
        self.attn: Attention = block.attn
        self.norm2: nn.Module | None = block.norm2
        self.mlp: Mlp = block.mlp
        self.layer_scale_1: Tensor | None = block.layer_scale_1
        self.layer_scale_2: Tensor | None = block.layer_scale_2
        self.inner_scale: Tensor | None
        self.carry: Tensor | None
        self.register_buffer("inner_scale", None)
        self.register_buffer("carry", None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        x = _scaled(x, self.carry) + self._attention(x)
        hidden = x if self.norm2 is None else self.norm2(x)
        return x + _scaled(self.mlp(hidden), self.layer_scale_2)

    def _attention(self, x: Tensor) -> Tensor:
        attn = self.attn
        normed = x if self.norm1 is None else self.norm1(x)
        y = attn.proj_2(attn.spatial_gating_unit(attn.activation(attn.proj_1(normed))))
        if self.norm1 is not None:
            y = y + _scaled(normed, self.inner_scale)
        return _scaled(y, self.layer_scale_1)


class StageNorm(nn.LayerNorm):
    """A stage's LayerNorm over channels.

    Args:
        norm: the LayerNorm whose weights are taken.
        channels_last: normalise through a permutation instead of through
            tokens, so that nothing in the graph depends on the batch.
        last: the last stage of a classifier pools the tokens, the others return maps.
    """

    def __init__(self, norm: nn.LayerNorm, channels_last: bool, last: bool) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, dtype=norm.weight.dtype)
        self.weight, self.bias = norm.weight, norm.bias
        self.channels_last = channels_last
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape, or to ``(N, C)`` in the last stage."""
        if self.channels_last:
            x = super().forward(x.permute(0, 2, 3, 1))  # (N, H, W, C)
            return x.mean(dim=(1, 2)) if self.last else x.permute(0, 3, 1, 2)
        batch, _, height, width = x.shape
        x = super().forward(x.flatten(2).transpose(1, 2))  # (N, H*W, C)
        if self.last:
            return x.mean(dim=1)
        return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()


class RewrittenVan(nn.Module):
    """A VAN assembled from rewritten blocks; takes over the modules of ``model``.

    Args:
        model: the network to start from. Its modules are used, not copied: it
            must not be used afterwards.
        channels_last: see :class:`StageNorm`.
    """

    def __init__(self, model: VAN, channels_last: bool) -> None:
        super().__init__()
        self.config = model.config
        classifies = not self.config.out_indices
        for stage in self.config.stages:
            self.add_module(f"patch_embed{stage}", model.get_submodule(f"patch_embed{stage}"))
            originals = cast("nn.ModuleList", model.get_submodule(f"block{stage}"))
            blocks = [RewrittenBlock(cast("Block", block)) for block in originals]
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            norm = cast("nn.LayerNorm", model.get_submodule(f"norm{stage}"))
            stage_norm = StageNorm(norm, channels_last, last=classifies and stage == STAGES)
            self.add_module(f"norm{stage}", stage_norm)
        self.head = model.head

    def stage_blocks(self, stage: int) -> list[RewrittenBlock]:
        """Return the blocks of ``stage`` (1 to 4) in order."""
        blocks = cast("nn.ModuleList", self.get_submodule(f"block{stage}"))
        return [cast("RewrittenBlock", block) for block in blocks]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map normalised images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

        With ``config.out_indices`` to these stages' maps ``(N, C, h, w)``.
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


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``x (N, C, H, W)`` times ``scale (C,)``, or ``x`` where there is none."""
    return x if scale is None else x * scale[:, None, None]
