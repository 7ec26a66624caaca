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

from van_deploy.errors import UsageError
from van_deploy.kernels.depthwise import gelu, row_groups, row_items, sums
from van_deploy.kernels.launch import (
    after_previous,
    divisor_block,
    launched,
    power_block,
    require,
    tile_key,
    tile_of,
)
from van_deploy.kernels.pointwise import LARGEST_CHAIN, precision_of

__all__ = ["mlp_tail"]


@triton.jit
def mlp_kernel(
    x_ptr,
    dw_ptr,
    db_ptr,
    w_ptr,
    b_ptr,
    skip_ptr,
    out_ptr,
    items,
    groups: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    HIDDEN: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Compute ROWS rows of BLOCK_P columns, all channels; BLOCK_H hidden ones at a time."""
    after_previous(PDL)
    inside, n, h, w = row_items(tl.program_id(0) * BLOCK_P, items, BLOCK_P, W, groups, 1, ROWS)
    if LONG:
        n = n.to(tl.int64)
    FINE: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    channels = tl.arange(0, BLOCK_C)
    known = channels < C
    totals = ()
    for _ in tl.static_range(ROWS):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    for start in range(0, HIDDEN, BLOCK_H):
        hidden = start + tl.arange(0, BLOCK_H)
        exists = hidden < HIDDEN
        x = x_ptr + ((((n * H + h) * W + w) * HIDDEN)[:, None] + hidden[None, :])
        taps = sums(x, dw_ptr + hidden, inside, exists, h, w, H, W, HIDDEN, K, 1, ROWS, EVEN)
        bias = tl.load(db_ptr + hidden, mask=exists, other=0.0)[None, :]
        weight = tl.load(
            w_ptr + channels[None, :] * HIDDEN + hidden[:, None],
            mask=known[None, :] & exists[:, None],
            other=0.0,
        )
        added = ()
        for out in tl.static_range(ROWS):
            # as a tensor between two kernels would be
            values = gelu(taps[out] + bias, FINE).to(x_ptr.dtype.element_ty)
            added = added + (tl.dot(values, weight, totals[out], input_precision=PRECISION),)
        totals = added
    bias = tl.load(b_ptr + channels, mask=known, other=0.0)[None, :]
    for out in tl.static_range(ROWS):
        y = h + out
        place = (((n * H + y) * W + w) * C)[:, None] + channels[None, :]
        mask = (inside & (y < H))[:, None] & known[None, :]
        total = totals[out] + bias + tl.load(skip_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + place, total.to(x_ptr.dtype.element_ty), mask=mask)


@torch.library.triton_op("van_deploy::mlp_tail", mutates_args={})
def mlp_tail(
    x: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
) -> Tensor:
    """Return ``skip + W @ gelu(depthwise(x)) + b``.

    Args:
        x: the hidden tensor ``(N, H, W, C_hidden)``, contiguous.
        dw_weight: ``(K, K, C_hidden)`` float32, K odd.
        dw_bias: ``(C_hidden,)`` float32.
        weight: ``(C, C_hidden)``, C at most 256.
        bias: ``(C,)`` float32.
        skip: ``(N, H, W, C)``.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, hidden = require(x, "x", 4)
    side, channels = dw_weight.shape[0], weight.shape[0]
    if channels > LARGEST_CHAIN:
        raise UsageError(
            f"'weight' makes {channels} channels, where the kernel takes {LARGEST_CHAIN} at most.",
            "Use a depth-wise and a 1x1 convolution.",
        )
    require(dw_weight, "dw_weight", (side | 1, side | 1, hidden), like=x, dtype=torch.float32)
    require(dw_bias, "dw_bias", (hidden,), like=x, dtype=torch.float32)
    require(weight, "weight", (channels, hidden), like=x)
    require(bias, "bias", (channels,), like=x, dtype=torch.float32)
    require(skip, "skip", (batch, height, width, channels), like=x)
    out = torch.empty_like(skip)
    pixels, block_c = batch * height * width, power_block(channels, LARGEST_CHAIN)
    default = {
        "ROWS": 2 if block_c < 128 else 1,
        "BLOCK_P": 16 if pixels < 8192 else 64,
        "BLOCK_H": divisor_block(hidden, 32),
        "num_warps": 4 if block_c < 128 else 8,
        "num_stages": 1,
    }
    key = tile_key("mlp_tail", (hidden, channels), pixels)
    tile = tile_of(key, default, x.device)
    groups = row_groups(height, 1, tile["ROWS"])
    items = batch * groups * width
    launched(
        mlp_kernel,
        (triton.cdiv(items, tile["BLOCK_P"]),),
        (x, dw_weight, dw_bias, weight, bias, skip, out)
        + (items, groups, height, width, hidden, channels, side, precision_of(x))
        + (x.numel() >= 2**31, hidden % tile["BLOCK_H"] == 0, block_c),
        tile,
        key,
    )
    return out
