"""The Visual Attention Network (VAN), as the paper and the official code define it.

Parameter names are those of the official repository
(``Visual-Attention-Network/VAN-Classification``, ``models/van.py``,
Apache-2.0), so an official ``state_dict`` loads unchanged. This is the reference
implementation that every artifact is compared with; it is not optimised for speed.
The methods and their arguments follow timm's models.

Layout: images and features are ``(N, C, H, W)``.
"""

import hashlib
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save
from timm.layers import DropPath, Format, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import interpolate

from van_deploy.model.variants import STAGES, VanConfig

# Layers without weights that a sequential head may contain, with PyTorch's default arguments.
_LAYERS = "Dropout Identity Flatten Tanh Sigmoid ReLU ReLU6 LeakyReLU ELU GELU SiLU Mish Hardswish"
HEAD_LAYERS: dict[str, type[nn.Module]] = {n.lower(): getattr(nn, n) for n in _LAYERS.split()}


class DWConv(nn.Module):
    """3x3 depth-wise convolution inside the MLP, which adds positional information."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, dim, H, W)`` to the same shape."""
        return self.dwconv(x)


class Mlp(nn.Module):
    """1x1 convolution, depth-wise 3x3, GELU, 1x1 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.dwconv = DWConv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, dim, H, W)`` to the same shape."""
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class LKA(nn.Module):
    """Large Kernel Attention: a decomposed large-kernel convolution that multiplies its input."""

    def __init__(self, dim: int, kernels: tuple[int, int], dilation: int) -> None:
        super().__init__()
        k0, k1 = kernels
        self.conv0 = nn.Conv2d(dim, dim, k0, padding=k0 // 2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, k1, 1, dilation * (k1 // 2), dilation, groups=dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, dim, H, W)`` to the same shape."""
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class Attention(nn.Module):
    """LKA between two 1x1 convolutions, with a residual connection around all three."""

    def __init__(self, dim: int, kernels: tuple[int, int], dilation: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = LKA(dim, kernels, dilation)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, dim, H, W)`` to the same shape."""
        return self.proj_2(self.spatial_gating_unit(self.activation(self.proj_1(x)))) + x


class Block(nn.Module):
    """VAN block: attention, then MLP, each with BatchNorm, layer scale and a shortcut."""

    def __init__(self, dim: int, hidden: int, config: VanConfig, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = Attention(dim, config.lka_kernels, config.lka_dilation)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        # the official code's layer_scale_init_value
        self.layer_scale_1 = nn.Parameter(1e-2 * torch.ones(dim))
        self.layer_scale_2 = nn.Parameter(1e-2 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, dim, H, W)`` to the same shape."""
        scale_1, scale_2 = self.layer_scale_1[:, None, None], self.layer_scale_2[:, None, None]
        x = x + self.drop_path(scale_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(scale_2 * self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Overlapping patch embedding: a strided convolution and a BatchNorm."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_chans, H, W)`` to ``(N, dim, ceil(H/stride), ceil(W/stride))``."""
        return self.norm(self.proj(x))


class VAN(nn.Module):
    """A complete network: four stages, and a classification head.

    Args:
        config: the architecture; with ``num_classes`` 0 the pooled features are returned.
        drop_path_rate: stochastic depth rate of the last block (training only).
        global_pool: ``avg``, or "" to return the last feature maps (only without a head).

    Raises:
        ValueError: ``global_pool`` has another value, or is "" although there is a head.
    """

    def __init__(
        self, config: VanConfig, drop_path_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        self.config = config
        self.num_features = self.head_hidden_size = config.embed_dims[-1]
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []  # read by timm's features_only
        blocks, previous = sum(config.depths), config.in_chans
        drop_paths = (drop_path_rate / max(blocks - 1, 1) * index for index in range(blocks))
        for index, dim in enumerate(config.embed_dims):
            stage, hidden, depth = index + 1, config.hidden_dims[index], config.depths[index]
            embed = PatchEmbed(previous, dim, config.patch_sizes[index], config.strides[index])
            stage_blocks = (Block(dim, hidden, config, next(drop_paths)) for _ in range(depth))
            self.add_module(f"patch_embed{stage}", embed)
            self.add_module(f"block{stage}", nn.ModuleList(stage_blocks))
            self.add_module(f"norm{stage}", nn.LayerNorm(dim, eps=config.layer_norm_eps))
            info = {"num_chs": dim, "reduction": math.prod(config.strides[:stage])}
            self.feature_info.append({**info, "module": f"norm{stage}"})
            previous = dim
        self.global_pool, self.num_classes = global_pool, config.num_classes
        self.head = _build_head(config, global_pool)
        if not next(self.parameters()).is_meta:
            self.apply(_initialise_)

    def _stage(self, x: Tensor, stage: int) -> Tensor:
        """Run ``stage`` (1 to 4) on feature maps, its LayerNorm included."""
        x = self.get_submodule(f"patch_embed{stage}")(x)
        blocks = list(self.get_submodule(f"block{stage}").children())
        if self.grad_checkpointing:
            x, blocks = checkpoint_seq(blocks, x), []
        for block in blocks:
            x = block(x)
        x = self.get_submodule(f"norm{stage}")(x.permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2).contiguous()

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_chans, H, W)`` to feature maps ``(N, embed_dims[-1], h, w)``."""
        for stage in range(STAGES):
            x = self._stage(x, stage + 1)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str | Format = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the last feature maps and those of chosen stages, ``(N, C, H, W)``.

        Each stage's maps are taken after its LayerNorm, so ``norm`` has no effect.

        Raises:
            ValueError: ``output_fmt`` is not NCHW.
        """
        if Format(output_fmt) is not Format.NCHW:
            raise ValueError("VAN's feature maps are NCHW.")
        take, last = feature_take_indices(STAGES, indices)
        maps = []
        for stage in range(last + 1 if stop_early else STAGES):
            x = self._stage(x, stage + 1)
            if stage in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps to logits ``(N, num_classes)``; only pool with ``pre_logits``."""
        x = x.mean(dim=(2, 3)) if self.global_pool else x
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Map normalised images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

        With ``config.out_indices``, return the feature maps ``(N, C, h, w)`` of these stages
        after their LayerNorms, as timm's ``features_only`` and OpenMMLab's backbones do.
        """
        if self.config.out_indices:
            indices = list(self.config.out_indices)
            return tuple(self.forward_intermediates(x, indices, stop_early=True)[1])
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the classification head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by an initialised one with ``num_classes`` outputs.

        Raises:
            ValueError: ``global_pool`` is not ``avg`` or "", or is "" although there is a head.
        """
        pool = self.global_pool if global_pool is None else global_pool
        self.head = _build_head(replace(self.config, num_classes=num_classes, head=()), pool)
        self.head.apply(_initialise_)
        self.global_pool, self.num_classes = pool, num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing of the blocks on or off, as in timm."""
        self.grad_checkpointing = enable


def _build_head(config: VanConfig, pool: str) -> nn.Module:
    """Return an initialised head: one linear layer, a sequence of layers, or ``Identity``."""
    classes, width = config.num_classes, config.embed_dims[-1]
    if pool not in ("avg", "") or (classes and not pool):
        raise ValueError(f"global_pool is {pool!r} for {classes} classes: 'avg', or '' for none.")
    layers: list[nn.Module] = []
    for layer in config.head or ((classes,) if classes else ()):
        if isinstance(layer, int):
            layers.append(nn.Linear(width, layer))
            width = layer
        else:
            layers.append(nn.BatchNorm1d(width) if layer == "batchnorm" else HEAD_LAYERS[layer]())
    return nn.Sequential(*layers) if config.head else layers[0] if layers else nn.Identity()


def _initialise_(module: nn.Module) -> None:
    """Initialise a module's weights as the official code does."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (fan_out // module.groups)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- random weights --------------------------------------------------------------------------

# With the official initialisation and BatchNorm's default statistics, the activations of a VAN grow
# without bound, and drift measured on it is meaningless. So BatchNorm's statistics are estimated on
# a few smooth random images, and the scales and shifts that training changes are randomised too.


def random_van(config: VanConfig, seed: int = 0) -> VAN:
    """Return a VAN with the official initialisation and estimated BatchNorm statistics.

    It is in evaluation mode, float32, without gradients. The same seed gives the same
    network, with any number of threads; the global random state is restored. LKA multiplies
    its input by a function of itself, so activations grow quadratically with depth: in stages
    of more than 3 blocks the layer scales are reduced.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the rounding of the statistics depends on it
        torch.manual_seed(seed)
        model = VAN(config).requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0.0, 0.1)
            elif isinstance(module, Block):
                module.layer_scale_1.uniform_(0.05, 0.3)
                module.layer_scale_2.uniform_(0.05, 0.3)
            elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0.0, 0.02)
        for stage, depth in enumerate(config.depths, start=1):
            for name, parameter in model.get_submodule(f"block{stage}").named_parameters():
                if "layer_scale" in name:
                    parameter.mul_(min(1.0, 3 / depth))
        torch.optim.swa_utils.update_bn([smooth_images(4, config.in_chans, 96)], model)
    return model.eval()


def smooth_images(count: int, channels: int, side: int) -> Tensor:
    """Return random images ``(count, channels, side, side)`` float32 with a 1/f-like spectrum.

    The mean is near 0 and the standard deviation 1. Drawn from the global random state: a sum
    of random grids, each with twice the resolution and half the amplitude of the previous one.
    """
    total = torch.zeros(count, channels, side, side)
    cells, amplitude = 2, 1.0
    while cells <= side:
        grid = torch.randn(count, channels, cells, cells)
        total += amplitude * interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        cells, amplitude = 2 * cells, amplitude / 2
    return total / total.std()


def sha256_of_state(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict: names, types, shapes and bytes."""
    return hashlib.sha256(save({key: state[key].contiguous() for key in sorted(state)})).hexdigest()
