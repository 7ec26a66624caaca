"""Dense convolutions as matrix products: 1x1 in NHWC with a fused epilogue, and strided ones.

The strided convolutions, of any memory layout, are the stem and the patch embeddings.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.errors import UsageError
from van_deploy.kernels.depthwise import gelu
from van_deploy.kernels.launch import (
    FEW,
    check_tensor,
    divisor_block,
    launch_kernel,
    power_of_two_block,
    select_tile,
)

# After the bias: nothing, the exact GELU, the product with or the sum with another tensor.
EPILOGUES = ("none", "gelu", "multiply", "add")


@triton.jit
def pointwise_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    other_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REPEAT: tl.constexpr,
):
    """Compute REPEAT times BLOCK_M pixels of BLOCK_N output channels.

    Neighbouring programs read the same pixels, so that their input is in the L2 cache. If BLOCK_K
    is at least K, a program loads its weights once.
    """
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_known = (columns < N)[None, :]
    bias = tl.load(b_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if K <= BLOCK_K:
        inner = tl.arange(0, BLOCK_K)
        b_mask = column_known if EVEN else column_known & (inner < K)[:, None]
        weights = tl.load(w_ptr + columns[None, :] * K + inner[:, None], mask=b_mask, other=0.0)
    for turn in range(REPEAT):
        rows = (tl.program_id(1) * REPEAT + turn) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_known = (rows < M)[:, None]
        offset = rows.to(tl.int64) if LONG else rows
        place = offset[:, None] * N + columns[None, :]
        mask = row_known & column_known
        if EPILOGUE >= 2:  # loaded during the product
            other = tl.load(other_ptr + place, mask=mask, other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            a_mask = row_known if EVEN else row_known & (inner < K)[None, :]
            a = tl.load(x_ptr + offset[:, None] * K + inner[None, :], mask=a_mask, other=0.0)
            if K <= BLOCK_K:
                total = tl.dot(a, weights, total, input_precision="ieee")
            else:
                b_mask = column_known if EVEN else column_known & (inner < K)[:, None]
                b = tl.load(w_ptr + columns[None, :] * K + inner[:, None], mask=b_mask, other=0.0)
                total = tl.dot(a, b, total, input_precision="ieee")
        total += bias
        if EPILOGUE == 1:
            total = gelu(total, x_ptr.dtype.element_ty == tl.float32)
        if EPILOGUE == 2:
            total *= other.to(tl.float32)
        if EPILOGUE == 3:
            total += other.to(tl.float32)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.triton_op("van_deploy::pointwise", mutates_args={})
def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "none", other: Tensor | None = None
) -> Tensor:
    """Return the 1x1 convolution of ``x`` with an epilogue, ``(N, H, W, C_out)``.

    Args:
        x: ``(N, H, W, C_in)``, contiguous.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)`` float32.
        epilogue: one of :data:`EPILOGUES`.
        other: ``(N, H, W, C_out)``, for ``multiply`` and ``add``.

    Raises:
        UsageError: the kernel does not support a shape, type, layout or device.
    """
    batch, height, width, inner = check_tensor(x, "x", 4)
    outer = weight.shape[0]
    check_tensor(weight, "weight", (outer, inner), like=x)
    check_tensor(bias, "bias", (outer,), like=x, dtype=torch.float32)
    if epilogue not in EPILOGUES or (other is None) != (epilogue in ("none", "gelu")):
        raise UsageError(f"The epilogue '{epilogue}' does not match the other tensor.")
    number = EPILOGUES.index(epilogue)
    if other is not None:
        check_tensor(other, "other", (batch, height, width, outer), like=x)
    out = torch.empty((batch, height, width, outer), dtype=x.dtype, device=x.device)
    pixels = batch * height * width
    few = pixels < FEW
    default = {
        "BLOCK_M": 16 if pixels < 1024 else 32 if few else 64,
        "BLOCK_N": power_of_two_block(outer, 32) if few else divisor_block(outer, 128),
        "BLOCK_K": divisor_block(inner, 64 if x.dtype != torch.float32 else 32),
        "REPEAT": 4 if not few and inner <= 64 and outer > 64 else 1,
        "num_warps": 4,
        "num_stages": 4 if few else 3,
    }
    key, tile = select_tile("pointwise", (number, inner, outer), pixels, default, out)
    columns = triton.cdiv(outer, tile["BLOCK_N"])
    launch_kernel(
        pointwise_kernel,
        (columns, triton.cdiv(pixels, tile["BLOCK_M"] * tile["REPEAT"])),
        (x, weight, bias, x if other is None else other, out, pixels, outer, inner, number)
        + (max(x.numel(), out.numel()) >= 2**31, inner % tile["BLOCK_K"] == 0),
        tile,
        key,
    )
    return out


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
    """Compute BLOCK_M output pixels of BLOCK_N channels: one product for each kernel row.

    PACKED: the input values of one kernel row are contiguous (NHWC).
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
        x: ``(N, C_in, H, W)`` with any strides (NCHW, or NHWC permuted) and any supported type.
        weight: ``(K, K, C_in, C_out)``, K odd; the output has its type. The padding is K // 2.
        bias: ``(C_out,)`` float32.
        stride: stride in pixels.

    Raises:
        UsageError: the kernel does not support a shape, type or device.
    """
    batch, inner, height, width = check_tensor(x, "x", 4, strided=True)
    side, outer = weight.shape[0], weight.shape[-1]
    check_tensor(weight, "weight", (side | 1, side | 1, inner, outer), like=x, dtype=weight.dtype)
    check_tensor(bias, "bias", (outer,), like=x, dtype=torch.float32)
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
    key, tile = select_tile("patches", (side, stride, inner, outer), pixels, default, out)
    stride_n, stride_c, stride_h, stride_w = x.stride()
    launch_kernel(
        patch_kernel,
        (triton.cdiv(outer, tile["BLOCK_N"]), triton.cdiv(pixels, tile["BLOCK_M"])),
        (x, weight, bias, out, pixels, height, width, outer)
        + (stride_n, stride_h, stride_w, stride_c, inner, side, stride)
        + (stride_c == 1 and stride_w == inner, max(x.numel(), out.numel()) >= 2**31),
        tile,
        key,
    )
    return out
