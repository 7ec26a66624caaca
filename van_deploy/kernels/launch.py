"""What all kernels share: what they take, how they are launched, how their tiles are chosen."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import triton
from torch import Tensor

from van_deploy.errors import UsageError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEW = 8192
"""Pixels below which there are too few programs to hide a load's latency by others."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels on the CPU, operation by operation, to check them."""

Tile = dict[str, int]
"""Compile-time sizes of one launch: a kernel's own, ``num_warps`` and ``num_stages``."""

TILES: dict[str, Tile] = {}
"""Tiles by :func:`tile_key` that go before the tuned ones: what tuning tries."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the jitted function.
        grid: programs in each dimension.
        arguments: in the kernel's order; the compile-time ones that are not in ``tile`` last.
        tile: the other compile-time arguments, ``num_warps`` and ``num_stages``.
        key: its shape class, see :func:`tile_key`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    tile: Tile
    key: str

    @property
    def bytes(self) -> int:
        """Return what must cross the memory: each tensor once, read or written."""
        tensors = {id(a): a for a in self.arguments if isinstance(a, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


_records: list[tuple[list[Launch], bool]] = []


@contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Yield a list that every launch inside is added to.

    Args:
        run: launch as well; else tensors may be on any device, such as ``meta``.
    """
    launches: list[Launch] = []
    _records.append((launches, run))
    try:
        yield launches
    finally:
        _records.pop()


def require(
    tensor: Tensor,
    name: str,
    shape: int | tuple[int, ...],
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    strided: bool = False,
) -> tuple[int, ...]:
    """Return a tensor's shape once it is one that a kernel takes.

    Args:
        tensor: the argument.
        name: what the message calls it.
        shape: its number of dimensions, or the whole shape.
        like: a tensor on the same device, and of the same type unless ``dtype`` is given.
        dtype: its type.
        strided: its memory may be in any layout.

    Raises:
        UsageError: it is not; nothing was launched.
    """
    found = tuple(tensor.shape)
    fits = len(found) == shape if isinstance(shape, int) else found == shape
    if not fits or 0 in found:
        wanted = f"{shape} dimensions" if isinstance(shape, int) else f"shape {shape}"
        raise UsageError(f"'{name}' has shape {found}, where the kernel takes {wanted}.")
    wanted_dtype = dtype or (tensor.dtype if like is None else like.dtype)
    if tensor.dtype not in DTYPES or tensor.dtype != wanted_dtype:
        takes = "float16, bfloat16 or float32" if like is None else wanted_dtype
        raise UsageError(f"'{name}' is {tensor.dtype}, where the kernel takes {takes}.")
    if not strided and not tensor.is_contiguous():
        raise UsageError(
            f"'{name}' is not contiguous: its strides are {tensor.stride()}.",
            "Pass tensor.contiguous(), in the layout (N, H, W, C).",
        )
    if all(run for _, run in _records):
        _require_gpu(tensor, name, like)
    return found


def _require_gpu(tensor: Tensor, name: str, like: Tensor | None) -> None:
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise UsageError(
            f"'{name}' is on {tensor.device}, and the kernel runs on a GPU.",
            "Move it there, or use the PyTorch network.",
        )
    if like is not None and tensor.device != like.device:
        raise UsageError(f"'{name}' is on {tensor.device}, and the input is on {like.device}.")


def launched(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: Tile, key: str
) -> None:
    """Run ``kernel`` over ``grid``; inside ``torch.compile`` it becomes part of the graph."""
    for launches, _ in _records:
        launches.append(Launch(kernel, grid, arguments, tile, key))
    if not all(run for _, run in _records):
        return
    if type(arguments[0]) is Tensor:
        kernel[grid](*arguments, **tile)
    else:  # traced
        torch.library.wrap_triton(kernel)[grid](*arguments, **tile)


def tile_key(kind: str, sizes: Iterable[int], pixels: int) -> str:
    """Return the shape class of a launch: kernel, sizes, and pixels to a power of two.

    >>> tile_key("depthwise", (7, 3, 64), 3136)
    'depthwise/7x3x64/p12'
    """
    return f"{kind}/{'x'.join(map(str, sizes))}/p{int(pixels).bit_length()}"


def chosen(
    kind: str, sizes: Iterable[int], pixels: int, default: Tile, out: Tensor
) -> tuple[str, Tile]:
    """Return a launch's shape class and its tile: being tried, tuned for this GPU, or ``default``.

    A class that was not tuned takes the tile of the nearest number of pixels that was. Tiles
    are tuned for 16 bits; float32 would not always fit the shared memory.
    """
    key = tile_key(kind, sizes, pixels)
    tile = TILES.get(key)
    if tile is None and out.is_cuda and out.element_size() == 2:
        tile = _stored(key, out.device)
    return key, default if tile is None else {**default, **tile}


@functools.cache
def _stored(key: str, device: torch.device) -> Tile | None:
    return nearest(tuned_tiles(*torch.cuda.get_device_capability(device)), key)


def nearest(tiles: dict[str, Tile], key: str) -> Tile | None:
    """Return the tile of the same kernel and sizes whose number of pixels is nearest.

    >>> nearest({"layer_norm/32/p8": {"a": 1}, "layer_norm/32/p15": {"a": 2}}, "layer_norm/32/p13")
    {'a': 2}
    """
    kind, pixels = key.rsplit("/p", 1)
    near = [int(k.rsplit("/p", 1)[1]) for k in tiles if k.rsplit("/p", 1)[0] == kind]
    return tiles[f"{kind}/p{min(near, key=lambda p: abs(p - int(pixels)))}"] if near else None


@functools.cache
def tuned_tiles(major: int, minor: int) -> dict[str, Tile]:
    """Return the stored tiles for a compute capability; empty where none were tuned."""
    stored = resources.files("van_deploy.kernels") / f"tuned_sm{major}{minor}.json"
    return json.loads(stored.read_text()) if stored.is_file() else {}


def power_of_two_block(count: int, largest: int) -> int:
    """Return the smallest power of two that holds ``count``, at least 16 and at most ``largest``.

    >>> power_of_two_block(33, 64), power_of_two_block(3, 64), power_of_two_block(512, 64)
    (64, 16, 64)
    """
    return max(16, min(triton.next_power_of_2(count), largest))


def divisor_block(count: int, largest: int) -> int:
    """Return the largest power of two from 16 to ``largest`` that divides ``count``, if any.

    A whole number of blocks needs no masks over channels; else :func:`power_of_two_block`.

    >>> divisor_block(160, 64), divisor_block(20, 64)
    (32, 32)
    """
    block = min(count & -count, largest)  # the largest power of two in both
    return block if block >= 16 else power_of_two_block(count, largest)
