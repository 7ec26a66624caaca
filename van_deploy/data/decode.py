"""From image files to network input: the one way for every command.

Quantize, evaluate, predict, serve and the checks all read images here, so that they see
the same pixels: upright, 8 bits a channel, as many channels as the network takes, then
resized and cropped as its weights want it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.data.items import ImageItem
from van_deploy.documents import require_regular_file
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.pixels import MAX_PIXELS, Pixels, image_mode, normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

# What the suffixes stand for; Pillow reads a camera's MPO as JPEG. No others are tried: it gives an
# EPS to Ghostscript, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # TIFF 6.0, section 8
AHEAD = 3
"""Batches decoded before they are asked for: enough to hide a slow file, and a bound on memory."""


def open_image(
    source: Path | str | bytes, *, channels: int = 3, name: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return an image, upright, fully decoded, in the mode of ``channels``; the first of frames.

    Every mode becomes grey (1 channel), RGB (3) or RGBA (4) as Pillow's ``convert`` (and so
    timm) does it: grey is repeated, CMYK converted, a palette looked up. Transparency is kept
    with 4 channels (an image without it is opaque) and dropped with 1 or 3. Two things are done
    before that: the EXIF orientation is applied, and 16-bit grey is scaled to 8 bits (Pillow
    alone would clip it to white).

    Args:
        source: a path, or the bytes of an image file.
        channels: 1, 3 or 4.
        name: what errors call the image, at the beginning of a sentence; by default its path.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        UsageError: no image has so many channels.
        ImageError: not an image, damaged, truncated, too large, or of a pixel
            type without an agreed range (32-bit integers, floats).
    """
    from PIL import Image, UnidentifiedImageError

    mode = image_mode(channels)
    name = name or ("The image" if isinstance(source, bytes) else f"'{source}'")
    failed, remedy = "cannot be read as an image", "Replace the file or leave it out."
    try:
        if not isinstance(source, bytes):
            require_regular_file(Path(source))
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Image.DecompressionBombError(  # noqa: TRY301 - told as Pillow's own is
                    f"{width} x {height} pixels, more than {max_pixels:,}"
                )
            return _converted(image, mode)
    except Exception as problem:  # Pillow's decoders raise almost anything on damaged files
        reason = getattr(problem, "strerror", "") or " ".join(str(problem).split()).rstrip(".")
        if isinstance(problem, UnidentifiedImageError):
            reason = "it is in no known image format"
        elif isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
            failed = "is too large to open safely"
            remedy = "Make it smaller first: the network sees a few hundred pixels a side."
        told = f"{name} {failed}: {reason or type(problem).__name__}."
        raise ImageError(told, remedy) from problem


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Return an opened image upright, with 8 bits a channel, in ``mode``.

    Raises:
        ValueError: its pixels have no agreed range, or channels that Pillow drops.
    """
    from PIL import ImageOps

    image.seek(0)
    tags = getattr(image, "tag_v2", {})
    if mode == "RGBA" and image.mode == "RGB" and tags.get(SAMPLES_PER_PIXEL, 3) > 3:
        raise ValueError("it has more than 3 channels, and none is marked as transparency")
    ImageOps.exif_transpose(image, in_place=True)  # which makes no copy where nothing is turned
    upright: Image.Image = image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        upright = _eight_bits(upright, tags.get(BITS_PER_SAMPLE, (16,)))
    elif image.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
    if upright.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        upright = upright.convert("RGB")  # the others have no way to RGBA
    return upright.convert(mode)


def _eight_bits(image: Image.Image, bits: Any) -> Image.Image:
    """Return 16-bit grey as 8-bit grey, scaled by what its file can hold (12-bit TIFF: 4095)."""
    from PIL import Image

    largest = (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1
    values = np.asarray(image).astype(np.float64) * (255 / largest)
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


# --- network input ---------------------------------------------------------------------------


def opened(item: ImageItem, channels: int = 3) -> Image.Image | None:
    """Return an item as an image in the mode of ``channels``; None for arrays that are none.

    Raises:
        UsageError: no image has so many channels.
        ImageError: it cannot be read.
    """
    from PIL import Image

    if isinstance(item.data, Path):
        return open_image(item.data, channels=channels)
    values = item.data if item.data.ndim == 3 else item.data[:, :, None]
    if values.dtype != np.uint8 or values.shape[2] not in {1, 3, 4}:
        return None
    values = values[:, :, 0] if values.shape[2] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values)).convert(image_mode(channels))


def item_values(item: ImageItem, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Return an item's pixels ``(H, W, C)`` uint8, or its network input ``(C, H, W)`` float32.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
        ImageError: it cannot be read.
    """
    image = opened(item, preprocessing.channels)
    if image is not None:
        return pixels_from_image(image, preprocessing)
    values = np.asarray(item.data)
    sides, channels = preprocessing.sides, preprocessing.channels
    wanted = (*sides, channels) if values.dtype == np.uint8 else (channels, *sides)
    if values.shape == wanted:
        return values
    raise UsageError(
        f"The {item.name} is an array of shape {values.shape}; the network takes {wanted}.",
        "Save it in the network's size; only uint8 images of 1, 3 or 4 channels are resized.",
    )


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the network.

    Attributes:
        indices: which of the items they are.
        inputs: ``(n, C, H, W)`` float32, normalised; n may be 0.
        pixels: the same ``(n, H, W, C)`` uint8 before normalisation; None where an item is
            network input already.
        unreadable: index and reason of each item that could not be read.
    """

    indices: tuple[int, ...]
    inputs: npt.NDArray[np.float32]
    pixels: Pixels | None
    unreadable: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(
        cls, values: Sequence[tuple[int, npt.NDArray[Any] | str]], preprocessing: Preprocessing
    ) -> Batch:
        """Return the batch of what :func:`item_values` gave, by index, or why it did not."""
        good = {index: value for index, value in values if not isinstance(value, str)}
        bad = tuple((index, value) for index, value in values if isinstance(value, str))
        empty = np.empty((*preprocessing.sides, preprocessing.channels), np.uint8)
        stacked = np.stack([*good.values()] or [empty])[: len(good)]
        if stacked.dtype == np.uint8:
            return cls(tuple(good), normalised(stacked, preprocessing), stacked, bad)
        return cls(tuple(good), stacked, None, bad)

    @property
    def values(self) -> npt.NDArray[Any]:
        """The pixels where there are any, else the inputs."""
        return self.inputs if self.pixels is None else self.pixels


def decoded_batches(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    batch: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 1,
    most_unreadable: float = 1.0,
) -> Iterator[Batch]:
    """Yield the items in their order as network input, ``batch`` of them at a time.

    Pillow decodes and resizes without Python's lock, so threads are enough. At most
    :data:`AHEAD` batches wait. A batch is smaller by what could not be read.

    Args:
        items: the images.
        preprocessing: of the network.
        batch: items a batch, 1 or more.
        indices: which of the items; all by default.
        workers: threads.
        most_unreadable: share (0..1) of the images.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
        ImageError: more than ``most_unreadable`` of the images cannot be read.
    """
    every = range(len(items)) if indices is None else indices
    groups = [every[start : start + batch] for start in range(0, len(every), batch)]
    bad: list[str] = []

    def values(index: int) -> tuple[int, npt.NDArray[Any] | str]:
        try:
            return index, item_values(items[index], preprocessing)
        except ImageError as error:
            return index, error.message

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[Any] = deque()
        for group in (*groups, *[()] * AHEAD):
            waiting.append([pool.submit(values, index) for index in group])
            if len(waiting) <= AHEAD:
                continue
            made = Batch.of([future.result() for future in waiting.popleft()], preprocessing)
            bad += [reason for _, reason in made.unreadable]
            if len(bad) > most_unreadable * len(every):
                raise ImageError(
                    f"{len(bad)} of {len(every)} images could not be read, more than "
                    f"{100 * most_unreadable:g} %; the first: {bad[0]}",
                    "Replace or remove these files.",
                )
            yield made
