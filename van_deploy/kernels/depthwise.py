"""Depth-wise convolutions in NHWC: K x K with any dilation, bias and optional GELU.

The weights of a depth-wise convolution come from the L1 cache, and every value is converted to
float32 before it is multiplied. A thread therefore computes ROWS outputs of one column and a few
channels: rows at a distance of ``dilation`` share all but ``dilation`` of their input rows, and a
value is loaded and converted once for all of them. Sizes are compile-time constants, so that the
address of a load is an immediate offset.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.kernels.launch import FEW, check_tensor, divisor_block, launch_kernel, select_tile


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
