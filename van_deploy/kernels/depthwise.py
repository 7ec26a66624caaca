"""Depth-wise convolutions in NHWC: K x K with any dilation, bias, and GELU where wanted.

The taps of a depth-wise convolution come from the L1 cache and each becomes float32 before
it is multiplied, so a thread computes ROWS outputs of one column and a few channels: rows
that lie ``dilation`` apart share all but ``dilation`` of their input rows, and a value is
loaded and converted once for all of them. Sizes are compile-time constants: then a load's
place is an immediate offset, not instructions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import (
    after_previous,
    divisor_block,
    launched,
    require,
    tile_key,
    tile_of,
)

__all__ = ["depthwise", "gelu", "row_groups", "row_items", "sums"]


@triton.jit
def gelu(x, FINE: tl.constexpr):
    """Return the exact GELU, with the error function, of float32 values.

    FINE calls libdevice's erf. Else the normal distribution is ``1/2 + x P(x^2)`` limited to
    0..1, with the polynomial P of degree 10 that is closest where ``|x| <= 4.8`` and grows
    beyond: GELU is in error by at most 5e-6 everywhere, without a division or an exponential.
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
def row_items(first, count, BLOCK: tl.constexpr, W, groups, D: tl.constexpr, ROWS: tl.constexpr):
    """Return which items exist, and image, first row and column of each: all (BLOCK,)."""
    item = first + tl.arange(0, BLOCK)
    group = (item // W) % groups
    return item < count, item // (W * groups), (group // D) * (ROWS * D) + group % D, item % W


@triton.jit
def _value(x, inside, known, h, w, row, column, H, W, C, K, D, EVEN):
    """Return the input under one tap, (P, B): ``row`` counts from the tap above row h."""
    down: tl.constexpr = (row - K // 2) * D
    right: tl.constexpr = (column - K // 2) * D
    mask = inside & (h + down >= 0) & (h + down < H) & (w + right >= 0) & (w + right < W)
    mask = mask[:, None]
    if not EVEN:
        mask = mask & known[None, :]
    return tl.load(x + (down * W + right) * C, mask=mask, other=0.0)


@triton.jit
def _tap(w_ptr, known, place, C, EVEN):
    """Return one tap of every channel, (1, B)."""
    at = w_ptr + place * C
    return (tl.load(at) if EVEN else tl.load(at, mask=known, other=0.0))[None, :]


@triton.jit
def sums(
    x,
    w_ptr,
    inside,
    known,
    h,
    w,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return ROWS tensors (P, B) of float32 sums over K x K taps, at rows h, h + D, ...

    Args:
        x: (P, B) pointers to row h, column w, of (N, H, W, C).
        w_ptr: (B,) pointers into (K, K, C) float32: tap first, so that neighbouring threads
            read neighbours.
        inside, h, w: (P,) what :func:`row_items` returns.
        known: (B,) which channels exist; they are masked unless EVEN.
        H, W, C, K, D: the padding is D * (K // 2).
    """
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((x.shape[0], x.shape[1]), tl.float32),)
    for column in tl.static_range(K):
        taps = ()
        for row in tl.static_range(K):
            taps = taps + (_tap(w_ptr, known, row * K + column, C, EVEN),)
        for row in tl.static_range(ROWS + K - 1):
            value = _value(x, inside, known, h, w, row, column, H, W, C, K, D, EVEN).to(tl.float32)
            added = ()
            for out in tl.static_range(ROWS):
                if out <= row and row - out < K:
                    added = added + (totals[out] + value * taps[row - out],)
                else:
                    added = added + (totals[out],)
            totals = added
    return totals


@triton.jit
def _store(out, total, inside, known, h, row, H, W, C, D, GELU):
    """Store one row of outputs."""
    fine: tl.constexpr = out.dtype.element_ty == tl.float32
    if GELU:
        total = gelu(total, fine)
    mask = (inside & (h + row * D < H))[:, None] & known[None, :]
    tl.store(out + row * D * W * C, total.to(out.dtype.element_ty), mask=mask)


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
    ROLL: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Compute ROWS rows of BLOCK_P columns and BLOCK_C channels.

    ROLL keeps every tap and K rows of sums in registers, and goes down the map row by row;
    else ROWS rows of sums, and the taps of one column after the other.
    """
    after_previous(PDL)
    inside, n, h, w = row_items(tl.program_id(0) * BLOCK_P, items, BLOCK_P, W, groups, D, ROWS)
    if LONG:
        n = n.to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channels < C
    place = (((n * H + h) * W + w) * C)[:, None] + channels[None, :]
    x, out, w_ptr = x_ptr + place, out_ptr + place, w_ptr + channels
    bias = tl.load(b_ptr + channels, mask=known, other=0.0)[None, :]
    if ROLL:
        taps, lines, totals = (), (), ()
        for tap in tl.static_range(K * K):
            taps = taps + (_tap(w_ptr, known, tap, C, EVEN),)
        for column in tl.static_range(K):
            lines = lines + (_value(x, inside, known, h, w, 0, column, H, W, C, K, D, EVEN),)
        for _ in tl.static_range(ROWS):
            totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + bias,)
        for row in tl.static_range(ROWS + K - 1):
            line = lines
            if row < ROWS + K - 2:  # the next row is on its way while this one is multiplied
                lines = ()
                for column in tl.static_range(K):
                    lines = lines + (
                        _value(x, inside, known, h, w, row + 1, column, H, W, C, K, D, EVEN),
                    )
            for column in tl.static_range(K):
                value = line[column].to(tl.float32)
                added = ()
                for here in tl.static_range(ROWS):
                    if here <= row and row - here < K:
                        tap = taps[(row - here) * K + column]
                        added = added + (totals[here] + value * tap,)
                    else:
                        added = added + (totals[here],)
                totals = added
            if row >= K - 1:
                _store(out, totals[row - K + 1], inside, known, h, row - K + 1, H, W, C, D, GELU)
    else:
        totals = sums(x, w_ptr, inside, known, h, w, H, W, C, K, D, ROWS, EVEN)
        for row in tl.static_range(ROWS):
            _store(out, totals[row] + bias, inside, known, h, row, H, W, C, D, GELU)


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
    few = batch * height * width < 8192
    rows = 1 if few else 7 if dilation == 1 else 5
    default = {
        "ROWS": rows if (rows - 1) * dilation < height else 1,
        "BLOCK_P": 8 if few else 16,
        "BLOCK_C": divisor_block(channels, 32),
        "ROLL": int(side == 3 and not few),
        "num_warps": 2 if few else 4,
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
