"""A complete VAN on the fused kernels, channels last and with all exact folds."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.fold import RewrittenBlock, RewrittenVan, fold_van
from van_deploy.kernels import ops, reference
from van_deploy.kernels.launch import DTYPES, INTERPRETED
from van_deploy.model.van import VAN, smooth_images
from van_deploy.model.variants import STAGES


class _Weights(nn.Module):
    """Weight of a convolution in the kernel's layout, and its bias in float32."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, outer: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.register_buffer("bias", torch.zeros(outer) if bias is None else bias.float())


def _matrix(conv: nn.Conv2d, dtype: torch.dtype) -> _Weights:
    return _Weights(conv.weight[:, :, 0, 0].to(dtype), conv.bias, conv.out_channels)


def _taps(conv: nn.Conv2d) -> _Weights:
    return _Weights(conv.weight[:, 0].permute(1, 2, 0).float(), conv.bias, conv.out_channels)


class _Block(nn.Module):
    """The weights of one block."""

    skip_gain: Tensor | None

    def __init__(self, block: RewrittenBlock, dtype: torch.dtype) -> None:
        super().__init__()
        unit = block.attn.spatial_gating_unit
        self.proj_1 = _matrix(block.attn.proj_1, dtype)
        self.proj_2 = _matrix(block.attn.proj_2, dtype)
        self.conv0, self.conv_spatial = _taps(unit.conv0), _taps(unit.conv_spatial)
        self.conv1 = _matrix(unit.conv1, dtype)
        self.dilation = cast("tuple[int, int]", unit.conv_spatial.dilation)[0]
        self.fc1, self.fc2 = _matrix(block.mlp.fc1, dtype), _matrix(block.mlp.fc2, dtype)
        self.dwconv = _taps(block.mlp.dwconv.dwconv)
        gain = block.skip_gain
        self.register_buffer("skip_gain", None if gain is None else gain.to(dtype))


class FusedVan(nn.Module):
    """A folded VAN that runs on the kernels or on their PyTorch versions.

    Args:
        model: a VAN with all rewrites of :mod:`van_deploy.graph.fold`.
        dtype: type of the weights and of every tensor between two kernels.
        fallbacks: reasons to use the PyTorch versions; empty for the kernels.
    """

    def __init__(
        self, model: RewrittenVan, dtype: torch.dtype, fallbacks: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.dtype, self.fallbacks = dtype, fallbacks
        self.strides = model.config.strides
        self.eps = model.config.layer_norm_eps
        for stage in range(1, STAGES + 1):
            conv = cast("nn.Conv2d", model.get_submodule(f"patch_embed{stage}.proj"))
            weight = conv.weight.permute(2, 3, 1, 0).to(dtype)
            self.add_module(f"patch_embed{stage}", _Weights(weight, conv.bias, conv.out_channels))
            blocks = [_Block(block, dtype) for block in model.stage_blocks(stage)]
            self.add_module(f"block{stage}", nn.ModuleList(blocks))
            norm = cast("nn.LayerNorm", model.get_submodule(f"norm{stage}"))
            weights = _Weights(norm.weight.float(), norm.bias, conv.out_channels)
            self.add_module(f"norm{stage}", weights)
        self.head = model.head.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images ``(N, in_chans, H, W)`` to float32 logits ``(N, num_classes)``."""
        kernels: Any = reference if self.fallbacks else ops
        for stage in range(1, STAGES + 1):
            embed: Any = self.get_submodule(f"patch_embed{stage}")
            x = kernels.patches(
                x, embed.weight, embed.bias, self.strides[stage - 1]
            )  # (N, h, w, C)
            for block in cast("nn.ModuleList", self.get_submodule(f"block{stage}")):
                x = _block(kernels, block, x)
            norm: Any = self.get_submodule(f"norm{stage}")
            x = kernels.layer_norm(x, norm.weight, norm.bias, self.eps).permute(0, 3, 1, 2)
        return self.head(x.mean(dim=(2, 3))).float()


def _block(kernels: Any, block: Any, x: Tensor) -> Tensor:
    """Map ``(N, h, w, C)`` to the same shape."""
    act = kernels.pointwise(x, block.proj_1.weight, block.proj_1.bias, "gelu")
    y = kernels.depthwise(act, block.conv0.weight, block.conv0.bias)
    y = kernels.depthwise(y, block.conv_spatial.weight, block.conv_spatial.bias, block.dilation)
    y = kernels.pointwise(y, block.conv1.weight, block.conv1.bias, "multiply", act)
    skip = x if block.skip_gain is None else x * block.skip_gain
    x = kernels.pointwise(y, block.proj_2.weight, block.proj_2.bias, "add", skip)
    y = kernels.pointwise(x, block.fc1.weight, block.fc1.bias)
    y = kernels.depthwise(y, block.dwconv.weight, block.dwconv.bias, 1, True)
    return kernels.pointwise(y, block.fc2.weight, block.fc2.bias, "add", x)


def fuse_van(
    model: nn.Module, dtype: torch.dtype = torch.float16, *, fallback: bool = False
) -> FusedVan:
    """Return a VAN folded for the fused kernels, in eval mode, on the CPU.

    Args:
        model: a :class:`van_deploy.model.van.VAN` in eval mode; it is not changed.
        dtype: type of the weights and of every tensor between two kernels.
        fallback: without a GPU, or for other types, use plain PyTorch instead of failing;
            :attr:`FusedVan.fallbacks` has the reasons.

    Raises:
        UsageError: another network, or a type that the kernels do not support.
        ConversionError: folding changed the network.
    """
    pools = isinstance(model, VAN) and model.global_pool and not model.config.out_indices
    if not isinstance(model, VAN) or model.training or not pools:
        raise UsageError("Only a VAN in eval mode that pools its feature maps runs on the kernels.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report = fold_van(model, smooth_images(1, model.config.in_chans, 64))
    if not report:
        raise ConversionError(
            f"Folding changed the network: the logits differ by {report.relative_error:.1e} in "
            "float64."
        )
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"the kernels do not support {dtype}")
    if not INTERPRETED and not torch.cuda.is_available():
        reasons.append("there is no GPU")
    if reasons and not fallback:
        raise UsageError(
            f"The network cannot run on the kernels: {' and '.join(reasons)}.",
            "Pass fallback=True to run the same network in plain PyTorch.",
        )
    network = FusedVan(report.model, dtype, tuple(reasons))
    return network.eval().requires_grad_(False)
