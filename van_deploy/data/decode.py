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
from van_deploy.model.pixels import MAX_PIXELS, Pixels, normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_MODES",
    "Batch",
    "decoded_batches",
    "is_image",
    "item_values",
    "open_image",
    "opened",
    "read_pixels",
    "require_images_of",
    "stacked_inputs",
]

IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of an image with so many channels."""

# What the suffixes stand for; Pillow reads a camera's MPO as JPEG. No others are tried: it gives an
# EPS to Ghostscript, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # TIFF 6.0, section 8
DIRECT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # what Pillow converts to RGBA itself
REASONS_SHOWN = 10
AHEAD = 3
"""Batches decoded before they are asked for: enough to hide a slow file, and a bound on memory."""


def require_images_of(channels: int) -> str:
    """Return Pillow's mode of an image with ``channels`` channels.

    Raises:
        UsageError: no image file has so many.
    """
    if channels not in IMAGE_MODES:
        raise UsageError(
            f"The network takes {channels} channels, and image files have 1, 3 or 4.",
            "Give arrays instead: --images FILE.npz with 'images', uint8 (N, S, S, "
            f"{channels}) or normalised float32 (N, {channels}, S, S).",
        )
    return IMAGE_MODES[channels]


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
        name: what errors call the image; by default its path.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        UsageError: no image has so many channels.
        ImageError: not an image, damaged, truncated, too large, or of a pixel
            type without an agreed range (32-bit integers, floats).
    """
    from PIL import Image

    mode = require_images_of(channels)
    name = name or ("the image" if isinstance(source, bytes) else f"'{source}'")
    try:
        if not isinstance(source, bytes):
            require_regular_file(Path(source))
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened, formats=FORMATS) as image:
            _refuse_large(image, name, max_pixels)
            return _converted(image, mode, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise _too_large(name, str(problem)) from problem
    except Exception as problem:  # Pillow's decoders raise almost anything on damaged files
        raise ImageError(
            f"{_capitalised(name)} cannot be read as an image: {_reason(problem)}.",
            "Replace the file or leave it out.",
        ) from problem


def _refuse_large(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} pixels, more than {max_pixels:,}")


def _too_large(name: str, reason: str) -> ImageError:
    return ImageError(
        f"{_capitalised(name)} is too large to open safely: {reason.rstrip('.')}.",
        "Make it smaller first: the network sees a few hundred pixels a side.",
    )


def _converted(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Return an opened image upright, with 8 bits a channel, in ``mode``."""
    from PIL import ImageOps

    image.seek(0)
    stored = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 0)
    if mode == "RGBA" and image.mode == "RGB" and stored > 3:
        raise ImageError(
            f"{_capitalised(name)} has {stored} channels, of which Pillow reads 3: "
            "the others are not marked as transparency.",
            "Save the images as an .npz of arrays, or as RGBA.",
        )
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        upright = _eight_bits(ImageOps.exif_transpose(image), _largest_value(image))
    elif image.mode in {"I", "F"}:
        raise ImageError(
            f"{_capitalised(name)} holds 32-bit pixels (mode {image.mode}), "
            "which have no agreed range.",
            "Convert it to 8 or 16 bits a channel.",
        )
    else:
        upright = ImageOps.exif_transpose(image)
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
    if upright.mode not in DIRECT_MODES:
        upright = upright.convert("RGB")
    return upright.convert(mode)


def _eight_bits(image: Image.Image, largest: int) -> Image.Image:
    """Return integer grey ``0..largest`` as 8-bit grey, scaled and rounded."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64) * (255 / largest)
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def _largest_value(image: Image.Image) -> int:
    """Return the largest value a 16-bit image's file can hold (12-bit TIFF: 4095)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))
    return (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1


def _reason(problem: Exception) -> str:
    """Return the problem in words, on one line and without the file's name."""
    from PIL import UnidentifiedImageError

    if isinstance(problem, UnidentifiedImageError):
        return "it is in no known image format"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split()).rstrip(".")
    return text or type(problem).__name__


def _capitalised(name: str) -> str:
    return name[:1].upper() + name[1:]


# --- network input ---------------------------------------------------------------------------


def read_pixels(
    source: Path | str | bytes,
    preprocessing: Preprocessing,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Return an image file as its network sees it before normalisation, ``(S, S, C)`` uint8.

    Raises:
        UsageError: the network's channels are not an image's.
        ImageError: it cannot be read.
    """
    image = open_image(source, channels=preprocessing.channels, name=name, max_pixels=max_pixels)
    return pixels_from_image(image, preprocessing)


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the network.

    Attributes:
        indices: which of the items they are.
        inputs: ``(n, C, S, S)`` float32, normalised; n may be 0.
        pixels: the same ``(n, S, S, C)`` uint8 before normalisation; None where an item is
            network input already.
        unreadable: index and reason of each item that could not be read.
    """

    indices: tuple[int, ...]
    inputs: npt.NDArray[np.float32]
    pixels: Pixels | None
    unreadable: tuple[tuple[int, str], ...]


def decoded_batches(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    batch: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 1,
    most_unreadable: float | None = None,
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
        most_unreadable: share (0..1) of the images; None leaves it to who reads the batches.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
        ImageError: more than ``most_unreadable`` of the images cannot be read, or none can.
    """
    every = range(len(items)) if indices is None else indices
    groups = [every[start : start + batch] for start in range(0, len(every), max(1, batch))]
    bad: list[str] = []
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[tuple[Sequence[int], list[Any]]] = deque()
        for group in (*groups, *[()] * AHEAD):
            futures = [pool.submit(_values, items[index], preprocessing) for index in group]
            waiting.append((group, futures))
            if len(waiting) <= AHEAD:
                continue
            made = _collected(*waiting.popleft(), preprocessing)
            bad += [reason for _, reason in made.unreadable]
            if most_unreadable is not None:
                _refuse_unreadable(bad, len(every), most_unreadable)
            yield made


def _refuse_unreadable(bad: Sequence[str], total: int, share: float) -> None:
    if bad and (len(bad) > share * total or len(bad) == total):
        more = f"\n  and {len(bad) - REASONS_SHOWN} more" if len(bad) > REASONS_SHOWN else ""
        raise ImageError(
            f"{len(bad)} of {total} images could not be read, more than the {100 * share:g} % "
            "allowed:\n  " + "\n  ".join(bad[:REASONS_SHOWN]) + more,
            "Replace or remove these files.",
        )


def item_values(item: ImageItem, preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Return an item's pixels ``(S, S, C)`` uint8, or its network input ``(C, S, S)`` float32.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
        ImageError: it cannot be read.
    """
    if is_image(item):
        return pixels_from_image(opened(item, preprocessing.channels), preprocessing)
    values = np.asarray(item.data)
    return _fitting(item.name, values, preprocessing)


def is_image(item: ImageItem) -> bool:
    """Return whether an item can be resized: a file, or bytes with an image's channels."""
    if isinstance(item.data, Path):
        return True
    channels = item.data.shape[2] if item.data.ndim == 3 else 1
    return item.data.dtype == np.uint8 and channels in IMAGE_MODES


def opened(item: ImageItem, channels: int = 3) -> Image.Image:
    """Return an item that :func:`is_image` as an image in the mode of ``channels``.

    Raises:
        UsageError: no image has so many channels.
        ImageError: it cannot be read.
    """
    from PIL import Image

    if isinstance(item.data, Path):
        return open_image(item.data, channels=channels)
    values = item.data
    flat = values[:, :, 0] if values.ndim == 3 and values.shape[2] == 1 else values
    return Image.fromarray(np.ascontiguousarray(flat)).convert(require_images_of(channels))


def _values(item: ImageItem, preprocessing: Preprocessing) -> npt.NDArray[Any] | ImageError:
    try:
        return item_values(item, preprocessing)
    except ImageError as error:
        return error


def _fitting(name: str, values: npt.NDArray[Any], preprocessing: Preprocessing) -> npt.NDArray[Any]:
    """Return an array that is used as it is, after a look at its shape."""
    channels_first = values.dtype == np.float32
    side, channels = preprocessing.image_size, preprocessing.channels
    wanted = (channels, side, side) if channels_first else (side, side, channels)
    if values.shape != wanted:
        kind = "network input" if channels_first else "an array"
        raise UsageError(
            f"The {name} is {kind} of shape {values.shape}; the network takes {wanted}.",
            "Save it in the network's size; uint8 images of 1, 3 or 4 channels are resized.",
        )
    return values


def stacked_inputs(
    values: Sequence[npt.NDArray[Any]], preprocessing: Preprocessing
) -> tuple[npt.NDArray[np.float32], Pixels | None]:
    """Return pixels ``(S, S, C)`` or inputs ``(C, S, S)`` as a batch of inputs, and its pixels."""
    side, channels = preprocessing.image_size, preprocessing.channels
    if all(value.dtype == np.uint8 for value in values):
        empty = np.empty((0, side, side, channels), np.uint8)
        pixels = np.stack(values) if values else empty
        return normalised(pixels, preprocessing), pixels
    made = [v if v.dtype == np.float32 else normalised(v[None], preprocessing)[0] for v in values]
    return np.stack(made), None


def _collected(group: Sequence[int], futures: list[Any], preprocessing: Preprocessing) -> Batch:
    results = [(index, future.result()) for index, future in zip(group, futures, strict=True)]
    good = [(index, value) for index, value in results if not isinstance(value, ImageError)]
    inputs, pixels = stacked_inputs([value for _, value in good], preprocessing)
    bad = tuple((i, value.message) for i, value in results if isinstance(value, ImageError))
    return Batch(tuple(index for index, _ in good), inputs, pixels, bad)
