"""Depth-wise convolutions in NHWC: K x K with any dilation, bias, and GELU where wanted.

The taps of a depth-wise convolution come from the L1 cache and each becomes float32 before
it is multiplied, so a thread computes ROWS outputs of one column and 8 channels: rows that
lie ``dilation`` apart share all but ``dilation`` of their input rows, and a value is loaded
and converted once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import divisor_block, launched, require, tile_key, tile_of

__all__ = ["depthwise", "depthwise_rows", "gelu", "row_groups", "row_items"]


@triton.jit  # type: ignore[untyped-decorator]
def gelu(x, ERF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the exact GELU, with the error function, of float32 values.

    ERF 0 calls libdevice's erf; 1 takes Abramowitz and Stegun 7.1.26, in error by at most
    1.5e-7, in the form ``relu(x) - |x| Q(|x|)`` that is accurate in the negative tail too.
    """
    if ERF == 0:
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.23164189 * size)  # 0.3275911 / sqrt(2)
    series = 0.5307027145 * t - 0.7265760135  # half of a5 and a4, and so on down to a1
    series = (series * t + 0.7107068705) * t - 0.142248368
    series = (series * t + 0.127414796) * t
    return tl.maximum(x, 0.0) - size * series * tl.exp2(-0.7213475204444817 * x * x)


@triton.jit  # type: ignore[untyped-decorator]
def row_items(first, count, BLOCK: tl.constexpr, H, W, groups, D: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return which items exist, and image, first row and column of each: all (BLOCK,)."""
    item = first + tl.arange(0, BLOCK)
    group = (item // W) % groups
    return item < count, item // (W * groups), (group // D) * (ROWS * D) + group % D, item % W


@triton.jit  # type: ignore[untyped-decorator]
def depthwise_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    inside,
    n,
    h,
    w,
    channels,
    H,
    W,
    C,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Return ROWS tensors (P, B) of float32 sums over K x K taps, at rows h, h + D, ...

    Args:
        x_ptr: (N, H, W, C).
        w_ptr: (K, K, C) float32: tap first, so that neighbouring threads read neighbours.
        inside, n, h, w: (P,) what :func:`row_items` returns.
        channels: (B,) of the channels; those outside C are masked, unless EVEN.
        K, D: side of the kernel and its dilation; the padding is D * (K // 2).
        EVEN: all channels exist.
        UNROLL: unroll the columns too; the rows always are.
    """
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((n.shape[0], channels.shape[0]), tl.float32),)  # noqa: RUF005
    if UNROLL:
        for column in tl.static_range(K):
            totals = _column(
                totals, x_ptr, w_ptr, inside, n, h, w, channels, H, W, C, column, K, D, ROWS, EVEN
            )
    else:
        for column in range(K):
            totals = _column(
                totals, x_ptr, w_ptr, inside, n, h, w, channels, H, W, C, column, K, D, ROWS, EVEN
            )
    return totals


@triton.jit  # type: ignore[untyped-decorator]
def _column(  # type: ignore[no-untyped-def]
    totals,
    x_ptr,
    w_ptr,
    inside,
    n,
    h,
    w,
    channels,
    H,
    W,
    C,
    column,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add the taps of one column of the kernel to the sums."""
    known = channels < C
    x = w + (column - K // 2) * D
    fits = inside & (x >= 0) & (x < W)
    top = h - (K // 2) * D
    start = ((n * H + top) * W + x) * C
    for row in tl.static_range(ROWS + K - 1):
        y = top + row * D
        mask = (fits & (y >= 0) & (y < H))[:, None]
        if not EVEN:
            mask = mask & known[None, :]
        place = (start + row * D * W * C)[:, None] + channels[None, :]
        values = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        added = ()
        for out in tl.static_range(ROWS):
            if out <= row and row - out < K:
                at = w_ptr + ((row - out) * K + column) * C + channels
                tap = tl.load(at) if EVEN else tl.load(at, mask=known, other=0.0)
                added = added + (totals[out] + values * tap[None, :],)  # noqa: RUF005
            else:
                added = added + (totals[out],)  # noqa: RUF005
        totals = added
    return totals


@triton.jit  # type: ignore[untyped-decorator]
def depthwise_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    items,
    groups,
    H,
    W,
    C,
    K: tl.constexpr,
    D: tl.constexpr,
    GELU: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    ERF: tl.constexpr,
):
    """Compute ROWS rows of BLOCK_P columns and BLOCK_C channels."""
    inside, n, h, w = row_items(tl.program_id(0) * BLOCK_P, items, BLOCK_P, H, W, groups, D, ROWS)
    if LONG:
        n = n.to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channels < C
    totals = depthwise_rows(
        x_ptr, w_ptr, inside, n, h, w, channels, H, W, C, K, D, ROWS, EVEN, UNROLL
    )
    bias = tl.load(b_ptr + channels, mask=known, other=0.0)[None, :]
    for out in tl.static_range(ROWS):
        total = totals[out] + bias
        if GELU:
            total = gelu(total, ERF)
        y = h + out * D
        place = (((n * H + y) * W + w) * C)[:, None] + channels[None, :]
        mask = (inside & (y < H))[:, None] & known[None, :]
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def row_groups(height: int, dilation: int, rows: int) -> int:
    """Return how many groups of ``rows`` rows, each ``dilation`` apart, cover ``height`` rows.

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
        dilation: distance of the taps in pixels.
        gelu: apply the exact GELU.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, channels = require(x, "x", 4)
    side = weight.shape[0]
    require(weight, "weight", (side | 1, side | 1, channels), like=x, dtype=torch.float32)
    require(bias, "bias", (channels,), like=x, dtype=torch.float32)
    out = torch.empty_like(x)
    default = {
        "ROWS": 5 if side > 5 and height > 3 * dilation else 4,
        "BLOCK_P": 32,
        "BLOCK_C": divisor_block(channels, 32),
        "UNROLL": 0,
        "ERF": 1,
        "num_warps": 4,
    }
    key = tile_key("depthwise", (side, dilation, channels), batch * height * width)
    tile = tile_of(key, default, x.device)
    groups = row_groups(height, dilation, tile["ROWS"])
    items = batch * groups * width
    launched(
        depthwise_kernel,
        (triton.cdiv(items, tile["BLOCK_P"]), triton.cdiv(channels, tile["BLOCK_C"])),
        (x, weight, bias, out, items, groups, height, width, channels, side, dilation, gelu)
        + (x.numel() >= 2**31, channels % tile["BLOCK_C"] == 0),
        tile,
        key,
    )
    return out
