"""The whole architecture, read back from a state dict.

Depths, widths, MLP ratios, classes, input channels and the LKA kernels are all
in the tensors' names and shapes, so a checkpoint needs no variant name. The
dilation follows from the first kernel (see
:attr:`~van_deploy.model.variants.VanConfig.lka_dilation`). Only LayerNorm's
``eps`` is in no state dict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from van_deploy.errors import CheckpointError
from van_deploy.model.variants import VARIANTS, VanConfig

__all__ = ["config_from_state_dict", "variant_of"]

STAGES = 4
_BLOCK = re.compile(r"block([1-4])\.(\d+)\.")


def config_from_state_dict(
    state: Mapping[str, Tensor], *, layer_norm_eps: float = 1e-6
) -> VanConfig:
    """Return the architecture of a state dict with official names.

    Args:
        state: official names to tensors; only shapes are looked at.
        layer_norm_eps: what the network was trained with; 1e-6 is the official value.

    Raises:
        CheckpointError: a tensor that tells the architecture is missing or has
            a shape no VAN has.
    """
    depths = tuple(_depth(state, stage) for stage in range(1, STAGES + 1))
    embeds = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in range(1, STAGES + 1)]
    dims = tuple(shape[0] for shape in embeds)
    hidden = [_shape(state, f"block{s}.0.mlp.fc1.weight", 4)[0] for s in range(1, STAGES + 1)]
    if "head.weight" not in state:
        raise CheckpointError(
            "The checkpoint has no classification head (head.weight): it is a bare backbone.",
            "Pass the weights of the whole classifier.",
        )
    gate = "block1.0.attn.spatial_gating_unit"
    return VanConfig(
        embed_dims=dims,
        depths=depths,
        mlp_ratios=tuple(_ratio(h, d) for h, d in zip(hidden, dims, strict=True)),
        num_classes=_shape(state, "head.weight", 2)[0],
        in_chans=embeds[0][1],
        lka_kernels=(_kernel(state, f"{gate}.conv0"), _kernel(state, f"{gate}.conv_spatial")),
        layer_norm_eps=layer_norm_eps,
    )


def variant_of(config: VanConfig) -> str | None:
    """Return the published variant with this architecture (classes and channels aside)."""
    for name, variant in VARIANTS.items():
        if _body(variant.config) == _body(config):
            return name
    return None


def _body(config: VanConfig) -> tuple[object, ...]:
    return (config.embed_dims, config.depths, config.hidden_dims, config.lka_kernels)


def _depth(state: Mapping[str, Tensor], stage: int) -> int:
    matches = (_BLOCK.match(name) for name in state)
    blocks = {int(m[2]) for m in matches if m and int(m[1]) == stage}
    if not blocks:
        raise CheckpointError(
            f"The checkpoint has no block in stage {stage} (block{stage}.0.…).",
            "VAN has four stages; pass the weights of a whole network.",
        )
    gaps = sorted(set(range(len(blocks))) - blocks)
    if gaps:
        raise CheckpointError(
            f"The checkpoint lacks block{stage}.{gaps[0]} but has block{stage}.{max(blocks)}.",
            "It is incomplete: save the state dict of the whole network.",
        )
    return len(blocks)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"The checkpoint lacks {name}, which tells the architecture.",
            "It is incomplete: save the state dict of the whole network.",
        )
    shape = tuple(state[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise CheckpointError(
            f"The tensor {name} has the shape {shape}; a VAN's has {dimensions} dimensions, "
            "none of them 0.",
            "The checkpoint is damaged or of another network.",
        )
    return shape


def _kernel(state: Mapping[str, Tensor], module: str) -> int:
    _, _, height, width = _shape(state, f"{module}.weight", 4)
    if height != width or height % 2 == 0:
        raise CheckpointError(
            f"The kernel of {module} is {height}x{width}; LKA's are square and odd "
            "(5x5 then 7x7 in the published variants).",
            "The gate needs maps of the same size as its input: other kernels are not supported.",
        )
    return height


def _ratio(hidden: int, dim: int) -> float:
    return hidden // dim if hidden % dim == 0 else hidden / dim
