"""From an image to the bytes a network sees, with nothing but Pillow and NumPy.

It is the first half of the evaluation transforms of timm, torchvision and
Transformers (resize, centre crop), to the last bit: what a graph with embedded
preprocessing takes, and what a server or a client computes without importing
PyTorch. :func:`normalised` is the second half (scale to 0..1, subtract the
mean, divide by the deviation), which an embedded graph does itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PIXELS", "Pixels", "image_mode", "normalised", "pixels_from_image"]

Pixels = npt.NDArray[np.uint8]
"""``(S, S, C)`` or ``(N, S, S, C)`` uint8."""

MAX_PIXELS = 89_478_485
"""A quarter of a GiB as RGB; Pillow's own warning limit."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def image_mode(channels: int) -> str:
    """Return Pillow's mode of an image with so many channels.

    Raises:
        UsageError: no image has so many.
    """
    if channels not in _MODES:
        raise UsageError(
            f"The network takes {channels} channels, and image files have 1, 3 or 4.",
            f"Only arrays have so many: for --images an .npz with 'images', uint8 (N, S, S, "
            f"{channels}) or normalised float32 (N, {channels}, S, S); for the server a tensor.",
        )
    return _MODES[channels]


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return an image resized and cropped as its network wants it, ``(S, S, C)`` uint8.

    Raises:
        UsageError: the network's channels are not an image's (not 1, 3 or 4).
        ImageError: the image is so narrow that its resized form would not fit in memory.
    """
    from PIL import Image as PilImage

    mode = image_mode(preprocessing.channels)
    if image.mode != mode:
        image = image.convert(mode)
    size = _resized(image.size, preprocessing)
    if size != image.size:
        image = image.resize(size, PilImage.Resampling[preprocessing.interpolation.upper()])
    side = preprocessing.image_size
    left, top = (_offset(whole - side, preprocessing.crop_rounding) for whole in size)
    if min(size) < side:  # a border
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        padded = PilImage.new(mode, (side, side), fill)
        padded.paste(image, (-left, -top))
        image = padded
    else:
        image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def normalised(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Return ``(N, S, S, C)`` bytes as the network's input ``(N, C, S, S)`` float32.

    The same three float32 operations in the same order as torchvision's
    ``ToTensor`` and ``Normalize``, so the result is the same to the last bit.
    """
    values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
    values /= np.float32(255)
    shape = (1, preprocessing.channels, 1, 1)
    values -= np.array(preprocessing.mean, np.float32).reshape(shape)
    values /= np.array(preprocessing.std, np.float32).reshape(shape)
    return values


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after resizing, with each source's own rounding."""
    target, (width, height) = preprocessing.resize_size, size
    if preprocessing.crop_mode == "squash":
        return target, target
    if preprocessing.crop_mode == "border":  # timm's ResizeKeepRatio(longest=1)
        ratio = max(size) / target
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    long_side = int(target * max(size) / min(size))  # as torchvision rounds, and Transformers
    if long_side * target > MAX_PIXELS:
        raise ImageError(
            f"An image of {width} x {height} pixels is too narrow: resized to a short side "
            f"of {target} it would be {long_side} pixels long.",
            "Cut out the part that matters first.",
        )
    return (target, long_side) if width <= height else (long_side, target)


def _offset(spare: int, rounding: str) -> int:
    """Return how many of ``spare`` pixels lie before the crop; negative: before the image."""
    if spare < 0:
        return -(-spare // 2)
    return spare // 2 if rounding == "floor" else round(spare / 2)
