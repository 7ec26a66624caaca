"""From an image to the bytes a network sees, with nothing but Pillow and NumPy.

It is the first half of the evaluation transforms of timm, torchvision and
Transformers (resize, centre crop), to the last bit: what a graph with embedded
preprocessing takes, and what a server or a client computes without importing
PyTorch. :func:`normalised` is the second half (scale to 0..1, subtract the
mean, divide by the deviation), which an embedded graph does itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from van_deploy.config.sizes import sides_of
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Preprocessing

Pixels = npt.NDArray[np.uint8]
"""``(H, W, C)`` or ``(N, H, W, C)`` uint8."""

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
            f"Only arrays have so many: for --images an .npz with 'images', uint8 (N, H, W, "
            f"{channels}) or normalised float32 (N, {channels}, H, W); for the server a tensor.",
        )
    return _MODES[channels]


def pixels_from_image(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Return an image resized and cropped as its network wants it, ``(H, W, C)`` uint8.

    Raises:
        UsageError: the network's channels are not an image's (not 1, 3 or 4).
        ImageError: the image is so narrow that its resized form would not fit in memory.
    """
    mode = image_mode(preprocessing.channels)
    if image.mode != mode:
        image = image.convert(mode)
    size = _resized(image.size, preprocessing)
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
    height, width = preprocessing.sides
    rounding = preprocessing.crop_rounding
    left, top = _offset(size[0] - width, rounding), _offset(size[1] - height, rounding)
    if size[0] < width or size[1] < height:  # a border
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        padded = Image.new(mode, (width, height), fill)
        padded.paste(image, (-left, -top))
        image = padded
    else:
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def normalised(pixels: Pixels, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """Return ``(N, H, W, C)`` bytes as the network's input ``(N, C, H, W)`` float32.

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
    rows, columns = sides_of(target)
    if preprocessing.crop_mode == "squash":
        return columns, rows
    ratios = (height / rows, width / columns)  # of timm's ResizeKeepRatio
    if preprocessing.crop_mode == "border":
        return _scaled(size, max(ratios))
    if isinstance(target, int):  # as torchvision rounds, and Transformers
        long_side = int(target * max(size) / min(size))
        resized = (target, long_side) if width <= height else (long_side, target)
    else:
        resized = _scaled(size, min(ratios))
    if resized[0] * resized[1] > MAX_PIXELS:
        raise ImageError(
            f"An image of {width} x {height} pixels is too narrow: resized to a short side "
            f"of {min(resized)} it would be {max(resized)} pixels long.",
            "Cut out the part that matters first.",
        )
    return resized


def _scaled(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _offset(spare: int, rounding: str) -> int:
    """Return how many of ``spare`` pixels lie before the crop; negative: before the image."""
    if spare < 0:
        return -(-spare // 2)
    return spare // 2 if rounding == "floor" else round(spare / 2)
