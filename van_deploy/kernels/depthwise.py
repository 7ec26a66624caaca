"""Depth-wise convolutions in NHWC: K x K with any dilation, bias, and GELU where wanted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import launched, require, rows_of, size_of_power

__all__ = ["depthwise", "depthwise_taps", "gelu"]


SQRT_HALF = tl.constexpr(0.7071067811865476)


@triton.jit  # type: ignore[untyped-decorator]
def gelu(x):  # type: ignore[no-untyped-def]
    """Return the exact GELU, with the error function, of float32 values."""
    return 0.5 * x * (1.0 + tl.math.erf(x * SQRT_HALF))


@triton.jit  # type: ignore[untyped-decorator]
def depthwise_taps(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, n, h, w, channels, H, W, C, inside, K: tl.constexpr, D: tl.constexpr
):
    """Return the float32 sums over K x K taps at pixels (n, h, w) and ``channels``.

    Args:
        x_ptr: (N, H, W, C).
        w_ptr: (K, K, C): tap first, so that neighbouring threads read neighbouring channels.
        n, h, w: (P,) image, row and column of each pixel.
        channels: (B,) of the channels; those outside C are masked.
        inside: (P,) whether there is such a pixel.
        K, D: side of the kernel and its dilation; the padding is D * (K // 2).
    """
    known = channels < C
    total = tl.zeros((n.shape[0], channels.shape[0]), tl.float32)
    for row in tl.static_range(K):
        y = h + (row - K // 2) * D
        for column in tl.static_range(K):
            x = w + (column - K // 2) * D
            valid = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            pixel = ((n * H + y) * W + x).to(tl.int64) * C
            values = tl.load(
                x_ptr + pixel[:, None] + channels[None, :],
                mask=valid[:, None] & known[None, :],
                other=0.0,
            )
            tap = tl.load(w_ptr + (row * K + column) * C + channels, mask=known, other=0.0)
            total += values.to(tl.float32) * tap[None, :].to(tl.float32)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _depthwise_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    pixels,
    H,
    W,
    C,
    K: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute BLOCK_P neighbouring pixels of BLOCK_C channels."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, known = pixel < pixels, channels < C
    n, h, w = pixel // (H * W), (pixel // W) % H, pixel % W
    total = depthwise_taps(x_ptr, w_ptr, n, h, w, channels, H, W, C, inside, K, D)
    total += tl.load(b_ptr + channels, mask=known, other=0.0).to(tl.float32)[None, :]
    if GELU:
        total = gelu(total)
    tl.store(
        out_ptr + pixel.to(tl.int64)[:, None] * C + channels[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & known[None, :],
    )


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, gelu: bool = False
) -> Tensor:
    """Return the depth-wise convolution of ``x``, padded to keep its size.

    Args:
        x: ``(N, H, W, C)``, contiguous.
        weight: ``(K, K, C)``, K odd.
        bias: ``(C,)``.
        dilation: distance of the taps in pixels.
        gelu: apply the exact GELU.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, channels = require(x, "x", 4)
    side = weight.shape[0]
    require(weight, "weight", (side, side, channels), like=x)
    require(bias, "bias", (channels,), like=x)
    out = torch.empty_like(x)
    pixels = batch * height * width
    block_c = size_of_power(channels, 64)
    block_p = rows_of(side, block_c)
    launched(
        _depthwise_kernel,
        (triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)),
        (x, weight, bias, out, pixels, height, width, channels),
        dict(K=side, D=dilation, GELU=gelu, BLOCK_P=block_p, BLOCK_C=block_c),
    )
    return out
