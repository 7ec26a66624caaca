"""Shared code of the kernels: argument checks, launches, and the selection of tiles."""

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
FEW = 8192  # with fewer pixels there are too few programs to hide the latency of loads
# Whether Triton interprets kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Compile-time sizes of one launch: a kernel's own, ``num_warps`` and ``num_stages``.
Tile = dict[str, int]
# Tiles by :func:`tile_key` that override the tuned ones, for tuning.
TILES: dict[str, Tile] = {}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the jitted function.
        grid: number of programs in each dimension.
        arguments: arguments in the kernel's order, without those in ``tile``.
        tile: the other compile-time arguments, ``num_warps`` and ``num_stages``.
        key: shape class, see :func:`tile_key`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    tile: Tile
    key: str

    @property
    def bytes(self) -> int:
        """Return the minimal memory traffic: each tensor is read or written once."""
        tensors = {id(a): a for a in self.arguments if isinstance(a, Tensor)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


_records: list[tuple[list[Launch], bool]] = []


@contextmanager
def record_launches(run: bool = True) -> Iterator[list[Launch]]:
    """Record every launch inside the block in the yielded list.

    Args:
        run: also run the kernels; otherwise tensors may be on any device, such as ``meta``.
    """
    launches: list[Launch] = []
    _records.append((launches, run))
    try:
        yield launches
    finally:
        _records.pop()


def check_tensor(
    tensor: Tensor,
    name: str,
    shape: int | tuple[int, ...],
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    strided: bool = False,
) -> tuple[int, ...]:
    """Check a tensor argument of a kernel and return its shape.

    Args:
        tensor: the argument.
        name: name of the argument for messages.
        shape: required number of dimensions, or required shape.
        like: a tensor on the same device, and of the same type unless ``dtype`` is given.
        dtype: required type.
        strided: whether any memory layout is allowed.

    Raises:
        UsageError: the kernel does not support the tensor; nothing was launched.
    """
    actual = tuple(tensor.shape)
    fits = len(actual) == shape if isinstance(shape, int) else actual == shape
    if not fits or 0 in actual:
        expected = f"{shape} dimensions" if isinstance(shape, int) else f"shape {shape}"
        raise UsageError(f"'{name}' has shape {actual}, but the kernel needs {expected}.")
    expected_dtype = dtype or (tensor.dtype if like is None else like.dtype)
    if tensor.dtype not in DTYPES or tensor.dtype != expected_dtype:
        types = "float16, bfloat16 or float32" if like is None else expected_dtype
        raise UsageError(f"'{name}' is {tensor.dtype}, but the kernel needs {types}.")
    if not strided and not tensor.is_contiguous():
        raise UsageError(
            f"'{name}' is not contiguous: its strides are {tensor.stride()}.",
            "Pass tensor.contiguous(), in the layout (N, H, W, C).",
        )
    if not all(run for _, run in _records):
        return actual
    if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise UsageError(
            f"'{name}' is on {tensor.device}, and the kernel runs on a GPU.",
            "Move it to the GPU, or use the PyTorch network.",
        )
    if like is not None and tensor.device != like.device:
        raise UsageError(f"'{name}' is on {tensor.device}, and the input is on {like.device}.")
    return actual


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], tile: Tile, key: str
) -> None:
    """Launch a kernel over a grid; inside ``torch.compile`` it becomes part of the graph."""
    for launches, _ in _records:
        launches.append(Launch(kernel, grid, arguments, tile, key))
    if not all(run for _, run in _records):
        return
    if type(arguments[0]) is Tensor:
        kernel[grid](*arguments, **tile)
    else:  # a tracer's tensor
        torch.library.wrap_triton(kernel)[grid](*arguments, **tile)


def tile_key(kind: str, sizes: Iterable[int], pixels: int) -> str:
    """Return the shape class of a launch: kernel, sizes, and pixels rounded to a power of two.

    >>> tile_key("depthwise", (7, 3, 64), 3136)
    'depthwise/7x3x64/p12'
    """
    return f"{kind}/{'x'.join(map(str, sizes))}/p{int(pixels).bit_length()}"


def select_tile(
    kind: str, sizes: Iterable[int], pixels: int, default: Tile, out: Tensor
) -> tuple[str, Tile]:
    """Return the shape class and the tile of a launch: from ``TILES``, tuned, or ``default``.

    A shape class without a tuned tile uses that of the nearest number of pixels. Tiles are tuned
    for 16-bit types; float32 would not always fit into shared memory.
    """
    key = tile_key(kind, sizes, pixels)
    tile = TILES.get(key)
    if tile is None and out.is_cuda and out.element_size() == 2:
        tile = _tuned_tile(key, out.device)
    return key, default if tile is None else {**default, **tile}


@functools.cache
def _tuned_tile(key: str, device: torch.device) -> Tile | None:
    return nearest_tile(tuned_tiles(*torch.cuda.get_device_capability(device)), key)


def nearest_tile(tiles: dict[str, Tile], key: str) -> Tile | None:
    """Return the tile of the same kernel and sizes with the nearest number of pixels.

    >>> nearest_tile({"norm/32/p8": {"a": 1}, "norm/32/p15": {"a": 2}}, "norm/32/p13")
    {'a': 2}
    """
    kind, pixels = key.rsplit("/p", 1)
    near = [int(k.rsplit("/p", 1)[1]) for k in tiles if k.rsplit("/p", 1)[0] == kind]
    return tiles[f"{kind}/p{min(near, key=lambda p: abs(p - int(pixels)))}"] if near else None


@functools.cache
def tuned_tiles(major: int, minor: int) -> dict[str, Tile]:
    """Return the tuned tiles of a compute capability; empty if there are none."""
    stored = resources.files("van_deploy.kernels") / f"tuned_sm{major}{minor}.json"
    return json.loads(stored.read_text()) if stored.is_file() else {}


def power_of_two_block(count: int, largest: int) -> int:
    """Return the smallest power of two not below ``count``, limited to 16..``largest``.

    >>> power_of_two_block(33, 64), power_of_two_block(3, 64), power_of_two_block(512, 64)
    (64, 16, 64)
    """
    return max(16, min(triton.next_power_of_2(count), largest))


def divisor_block(count: int, largest: int) -> int:
    """Return the largest power of two from 16 to ``largest`` that divides ``count``, if any.

    A whole number of blocks needs no masks over channels. Otherwise :func:`power_of_two_block`.

    >>> divisor_block(160, 64), divisor_block(20, 64)
    (32, 32)
    """
    block = min(count & -count, largest)  # the largest power of two in both
    return block if block >= 16 else power_of_two_block(count, largest)
