"""Pictures to try a network on when the user gives none. Never plain noise.

Photographs that lie inside scikit-image or scikit-learn are used where one of
the two is installed; their files are read directly, so nothing is imported and
nothing is downloaded. Elsewhere the pictures are synthetic and labelled so.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from van_deploy.errors import ImageError, UsageError
from van_deploy.images.batches import ImageTransform
from van_deploy.images.dead_leaves import dead_leaves_picture
from van_deploy.images.files import open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Samples", "sample_batch", "sample_pictures"]

# Photographs of ordinary scenes only: the packages also carry charts, text and micrographs.
PHOTOGRAPHS = {
    "scikit-image": (
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    "scikit-learn": ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
}
SYNTHETIC_PICTURES = 8
SMALLEST_CROP = 0.4  # of the short side


@dataclass(frozen=True)
class Samples:
    """Pictures that stand in for the user's.

    Attributes:
        images: RGB pictures, in a fixed order.
        description: what they are, for reports.
        synthetic: True if they were generated rather than photographed.
    """

    images: tuple[Image.Image, ...]
    description: str
    synthetic: bool


def sample_pictures() -> Samples:
    """Return photographs found in installed packages, else synthetic pictures."""
    groups = {package: found for package in PHOTOGRAPHS if (found := _photographs(package))}
    if not groups:
        return _synthetic_pictures()
    sources = " and ".join(
        f"{len(found)} from {package} ({', '.join(name for name, _ in found)})"
        for package, found in groups.items()
    )
    images = tuple(image for group in groups.values() for _, image in group)
    return Samples(images, f"natural photographs: {sources}", synthetic=False)


def _photographs(package: str) -> list[tuple[str, Image.Image]]:
    """Return the names and pictures that ``package`` has on this machine; empty if none."""
    module, folder, names = PHOTOGRAPHS[package]
    spec = importlib.util.find_spec(module)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        return []
    pictures = []
    for name in names:
        try:
            picture = open_image(Path(spec.origin).parent / folder / name)
        except ImageError:  # newer releases moved some of these out of the package
            continue
        pictures.append((Path(name).stem, picture))
    return pictures


def _synthetic_pictures() -> Samples:
    from PIL import Image

    images = tuple(Image.fromarray(dead_leaves_picture(seed)) for seed in range(SYNTHETIC_PICTURES))
    return Samples(
        images,
        f"{len(images)} synthetic dead-leaves pictures (not photographs: "
        "neither scikit-image nor scikit-learn is installed)",
        synthetic=True,
    )


def sample_batch(
    count: int, transform: ImageTransform, samples: Samples | None = None, seed: int = 0
) -> NDArray[np.float32]:
    """Return ``count`` distinct network inputs ``(count, 3, S, S)`` float32.

    The first ones are the pictures whole; the others are square crops of them
    at random places, half of them mirrored. The same arguments give the
    same inputs.

    Args:
        count: how many, 1 or more.
        transform: the preprocessing of the weights.
        samples: the pictures; by default :func:`sample_pictures`.
        seed: picks the crops.

    Raises:
        UsageError: ``count`` is below 1.
        ImageError: the pictures do not yield that many distinct inputs.
    """
    if count < 1:
        raise UsageError(f"{count} sample images make no sense.", "Ask for 1 or more.")
    images = (samples or sample_pictures()).images
    rng = np.random.default_rng(seed)
    inputs: dict[bytes, NDArray[np.float32]] = {}
    for attempt in range(4 * count + len(images)):
        picture = images[attempt % len(images)]
        if attempt >= len(images):
            picture = _crop(picture, rng)
        values = np.asarray(transform(picture), dtype=np.float32)
        inputs.setdefault(values.tobytes(), values)
        if len(inputs) == count:
            return np.stack(list(inputs.values()))
    raise ImageError(
        f"Only {len(inputs)} of {count} distinct inputs could be made from the sample pictures.",
        "Pass a folder of images instead.",
    )


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random square of ``picture``, mirrored half of the time."""
    from PIL import ImageOps

    short = min(picture.size)
    side = int(rng.integers(max(1, round(SMALLEST_CROP * short)), short, endpoint=True))
    left, top = (int(rng.integers(0, whole - side, endpoint=True)) for whole in picture.size)
    crop = picture.crop((left, top, left + side, top + side))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop
