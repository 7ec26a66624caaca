"""1x1 convolutions in NHWC, as matrix products with what follows them fused in."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.errors import UsageError
from van_deploy.kernels.depthwise import gelu
from van_deploy.kernels.launch import (
    after_previous,
    divisor_block,
    launched,
    power_block,
    require,
    tile_key,
    tile_of,
)

__all__ = ["LARGEST_CHAIN", "Epilogue", "gated", "pointwise", "precision_of"]

Epilogue = Literal["none", "gelu", "multiply", "add"]
"""After the bias: nothing, the exact GELU, the product with or the sum with another tensor."""

_NUMBER = {"none": 0, "gelu": 1, "multiply": 2, "add": 3}

LARGEST_CHAIN = 256
"""Most channels whose tensor between two products stays on chip."""


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
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REPEAT: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Compute REPEAT times BLOCK_M pixels of BLOCK_N output channels.

    Neighbouring programs take the same pixels, so that their input is in the L2 cache. Where
    BLOCK_K holds all of K, a program loads its weights once.
    """
    after_previous(PDL)
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
        if EPILOGUE >= 2:  # on its way while the product is made
            other = tl.load(other_ptr + place, mask=mask, other=0.0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            a_mask = row_known if EVEN else row_known & (inner < K)[None, :]
            a = tl.load(x_ptr + offset[:, None] * K + inner[None, :], mask=a_mask, other=0.0)
            if K <= BLOCK_K:
                total = tl.dot(a, weights, total, input_precision=PRECISION)
            else:
                b_mask = column_known if EVEN else column_known & (inner < K)[:, None]
                b = tl.load(w_ptr + columns[None, :] * K + inner[:, None], mask=b_mask, other=0.0)
                total = tl.dot(a, b, total, input_precision=PRECISION)
        total += bias
        if EPILOGUE == 1:
            total = gelu(total, x_ptr.dtype.element_ty == tl.float32)
        if EPILOGUE == 2:
            total *= other.to(tl.float32)
        if EPILOGUE == 3:
            total += other.to(tl.float32)
        tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_kernel(
    x_ptr,
    w1_ptr,
    b1_ptr,
    gate_ptr,
    w2_ptr,
    b2_ptr,
    skip_ptr,
    out_ptr,
    M,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
    LONG: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr = 0,
):
    """Compute BLOCK_M pixels of all channels; the gated tensor never leaves the chip."""
    after_previous(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    known = channels < C
    row_known = (rows < M)[:, None]
    offset = rows.to(tl.int64) if LONG else rows
    mask = row_known if EVEN else row_known & known[None, :]
    place = offset[:, None] * C + channels[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    skip = tl.load(skip_ptr + place, mask=mask, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_J):
        middle = start + tl.arange(0, BLOCK_J)
        exists = middle < C
        first = tl.load(
            w1_ptr + middle[None, :] * C + channels[:, None],
            mask=exists[None, :] & known[:, None],
            other=0.0,
        )
        gate = tl.load(
            gate_ptr + offset[:, None] * C + middle[None, :],
            mask=row_known & exists[None, :],
            other=0.0,
        )
        second = tl.load(
            w2_ptr + channels[None, :] * C + middle[:, None],
            mask=known[None, :] & exists[:, None],
            other=0.0,
        )
        bias = tl.load(b1_ptr + middle, mask=exists, other=0.0)
        value = tl.dot(x, first, input_precision=PRECISION) + bias[None, :]
        value = (value * gate.to(tl.float32)).to(x.dtype)
        total = tl.dot(value, second, total, input_precision=PRECISION)
    total += tl.load(b2_ptr + channels, mask=known, other=0.0)[None, :]
    total += skip.to(tl.float32)
    tl.store(out_ptr + place, total.to(x.dtype), mask=mask)


def precision_of(x: Tensor) -> str:
    """Return how a product of this type is made: float32 in full, never in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@torch.library.triton_op("van_deploy::pointwise", mutates_args={})
def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, epilogue: str = "none", other: Tensor | None = None
) -> Tensor:
    """Return the 1x1 convolution of ``x`` with its epilogue, ``(N, H, W, C_out)``.

    Args:
        x: ``(N, H, W, C_in)``, contiguous.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)`` float32.
        epilogue: an :data:`Epilogue`.
        other: ``(N, H, W, C_out)``, for ``multiply`` and ``add``.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, inner = require(x, "x", 4)
    outer = weight.shape[0]
    require(weight, "weight", (outer, inner), like=x)
    require(bias, "bias", (outer,), like=x, dtype=torch.float32)
    if epilogue not in _NUMBER or (other is None) != (epilogue in ("none", "gelu")):
        raise UsageError(f"The epilogue '{epilogue}' and the other tensor do not go together.")
    if other is not None:
        require(other, "other", (batch, height, width, outer), like=x)
    out = torch.empty((batch, height, width, outer), dtype=x.dtype, device=x.device)
    pixels = batch * height * width
    few = pixels < 8192
    default = {
        "BLOCK_M": 16 if pixels < 1024 else 32 if few else 128,
        "BLOCK_N": power_block(outer, 32) if few else divisor_block(outer, 128),
        "BLOCK_K": divisor_block(inner, 64 if x.dtype != torch.float32 else 32),
        "REPEAT": 1,
        "num_warps": 4,
        "num_stages": 4 if inner > 128 else 2,
    }
    key = tile_key("pointwise", (_NUMBER[epilogue], inner, outer), pixels)
    tile = tile_of(key, default, x.device)
    launched(
        pointwise_kernel,
        (
            triton.cdiv(outer, tile["BLOCK_N"]),
            triton.cdiv(pixels, tile["BLOCK_M"] * tile["REPEAT"]),
        ),
        (x, weight, bias, x if other is None else other, out, pixels, outer, inner)
        + (_NUMBER[epilogue], precision_of(x), max(x.numel(), out.numel()) >= 2**31)
        + (inner % tile["BLOCK_K"] == 0,),
        tile,
        key,
    )
    return out


@torch.library.triton_op("van_deploy::gated", mutates_args={})
def gated(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor,
    gate: Tensor,
    weight_2: Tensor,
    bias_2: Tensor,
    skip: Tensor,
) -> Tensor:
    """Return ``skip + W2 @ (gate * (W1 @ x + b1)) + b2``.

    Args:
        x: ``(N, H, W, C)``, contiguous, C at most :data:`LARGEST_CHAIN`.
        weight_1: ``(C, C)``, and ``weight_2`` as well.
        bias_1: ``(C,)`` float32, and ``bias_2`` as well.
        gate: ``(N, H, W, C)``, and ``skip`` as well.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    shape = require(x, "x", 4)
    channels = shape[3]
    if channels > LARGEST_CHAIN:
        raise UsageError(
            f"'x' has {channels} channels, where the kernel takes {LARGEST_CHAIN} at most.",
            "Use two 1x1 convolutions.",
        )
    require(gate, "gate", shape, like=x)
    require(skip, "skip", shape, like=x)
    for name, weight, bias in (("1", weight_1, bias_1), ("2", weight_2, bias_2)):
        require(weight, f"weight_{name}", (channels, channels), like=x)
        require(bias, f"bias_{name}", (channels,), like=x, dtype=torch.float32)
    out = torch.empty_like(x)
    pixels = shape[0] * shape[1] * shape[2]
    block_c = power_block(channels, LARGEST_CHAIN)
    default = {
        "BLOCK_M": 16 if pixels < 4096 else 64,
        "BLOCK_J": divisor_block(channels, 64 if block_c < 128 else 32),
        "num_warps": 4 if block_c < 128 else 8,
        "num_stages": 2,
    }
    key = tile_key("gated", (channels,), pixels)
    tile = tile_of(key, default, x.device)
    launched(
        gated_kernel,
        (triton.cdiv(pixels, tile["BLOCK_M"]),),
        (x, weight_1, bias_1, gate, weight_2, bias_2, skip, out)
        + (pixels, channels, precision_of(x))
        + (x.numel() >= 2**31, channels == block_c, block_c),
        tile,
        key,
    )
    return out
