"""LayerNorm over the channels of NHWC tensors, several pixels per program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import (
    FEW,
    check_tensor,
    launch_kernel,
    power_of_two_block,
    select_tile,
)


@triton.jit
def norm_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    M,
    eps,
    C: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Normalise BLOCK_M pixels; every value is read and written once."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    known = channels < C
    place = (rows.to(tl.int64) if LONG else rows)[:, None] * C + channels[None, :]
    mask = (rows < M)[:, None] & known[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(known[None, :], x - (tl.sum(x, 1) / C)[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    scale = tl.load(scale_ptr + channels, mask=known, other=0.0)[None, :]
    shift = tl.load(shift_ptr + channels, mask=known, other=0.0)[None, :]
    result = centred * spread[:, None] * scale + shift
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.triton_op("van_deploy::layer_norm", mutates_args={})
def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the LayerNorm of ``x`` over its channels.

    Args:
        x: ``(N, H, W, C)``, contiguous.
        scale: ``(C,)`` float32, and ``shift`` as well.
        eps: added to the variance.

    Raises:
        UsageError: the kernel does not support a shape, type, layout or device.
    """
    batch, height, width, channels = check_tensor(x, "x", 4)
    check_tensor(scale, "scale", (channels,), like=x, dtype=torch.float32)
    check_tensor(shift, "shift", (channels,), like=x, dtype=torch.float32)
    out = torch.empty_like(x)
    pixels, block_c = batch * height * width, power_of_two_block(channels, 2**30)
    default = {"BLOCK_M": max(1, (1024 if pixels < FEW else 2048) // block_c), "num_warps": 4}
    key, tile = select_tile("layer_norm", (channels,), pixels, default, out)
    launch_kernel(
        norm_kernel,
        (triton.cdiv(pixels, tile["BLOCK_M"]),),
        (x, scale, shift, out, pixels, eps, channels, x.numel() >= 2**31, block_c),
        tile,
        key,
    )
    return out
