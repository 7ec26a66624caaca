"""The second half of VAN's MLP in one kernel: dw3x3, GELU, fc2 and the residual sum.

The hidden tensor is 8 or 4 times as wide as the stage. Without this kernel it crosses
the memory four times (written by fc1, read and written by the depth-wise convolution,
read by fc2); with it twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.depthwise import depthwise_taps, gelu
from van_deploy.kernels.launch import launched, require, size_of_power

__all__ = ["depthwise_gelu_pointwise"]


@triton.jit  # type: ignore[untyped-decorator]
def _mlp_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    dw_ptr,
    db_ptr,
    w_ptr,
    b_ptr,
    skip_ptr,
    out_ptr,
    pixels,
    H,
    W,
    HIDDEN,
    C,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_P neighbouring pixels of BLOCK_C output channels, BLOCK_H hidden at a time."""
    pixel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, known = pixel < pixels, channels < C
    n, h, w = pixel // (H * W), (pixel // W) % H, pixel % W
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        exists = hidden < HIDDEN
        taps = depthwise_taps(x_ptr, dw_ptr, n, h, w, hidden, H, W, HIDDEN, inside, K, 1)
        taps += tl.load(db_ptr + hidden, mask=exists, other=0.0).to(tl.float32)[None, :]
        values = gelu(taps).to(x_ptr.dtype.element_ty)  # as a tensor between two kernels would be
        weight = tl.load(
            w_ptr + channels[None, :] * HIDDEN + hidden[:, None],
            mask=known[None, :] & exists[:, None],
            other=0.0,
        )
        total = tl.dot(values, weight, total, input_precision=PRECISION)
    total += tl.load(b_ptr + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    place = pixel.to(tl.int64)[:, None] * C + channels[None, :]
    mask = inside[:, None] & known[None, :]
    total += tl.load(skip_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def depthwise_gelu_pointwise(
    x: Tensor, dw_weight: Tensor, dw_bias: Tensor, weight: Tensor, bias: Tensor, skip: Tensor
) -> Tensor:
    """Return ``skip + weight @ gelu(depthwise(x))``, ``(N, H, W, C)``.

    Args:
        x: the hidden tensor ``(N, H, W, C_hidden)``, contiguous.
        dw_weight: ``(K, K, C_hidden)``, K odd.
        dw_bias: ``(C_hidden,)``.
        weight: ``(C, C_hidden)``.
        bias: ``(C,)``.
        skip: ``(N, H, W, C)``.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, hidden = require(x, "x", 4)
    side, channels = dw_weight.shape[0], weight.shape[0]
    require(dw_weight, "dw_weight", (side, side, hidden), like=x)
    require(dw_bias, "dw_bias", (hidden,), like=x)
    require(weight, "weight", (channels, hidden), like=x)
    require(bias, "bias", (channels,), like=x)
    require(skip, "skip", (batch, height, width, channels), like=x)
    out = torch.empty_like(skip)
    pixels, block_c = batch * height * width, size_of_power(channels, 256)
    launched(
        _mlp_kernel,
        (triton.cdiv(channels, block_c), triton.cdiv(pixels, 32)),
        (x, dw_weight, dw_bias, weight, bias, skip, out, pixels, height, width, hidden, channels),
        dict(
            K=side,
            BLOCK_P=32,
            BLOCK_H=32,
            BLOCK_C=block_c,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        ),
    )
    return out
