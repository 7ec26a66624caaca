"""Images to check an artefact on: the user's, the embedded digits, or sample photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from van_deploy.errors import ImageError
from van_deploy.images import (
    Samples,
    UnreadableImages,
    find_images,
    open_image,
    sample_batch,
    sample_pictures,
)
from van_deploy.model.embedded import EMBEDDED_NAME, digits_images
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.base import Images

__all__ = ["images_to_check", "pixels_to_check"]


def images_to_check(
    name: str, preprocessing: Preprocessing, count: int, folder: Path | None = None
) -> tuple[Images, str]:
    """Return ``count`` distinct inputs ``(count, C, S, S)`` and what they are.

    Args:
        name: the model's name; ``van_digits`` is checked on its held-out digits.
        preprocessing: what the network's input must have gone through.
        count: how many.
        folder: the user's images. Where there are fewer than ``count``, crops
            of them make up the number.

    Raises:
        ImageError: the folder holds no image that can be read.
    """
    samples = _samples(name, count, folder)
    return sample_batch(count, preprocessing.transform(), samples), samples.description


def pixels_to_check(
    name: str, preprocessing: Preprocessing, count: int, folder: Path | None = None
) -> Pixels:
    """Return the same pictures as bytes ``(count, S, S, C)``, before normalisation."""
    samples = _samples(name, count, folder)
    values = sample_batch(count, lambda image: pixels_from_image(image, preprocessing), samples)
    return values.astype(np.uint8)


def _samples(name: str, count: int, folder: Path | None) -> Samples:
    if folder is not None:
        return _of_folder(folder, count)
    return _digits(count) if name == EMBEDDED_NAME else sample_pictures()


def _of_folder(folder: Path, count: int) -> Samples:
    paths = find_images(folder)
    bad = UnreadableImages()
    pictures = []
    for path in paths[:: max(1, len(paths) // count)]:  # spread over the classes
        try:
            pictures.append(open_image(path))
        except ImageError as error:
            bad(path, error)
        if len(pictures) == count:
            break
    if not pictures:
        raise ImageError(bad.describe(), "Give a folder of images that can be read.")
    unreadable = f", {bad.describe(limit=3)}" if len(bad) else ""
    return Samples(tuple(pictures), f"{len(pictures)} images of '{folder}'{unreadable}", False)


def _digits(count: int) -> Samples:
    from PIL import Image

    images, _ = digits_images("heldout")
    chosen = images[:count]
    pictures = tuple(Image.fromarray(np.ascontiguousarray(i)).convert("RGB") for i in chosen)
    return Samples(pictures, f"{len(pictures)} held-out handwritten digits", synthetic=False)
