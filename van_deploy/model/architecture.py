"""The whole architecture, read back from a state dict.

Depths, widths, MLP ratios, classes, input channels, kernels and the layers of
the head are in the tensors' names and shapes, so a checkpoint needs no variant
name. The dilation follows from the first kernel (see
:attr:`~van_deploy.model.variants.VanConfig.lka_dilation`). What no tensor tells
(strides, LayerNorm's ``eps``) is read by :mod:`van_deploy.model.metadata`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from van_deploy.errors import CheckpointError, UsageError
from van_deploy.model.keys import STAGES
from van_deploy.model.van import HEAD_LAYERS
from van_deploy.model.variants import VARIANTS, VanConfig

__all__ = ["config_from_state_dict", "variant_of"]

_WHOLE = "It is incomplete: save the state dict of the whole network."


def config_from_state_dict(
    state: Mapping[str, Tensor], head: Sequence[str] | None = None
) -> tuple[VanConfig, tuple[str, ...]]:
    """Return the architecture of a state dict with official names, and what was assumed.

    Args:
        state: official names to tensors; only shapes are looked at.
        head: the layers of a sequential head by name (``linear``, ``batchnorm`` or one of
            :data:`~van_deploy.model.van.HEAD_LAYERS`), which the weights tell only in part.

    Raises:
        CheckpointError: a tensor that tells the architecture is missing or has a shape no VAN
            has, or the head's layers are not known.
        UsageError: ``head`` is not this head.
    """
    stages = range(1, STAGES + 1)
    embeds = [_shape(state, f"patch_embed{stage}.proj.weight", 4) for stage in stages]
    dims = [shape[0] for shape in embeds]
    depths = [_depth(state, stage) for stage in stages]
    hidden = [_shape(state, f"block{stage}.0.mlp.fc1.weight", 4)[0] for stage in stages]
    gate = "block1.0.attn.spatial_gating_unit"
    kernels = (_kernel(state, f"{gate}.conv0"), _kernel(state, f"{gate}.conv_spatial"))
    layers, notes = _head(state, head)
    classes = [layer for layer in layers if isinstance(layer, int)]
    config = VanConfig(
        embed_dims=tuple(dims),
        depths=tuple(depths),
        mlp_ratios=tuple(_ratio(h, d) for h, d in zip(hidden, dims, strict=True)),
        num_classes=classes[-1] if classes else _classes(state),
        in_chans=embeds[0][1],
        lka_kernels=kernels,
        patch_sizes=tuple(shape[2] for shape in embeds),
        head=layers,
    )
    if kernels != (5, 7):
        notes += (
            f"kernels {kernels[0]} and {kernels[1]}: the dilation {config.lka_dilation} is the "
            "paper's for the first, the weights do not say",
        )
    return config, notes


def variant_of(config: VanConfig) -> str | None:
    """Return the published variant with this architecture (classes and channels aside)."""

    def body(config: VanConfig) -> tuple[object, ...]:
        return (config.embed_dims, config.depths, config.hidden_dims, config.lka_kernels)

    return next((n for n, known in VARIANTS.items() if body(known.config) == body(config)), None)


def _depth(state: Mapping[str, Tensor], stage: int) -> int:
    matches = (re.match(rf"block{stage}\.(\d+)\.", name) for name in state)
    blocks = {int(match[1]) for match in matches if match}
    if not blocks:
        raise CheckpointError(f"The checkpoint has no block in stage {stage} of the VAN.", _WHOLE)
    gaps = sorted(set(range(len(blocks))) - blocks)
    if gaps:
        raise CheckpointError(
            f"The checkpoint lacks block{stage}.{gaps[0]} but has block{stage}.{max(blocks)}.",
            _WHOLE,
        )
    return len(blocks)


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"The checkpoint lacks {name}, which tells the architecture.", _WHOLE)
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


def _classes(state: Mapping[str, Tensor]) -> int:
    """Return the outputs of a linear head, 0 of a backbone."""
    headless = not any(name.startswith("head.") for name in state)
    return 0 if headless else _shape(state, "head.weight", 2)[0]


def _ratio(hidden: int, dim: int) -> float:
    return hidden // dim if hidden % dim == 0 else hidden / dim


def _head(
    state: Mapping[str, Tensor], given: Sequence[str] | None
) -> tuple[tuple[int | str, ...], tuple[str, ...]]:
    """Return the layers of a sequential head, empty for a linear one, and what was assumed."""
    pattern = re.compile(r"head\.(\d{1,3})\.(weight|running_mean)")
    numbers = {int(match[1]) for name in state if (match := pattern.fullmatch(name))}
    if not numbers or "head.weight" in state:
        if given is not None:
            what = (
                "The head is one linear layer." if "head.weight" in state else "There is no head."
            )
            raise UsageError(what, "Leave out --head.")
        return (), ()
    layers: list[int | str] = ["?"] * (max(numbers) + 1)
    for index in numbers:
        weight = state.get(f"head.{index}.weight", torch.empty(0))
        layers[index] = len(weight) if weight.ndim == 2 else "batchnorm"
    kinds = ["linear" if isinstance(layer, int) else layer for layer in layers]
    if given is None:
        first = min(numbers)
        if "?" not in kinds[first:]:
            note = "the head begins with layers without weights: taken for dropout (--head)"
            return ("dropout",) * first + tuple(layers[first:]), (note,) if first else ()
        raise CheckpointError(
            f"The head is {', '.join(kinds)}: the weights do not say what stands at each '?'.",
            "Say all its layers, such as --head "
            f"{','.join('relu' if kind == '?' else kind for kind in kinds)}; without weights "
            f"there are {', '.join(HEAD_LAYERS)}.",
        )
    pairs = list(zip_longest(kinds, given, fillvalue="?"))
    if any(said not in HEAD_LAYERS if kind == "?" else kind != said for kind, said in pairs):
        raise UsageError(
            f"--head {','.join(given)} is not the checkpoint's: {', '.join(kinds)}.",
            f"Each '?' is one of {', '.join(HEAD_LAYERS)}.",
        )
    known = zip_longest(layers, given, fillvalue="?")
    return tuple(said if layer == "?" else layer for layer, said in known), ()
