"""What all kernels share: what they take, how they are launched, how their tiles are sized."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from van_deploy.errors import UsageError

__all__ = ["DTYPES", "INTERPRETED", "launched", "require", "rows_of", "size_of_power"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels on the CPU, operation by operation, to check them."""

TILE_VALUES = 2048  # float32 sums a program holds: 16 registers a thread of 128


def require(
    tensor: Tensor, name: str, shape: int | tuple[int, ...], like: Tensor | None = None
) -> tuple[int, ...]:
    """Return a tensor's shape once it is one that a kernel takes.

    Args:
        tensor: the argument.
        name: what the message calls it.
        shape: its number of dimensions, or the whole shape.
        like: a tensor of the same type and device.

    Raises:
        UsageError: it is not; nothing was launched.
    """
    found = tuple(tensor.shape)
    fits = len(found) == shape if isinstance(shape, int) else found == shape
    if not fits or 0 in found:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else f"shape {shape}"
        raise UsageError(f"'{name}' has shape {found}, where the kernel takes {wanted}.")
    if tensor.dtype not in DTYPES or (like is not None and tensor.dtype != like.dtype):
        takes = like.dtype if like is not None else "float16, bfloat16 or float32"
        raise UsageError(f"'{name}' is {tensor.dtype}, where the kernel takes {takes}.")
    if not tensor.is_contiguous():
        raise UsageError(
            f"'{name}' is not contiguous: its strides are {tensor.stride()}.",
            "Pass tensor.contiguous(), in the layout (N, H, W, C).",
        )
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise UsageError(
            f"'{name}' is on {tensor.device}, and the kernel runs on a GPU.",
            "Move it there, or use the PyTorch network.",
        )
    if like is not None and tensor.device != like.device:
        raise UsageError(f"'{name}' is on {tensor.device}, and the input is on {like.device}.")
    return found


def launched(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Run ``kernel`` over ``grid``; inside ``torch.compile`` it becomes part of the graph."""
    wrapped: Callable[..., Any] = kernel if INTERPRETED else torch.library.wrap_triton(kernel)
    wrapped[grid](*arguments, **constants)  # type: ignore[index]


def size_of_power(count: int, largest: int) -> int:
    """Return the smallest power of two that holds ``count``, at least 16 and at most ``largest``.

    >>> size_of_power(33, 64), size_of_power(3, 64), size_of_power(512, 64)
    (64, 16, 64)
    """
    return max(16, min(triton.next_power_of_2(count), largest))


def rows_of(side: int, block_c: int) -> int:
    """Return how many pixels a depth-wise program takes: fewer where a tap costs more.

    >>> rows_of(3, 64), rows_of(7, 64)
    (32, 16)
    """
    return max(8, TILE_VALUES // block_c // (1 if side <= 5 else 2))
