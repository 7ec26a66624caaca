"""Convolutions of NHWC tensors: depth-wise, 1x1 with a fused epilogue, and strided.

Depth-wise, K x K with any dilation, bias and optional GELU: the weights come from the L1 cache, and
every value is converted to float32 before it is multiplied. A thread therefore computes ROWS
outputs of one column and a few channels: rows at a distance of ``dilation`` share all but
``dilation`` of their input rows, and a value is loaded and converted once for all of them. Sizes
are compile-time constants, so that the address of a load is an immediate offset.

The 1x1 convolutions and the strided ones (the stem and the patch embeddings, of any memory layout)
are matrix products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.errors import UsageError
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
def gelu(x, FINE: tl.constexpr):
    """Return the exact GELU, with the error function, of float32 values.

    FINE calls libdevice's erf. Otherwise the normal distribution is ``1/2 + x P(x^2)`` limited to
    0..1, where P is the best polynomial of degree 10 for ``|x| <= 4.8`` and grows beyond. The
    error of GELU is at most 5e-6 everywhere, without a division or an exponential.
    """
    if FINE:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    z = (0.086805552 * x) * x - 1.0  # x * x from 0..4.8^2 to -1..1
    value = 0.00144375 * z - 0.004194621
    value = (value * z + 0.0053923158) * z - 0.0074433703
    value = (value * z + 0.013864126) * z - 0.022187542
    value = (value * z + 0.030720813) * z - 0.040565927
    value = (value * z + 0.052904099) * z - 0.072979763
    value = value * z + 0.14721279
    return x * tl.minimum(tl.maximum(value * x + 0.5, 0.0), 1.0)


@triton.jit
def accumulate_row(totals, value, taps, row: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr):
    """Add an input of row ``row``, times its taps, to the totals of ROWS outputs."""
    added = ()
    for here in tl.static_range(ROWS):
        if here <= row and row - here < K:
            added = added + (totals[here] + value * taps[row - here],)
        else:
            added = added + (totals[here],)
    return added


@triton.jit
def depthwise_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    items,
    groups: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute ROWS rows at distance D of BLOCK_P columns and BLOCK_C channels.

    An item is one column of one group of rows of one image. The taps are ``(K, K, C)`` float32,
    channels last, so that neighbouring threads read neighbouring values; the padding is
    D * (K // 2).
    """
    item = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside, group, w = item < items, (item // W) % groups, item % W
    n, h = item // (W * groups), (group // D) * (ROWS * D) + group % D
    if LONG:
        n = n.to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channels < C
    place = (((n * H + h) * W + w) * C)[:, None] + channels[None, :]
    x, out, taps_ptr = x_ptr + place, out_ptr + place, w_ptr + channels
    bias = tl.load(b_ptr + channels, mask=known, other=0.0)[None, :]
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + bias,)
    for column in tl.static_range(K):
        x_column = w + (column - K // 2) * D
        fits = inside & (x_column >= 0) & (x_column < W)
        taps = ()
        for row in tl.static_range(K):
            place = taps_ptr + (row * K + column) * C
            tap = tl.load(place) if EVEN else tl.load(place, mask=known, other=0.0)
            taps = taps + (tap[None, :],)
        for row in tl.static_range(ROWS + K - 1):
            y = h + (row - K // 2) * D
            mask = (fits & (y >= 0) & (y < H))[:, None]
            if not EVEN:
                mask = mask & known[None, :]
            at = x + ((row - K // 2) * W + column - K // 2) * D * C
            value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            totals = accumulate_row(totals, value, taps, row, ROWS, K)
    for row in tl.static_range(ROWS):
        total = totals[row]
        if GELU:
            total = gelu(total, out_ptr.dtype.element_ty == tl.float32)
        mask = (inside & (h + row * D < H))[:, None] & known[None, :]
        tl.store(out + row * D * W * C, total.to(out_ptr.dtype.element_ty), mask=mask)


def row_groups(height: int, dilation: int, rows: int) -> int:
    """Return the number of groups of ``rows`` rows, ``dilation`` apart, that cover ``height`` rows.

    >>> row_groups(56, 3, 5), row_groups(7, 1, 4)
    (12, 2)
    """
    return dilation * triton.cdiv(height, rows * dilation)


@torch.library.triton_op("van_deploy::depthwise", mutates_args={})
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1, gelu: bool = False
) -> Tensor:
    """Return the depth-wise convolution of ``x``, padded to keep its size.

    Args:
        x: ``(N, H, W, C)``, contiguous.
        weight: ``(K, K, C)`` float32, K odd.
        bias: ``(C,)`` float32.
        dilation: distance between taps in pixels.
        gelu: apply the exact GELU.

    Raises:
        UsageError: the kernel does not support a shape, type, layout or device.
    """
    batch, height, width, channels = check_tensor(x, "x", 4)
    side = weight.shape[0]
    check_tensor(weight, "weight", (side | 1, side | 1, channels), like=x, dtype=torch.float32)
    check_tensor(bias, "bias", (channels,), like=x, dtype=torch.float32)
    out = torch.empty_like(x)
    pixels, most = batch * height * width, triton.cdiv(height, dilation)
    few = pixels < FEW
    rows = (1 if side == 3 else 2) if few else 4 if side == 3 else 7 if dilation == 1 else 10
    default = {
        "ROWS": min(rows, most),
        "BLOCK_P": 32 if side == 3 and not few else 8,
        "BLOCK_C": divisor_block(channels, 32),
        "num_warps": 2 if few else 4,
    }
    key, tile = select_tile("depthwise", (side, dilation, channels), pixels, default, out)
    groups = row_groups(height, dilation, tile["ROWS"])
    items = batch * groups * width
    launch_kernel(
        depthwise_kernel,
        (triton.cdiv(items, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_C"])),
        (x, weight, bias, out, items, groups, height, width, channels, side, dilation, gelu)
        + (x.numel() >= 2**31, channels % tile["BLOCK_C"] == 0),
        tile,
        key,
    )
    return out


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
