"""Seeded random weights whose activations stay of natural size.

With the official initialisation and BatchNorm's default statistics a VAN's
activations grow without bound, and any drift measured on it means nothing. So
the statistics are those of a few smooth random images, and the scales and
shifts that training would have moved are moved too.
"""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.optim.swa_utils import update_bn

from van_deploy.model.van import VAN, Block
from van_deploy.model.variants import VanConfig

_IMAGES, _SIDE = 4, 96
_LONG_STAGE = 3  # blocks


def random_van(config: VanConfig, seed: int = 0) -> VAN:
    """Return a VAN with the official initialisation and fitting BatchNorm statistics.

    In evaluation mode, float32, without gradients. The same seed gives the same
    network; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = VAN(config).requires_grad_(False)
        _move_affines_(model)
        update_bn([smooth_images(_IMAGES, config.in_chans, _SIDE)], model)
    return model.eval()


def smooth_images(count: int, channels: int, side: int) -> Tensor:
    """Return ``(count, channels, side, side)`` float32 about 0, with about a 1/f spectrum.

    Drawn from the global random state: a sum of random grids, each twice as
    fine and half as strong as the one before.
    """
    total = torch.zeros(count, channels, side, side)
    cells, strength = 2, 1.0
    while cells <= side:
        grid = torch.randn(count, channels, cells, cells)
        total += strength * interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        cells, strength = 2 * cells, strength / 2
    return total / total.std()


def sha256_of_state(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict: names, types, shapes and bytes."""
    tensors = {name: state[name].contiguous() for name in sorted(state)}
    return hashlib.sha256(save(tensors)).hexdigest()


def _move_affines_(model: VAN) -> None:
    """Move scales and shifts away from 1 and 0, as training would.

    A gate multiplies its input by itself, so what a block lets through feeds
    back squared: the layer scales of a long stage are smaller.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0.0, 0.1)
        elif isinstance(module, Block):
            module.layer_scale_1.uniform_(0.05, 0.3)
            module.layer_scale_2.uniform_(0.05, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            module.bias.normal_(0.0, 0.02)
    for stage, depth in enumerate(model.config.depths, start=1):
        for name, parameter in model.get_submodule(f"block{stage}").named_parameters():
            if "layer_scale" in name:
                parameter.mul_(min(1.0, _LONG_STAGE / depth))
