"""Strided convolutions that read any layout: the stem and the patch embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import chosen, divisor_block, launched, power_of_two_block, require


@triton.jit
def patch_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    pixels,
    H,
    W,
    C_out,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PACKED: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute BLOCK_M output pixels of BLOCK_N channels: one product a row of the kernel.

    PACKED: the values under one row of the kernel are contiguous (NHWC).
    """
    pixel = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, known = pixel < pixels, columns < C_out
    out_h, out_w = (H - 1) // STRIDE + 1, (W - 1) // STRIDE + 1
    n, row, left = pixel // (out_h * out_w), (pixel // out_w) % out_h, pixel % out_w
    if LONG:
        n = n.to(tl.int64)
    left = left * STRIDE - K // 2
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for line in range(K):
        y = row * STRIDE - K // 2 + line
        fits = inside & (y >= 0) & (y < H)
        start = n * stride_n + y * stride_h + left * stride_w
        for first in range(0, K * C_IN, BLOCK_K):
            inner = first + tl.arange(0, BLOCK_K)
            exists = inner < K * C_IN
            x = left[:, None] + (inner // C_IN)[None, :]
            if PACKED:
                place = start[:, None] + inner[None, :]
            else:
                gap = (inner // C_IN) * stride_w + (inner % C_IN) * stride_c
                place = start[:, None] + gap[None, :]
            mask = fits[:, None] & exists[None, :] & (x >= 0) & (x < W)
            a = tl.load(x_ptr + place, mask=mask, other=0.0).to(w_ptr.dtype.element_ty)
            at = w_ptr + (line * K * C_IN + inner)[:, None] * C_out + columns[None, :]
            b = tl.load(at, mask=exists[:, None] & known[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
    total += tl.load(b_ptr + columns, mask=known, other=0.0)[None, :]
    offset = pixel.to(tl.int64) if LONG else pixel
    place, mask = offset[:, None] * C_out + columns[None, :], inside[:, None] & known[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.triton_op("van_deploy::patches", mutates_args={})
def patches(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Return a strided convolution ``(N, ceil(H/stride), ceil(W/stride), C_out)``, contiguous.

    Args:
        x: ``(N, C_in, H, W)`` in any strides (NCHW, or NHWC permuted); of any of the types.
        weight: ``(K, K, C_in, C_out)``, K odd; the output has its type. The padding is K // 2.
        bias: ``(C_out,)`` float32.
        stride: in pixels.

    Raises:
        UsageError: a shape, type or device the kernel does not take.
    """
    batch, inner, height, width = require(x, "x", 4, strided=True)
    side, outer = weight.shape[0], weight.shape[-1]
    require(weight, "weight", (side | 1, side | 1, inner, outer), like=x, dtype=weight.dtype)
    require(bias, "bias", (outer,), like=x, dtype=torch.float32)
    out_h, out_w = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = torch.empty((batch, out_h, out_w, outer), dtype=weight.dtype, device=x.device)
    pixels, few = batch * out_h * out_w, batch * out_h * out_w < 4096
    default = {
        "BLOCK_M": 16 if few else 64,
        "BLOCK_N": power_of_two_block(outer, 32) if few else divisor_block(outer, 128),
        "BLOCK_K": divisor_block(side * inner, 64),
        "num_warps": 4,
        "num_stages": 3,
    }
    key, tile = chosen("patches", (side, stride, inner, outer), pixels, default, out)
    stride_n, stride_c, stride_h, stride_w = x.stride()
    launched(
        patch_kernel,
        (triton.cdiv(outer, tile["BLOCK_N"]), triton.cdiv(pixels, tile["BLOCK_M"])),
        (x, weight, bias, out, pixels, height, width, outer)
        + (stride_n, stride_h, stride_w, stride_c, inner, side, stride)
        + (stride_c == 1 and stride_w == inner, max(x.numel(), out.numel()) >= 2**31),
        tile,
        key,
    )
    return out
