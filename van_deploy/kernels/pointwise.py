"""1x1 convolutions in NHWC, as matrix products with what follows them fused in."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from van_deploy.errors import UsageError
from van_deploy.kernels.depthwise import gelu
from van_deploy.kernels.launch import launched, require, size_of_power

__all__ = ["Epilogue", "pointwise"]

Epilogue = Literal["none", "gelu", "multiply", "add"]
"""After the bias: nothing, the exact GELU, the product with or the sum with another tensor."""

_NONE, _GELU, _MULTIPLY, _ADD = range(4)
_NUMBER = {"none": _NONE, "gelu": _GELU, "multiply": _MULTIPLY, "add": _ADD}


@triton.jit  # type: ignore[untyped-decorator]
def _pointwise_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    b_ptr,
    other_ptr,
    out_ptr,
    M,
    N,
    K,
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_M pixels of BLOCK_N output channels.

    Neighbouring programs take the same pixels, so that their input is in the L2 cache.
    """
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_known, column_known = rows < M, columns < N
    row_offset = rows.to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        known = inner < K
        a = tl.load(
            x_ptr + row_offset[:, None] * K + inner[None, :],
            mask=row_known[:, None] & known[None, :],
            other=0.0,
        )
        b = tl.load(
            w_ptr + columns[None, :] * K + inner[:, None],
            mask=column_known[None, :] & known[:, None],
            other=0.0,
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    total += tl.load(b_ptr + columns, mask=column_known, other=0.0).to(tl.float32)[None, :]
    place = row_offset[:, None] * N + columns[None, :]
    mask = row_known[:, None] & column_known[None, :]
    if EPILOGUE == 1:
        total = gelu(total)
    if EPILOGUE == 2:
        total *= tl.load(other_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if EPILOGUE == 3:
        total += tl.load(other_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=mask)


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, epilogue: Epilogue = "none", other: Tensor | None = None
) -> Tensor:
    """Return the 1x1 convolution of ``x`` with its epilogue, ``(N, H, W, C_out)``.

    Args:
        x: ``(N, H, W, C_in)``, contiguous.
        weight: ``(C_out, C_in)``.
        bias: ``(C_out,)``.
        epilogue: what follows.
        other: ``(N, H, W, C_out)``, for ``multiply`` and ``add``.

    Raises:
        UsageError: a shape, type, layout or device the kernel does not take.
    """
    batch, height, width, inner = require(x, "x", 4)
    outer = weight.shape[0]
    require(weight, "weight", (outer, inner), like=x)
    require(bias, "bias", (outer,), like=x)
    if (other is None) != (epilogue in ("none", "gelu")):
        raise UsageError(f"The epilogue '{epilogue}' and the other tensor do not go together.")
    if other is not None:
        require(other, "other", (batch, height, width, outer), like=x)
    out = torch.empty((batch, height, width, outer), dtype=x.dtype, device=x.device)
    pixels = batch * height * width
    block_m, block_n = (64 if pixels < 16384 else 128), size_of_power(outer, 128)
    launched(
        _pointwise_kernel,
        (triton.cdiv(outer, block_n), triton.cdiv(pixels, block_m)),
        (x, weight, bias, x if other is None else other, out, pixels, outer, inner),
        dict(
            EPILOGUE=_NUMBER[epilogue],
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=size_of_power(inner, 64 if x.dtype != torch.float32 else 32),
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        ),
    )
    return out
