"""From a picture to the bytes a network sees, with nothing but Pillow and NumPy.

It is the first half of timm's evaluation transform (resize, centre crop), to
the last bit: what a graph with embedded preprocessing takes, and what a server
or a client computes without importing PyTorch. :func:`normalised` is the
second half (scale to 0..1, subtract the mean, divide by the deviation), which
an embedded graph does itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PIXELS", "Pixels", "normalised", "pixels_from_image"]

Pixels = npt.NDArray[np.uint8]
"""``(S, S, C)`` or ``(N, S, S, C)`` uint8."""

MAX_PIXELS = 89_478_485
"""A quarter of a GiB as RGB; Pillow's own warning limit."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return a picture resized and cropped as its network wants it, ``(S, S, C)`` uint8.

    Raises:
        UsageError: the network's channels are not a picture's (not 1, 3 or 4).
        ImageError: the picture is so narrow that its resized form would not fit in memory.
    """
    from PIL import Image as PilImage

    mode = _MODES.get(preprocessing.channels)
    if mode is None:
        raise UsageError(
            f"No picture has {preprocessing.channels} channels.",
            "Networks for 1, 3 or 4 input channels can be fed from picture files.",
        )
    if image.mode != mode:
        image = image.convert(mode)
    width, height = _resized(image.size, preprocessing.resize_size)
    if (width, height) != image.size:
        filter_ = PilImage.Resampling[preprocessing.interpolation.upper()]
        image = image.resize((width, height), filter_)
    pixels = np.asarray(_centre(image, preprocessing.image_size), dtype=np.uint8)
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


def _resized(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return width and height once the short side is ``short_side``, as torchvision rounds."""
    width, height = size
    long_side = int(short_side * max(size) / min(size))
    if long_side * short_side > MAX_PIXELS:
        raise ImageError(
            f"A picture of {width} x {height} pixels is too narrow: resized to a short side "
            f"of {short_side} it would be {long_side} pixels long.",
            "Cut out the part that matters first.",
        )
    return (short_side, long_side) if width <= height else (long_side, short_side)


def _centre(image: Image.Image, side: int) -> Image.Image:
    """Return the centre square; torchvision's rounding (half to even)."""
    left, top = (round((whole - side) / 2.0) for whole in image.size)
    return image.crop((left, top, left + side, top + side))
