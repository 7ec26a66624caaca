"""1x1 convolutions in NHWC, as matrix products with what follows them fused in."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.errors import UsageError
from van_deploy.kernels.depthwise import gelu
from van_deploy.kernels.launch import (
    FEW,
    chosen,
    divisor_block,
    launched,
    power_of_two_block,
    require,
)

EPILOGUES = ("none", "gelu", "multiply", "add")
"""After the bias: nothing, the exact GELU, the product with or the sum with another tensor."""


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

    Neighbouring programs take the same pixels, so that their input is in the L2 cache. Where
    BLOCK_K holds all of K, a program loads its weights once.
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
        if EPILOGUE >= 2:  # on its way while the product is made
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
    """Return the 1x1 convolution of ``x`` with its epilogue, ``(N, H, W, C_out)``.

    Args:
        x: ``(N, H, W, C_in)``, contiguous.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)`` float32.
        epilogue: one of :data:`EPILOGUES`.
        other: ``(N, H, W, C_out)``, for ``multiply`` and ``add``.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, inner = require(x, "x", 4)
    outer = weight.shape[0]
    require(weight, "weight", (outer, inner), like=x)
    require(bias, "bias", (outer,), like=x, dtype=torch.float32)
    if epilogue not in EPILOGUES or (other is None) != (epilogue in ("none", "gelu")):
        raise UsageError(f"The epilogue '{epilogue}' and the other tensor do not go together.")
    number = EPILOGUES.index(epilogue)
    if other is not None:
        require(other, "other", (batch, height, width, outer), like=x)
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
    key, tile = chosen("pointwise", (number, inner, outer), pixels, default, out)
    columns = triton.cdiv(outer, tile["BLOCK_N"])
    launched(
        pointwise_kernel,
        (columns, triton.cdiv(pixels, tile["BLOCK_M"] * tile["REPEAT"])),
        (x, weight, bias, x if other is None else other, out, pixels, outer, inner, number)
        + (max(x.numel(), out.numel()) >= 2**31, inner % tile["BLOCK_K"] == 0),
        tile,
        key,
    )
    return out
