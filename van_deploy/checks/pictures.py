"""Pictures to judge an artefact on, with the names by which a report calls them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from van_deploy.checks.sample_images import images_to_check, pixels_to_check
from van_deploy.errors import ImageError
from van_deploy.images import UnreadableImages, find_images, open_image
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

__all__ = ["Pictures", "pictures_to_check"]


@dataclass(frozen=True)
class Pictures:
    """Distinct inputs and what they are.

    Attributes:
        pixels: ``(N, S, S, C)`` uint8, resized and cropped.
        names: what each is called: a path, or its place among the samples.
        described: all of them in one phrase.
    """

    pixels: Pixels
    names: tuple[str, ...]
    described: str


def pictures_to_check(
    name: str, preprocessing: Preprocessing, count: int, folder: Path | None = None
) -> Pictures:
    """Return ``count`` pictures: the user's, spread over their folder, or samples.

    Args:
        name: the model's; ``van_digits`` is checked on its held-out digits.
        preprocessing: how they are resized and cropped.
        count: how many; a smaller folder is filled up with crops of its images.
        folder: the user's images, or None.

    Raises:
        ImageError: the folder holds no image that can be read.
    """
    if folder is None:
        return _samples(name, preprocessing, count, None)
    paths = find_images(folder)
    spread = np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int).tolist()
    order = dict.fromkeys([*spread, *range(len(paths))])  # the rest, should some be unreadable
    bad = UnreadableImages()
    found: dict[bytes, tuple[Pixels, Path]] = {}
    for path in (paths[index] for index in order):
        try:
            pixels = pixels_from_image(open_image(path), preprocessing)
        except ImageError as error:
            bad(path, error)
            continue
        found.setdefault(pixels.tobytes(), (pixels, path))  # the same picture twice tells nothing
        if len(found) == count:
            break
    if len(found) < count:
        return _samples(name, preprocessing, count, folder)
    stacked = np.stack([pixels for pixels, _ in found.values()])
    names = tuple(str(path.relative_to(folder)) for _, path in found.values())
    skipped = f"; {bad.describe(limit=3)}" if len(bad) else ""
    return Pictures(stacked, names, f"{count} images of '{folder}'{skipped}")


def _samples(name: str, preprocessing: Preprocessing, count: int, folder: Path | None) -> Pictures:
    pixels = pixels_to_check(name, preprocessing, count, folder)
    described = images_to_check(name, preprocessing, count, folder)[1]
    if folder is not None:
        described = f"{count} images and crops of '{folder}'"
    return Pictures(pixels, tuple(f"sample {index}" for index in range(count)), described)
