"""Pictures decoded and resized beside the network, a few batches ahead and no more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from van_deploy.errors import ImageError
from van_deploy.images import open_image
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

__all__ = ["DecodedBatch", "decode_batches"]

AHEAD = 3
"""Batches decoded before they are asked for: enough to hide a slow file, and a bound on memory."""


@dataclass(frozen=True)
class DecodedBatch:
    """Some of the pictures, ready for the network.

    Attributes:
        indices: which of the paths they are.
        pixels: ``(n, S, S, C)`` uint8; n may be 0.
        unreadable: index and reason of each file that could not be read.
    """

    indices: tuple[int, ...]
    pixels: Pixels
    unreadable: tuple[tuple[int, str], ...]


def decode_batches(
    paths: Sequence[Path],
    indices: Sequence[int],
    preprocessing: Preprocessing,
    batch: int,
    *,
    workers: int,
) -> Iterator[DecodedBatch]:
    """Yield the pictures ``indices`` of ``paths`` in that order, ``batch`` files at a time.

    Pillow decodes and resizes without Python's lock, so threads are enough: no
    pictures are copied between processes. At most :data:`AHEAD` batches wait.

    Args:
        paths: image files.
        indices: which of them.
        preprocessing: how they are resized and cropped.
        batch: files a batch.
        workers: threads.
    """
    groups = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Sequence[int], list[Future[Pixels | str]]]] = deque()
        for group in groups:
            futures = [pool.submit(_decode, paths[index], preprocessing) for index in group]
            waiting.append((group, futures))
            if len(waiting) > AHEAD:
                yield _collected(*waiting.popleft(), preprocessing)
        while waiting:
            yield _collected(*waiting.popleft(), preprocessing)


def _decode(path: Path, preprocessing: Preprocessing) -> Pixels | str:
    try:
        return pixels_from_image(open_image(path), preprocessing)
    except ImageError as error:
        return error.message


def _collected(
    group: Sequence[int], futures: Sequence[Future[Pixels | str]], preprocessing: Preprocessing
) -> DecodedBatch:
    good: list[int] = []
    pixels: list[Pixels] = []
    bad: list[tuple[int, str]] = []
    for index, future in zip(group, futures, strict=True):
        result = future.result()
        if isinstance(result, str):
            bad.append((index, result))
        else:
            good.append(index)
            pixels.append(result)
    size = preprocessing.image_size
    empty: Pixels = np.empty((0, size, size, preprocessing.channels), np.uint8)
    return DecodedBatch(tuple(good), np.stack(pixels) if pixels else empty, tuple(bad))
