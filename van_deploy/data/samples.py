"""Images to check a network on: the user's, or samples when there are none. Never plain noise.

Photographs that lie inside scikit-image or scikit-learn are used where one of
the two is installed; their files are read directly, so nothing is imported and
nothing is downloaded. Elsewhere, and for channels that no photograph has, the
samples are synthetic and labelled so.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.data.calibration import digits_set
from van_deploy.data.dead_leaves import dead_leaves_image
from van_deploy.data.decode import IMAGE_MODES, is_image, item_values, opened, stacked_inputs
from van_deploy.data.items import ImageItem, ImageSet, image_set
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

__all__ = ["CheckImages", "check_images", "sample_set"]

# Photographs of ordinary scenes only: the packages also carry charts, text and micrographs.
PHOTOGRAPHS = {
    "scikit-image": (
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"),
    ),
    "scikit-learn": ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
}
SYNTHETIC_IMAGES = 8
SMALLEST_CROP = 0.4  # of the short side


@dataclass(frozen=True)
class CheckImages:
    """Distinct network inputs, and what they are.

    Attributes:
        inputs: ``(N, C, S, S)`` float32, normalised.
        pixels: the same ``(N, S, S, C)`` uint8, resized and cropped; None where the user gave
            network input.
        names: what each is called in a report.
        description: all of them in one phrase.
    """

    inputs: npt.NDArray[np.float32]
    pixels: Pixels | None
    names: tuple[str, ...]
    description: str

    @property
    def values(self) -> npt.NDArray[Any]:
        """The pixels where there are any, else the inputs."""
        return self.inputs if self.pixels is None else self.pixels

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.names)


def sample_set(model_name: str = "", preprocessing: Preprocessing | None = None) -> ImageSet:
    """Return images that stand in for the user's, in a fixed order.

    The held-out digits for ``van_digits``; else photographs found in installed packages; else,
    or where no photograph has the network's channels, synthetic images.

    Args:
        model_name: of the network.
        preprocessing: of the network; None for an ordinary RGB network.
    """
    if preprocessing is not None and preprocessing.channels not in IMAGE_MODES:
        return _synthetic(
            preprocessing.image_size,
            preprocessing.channels,
            f"no photograph has {preprocessing.channels} channels",
        )
    if model_name == EMBEDDED_NAME:
        return digits_set("heldout")
    groups = {package: found for package in PHOTOGRAPHS if (found := _photographs(package))}
    if not groups:
        return _synthetic(320, 3, "neither scikit-image nor scikit-learn is installed")
    sources = " and ".join(
        f"{len(found)} from {package} ({', '.join(item.name for item in found)})"
        for package, found in groups.items()
    )
    items = tuple(item for group in groups.values() for item in group)
    return ImageSet(items, f"natural photographs: {sources}")


def _photographs(package: str) -> list[ImageItem]:
    """Return the photographs that ``package`` has on this machine; empty if none."""
    module, folder, names = PHOTOGRAPHS[package]
    spec = importlib.util.find_spec(module)  # finds a top-level package without importing it
    if spec is None or spec.origin is None:
        return []
    paths = [Path(spec.origin).parent / folder / name for name in names]
    # Newer releases moved some of these out of the package.
    return [ImageItem(path.stem, path) for path in paths if path.is_file()]


def _synthetic(side: int, channels: int, why: str) -> ImageSet:
    items = tuple(
        ImageItem(f"synthetic {seed}", dead_leaves_image(seed, side, channels=channels))
        for seed in range(SYNTHETIC_IMAGES)
    )
    described = f"{len(items)} synthetic dead-leaves images (not photographs: {why})"
    return ImageSet(items, described)


def check_images(
    model_name: str,
    preprocessing: Preprocessing,
    count: int,
    source: Path | ImageSet | None = None,
    *,
    seed: int = 0,
) -> CheckImages:
    """Return ``count`` distinct network inputs from the user's images or from samples.

    The images are taken whole, spread over their set. Where there are fewer than ``count``,
    random square crops of them make up the number, half of them mirrored; of arrays in the
    network's own size, cyclic shifts. The same arguments give the same inputs.

    Args:
        model_name: of the network: ``van_digits`` is checked on its held-out digits.
        preprocessing: of the network.
        count: how many, 1 or more.
        source: the user's folder or ``.npz``; None for samples.
        seed: picks the crops.

    Raises:
        UsageError: ``count`` is below 1, or the images are of other channels or another size.
        ImageError: not one can be read, or they do not yield that many distinct inputs.
    """
    if count < 1:
        raise UsageError(f"{count} images to check on make no sense.", "Ask for 1 or more.")
    if source is None:
        images = sample_set(model_name, preprocessing)
    else:
        images = source if isinstance(source, ImageSet) else image_set(source)
    found: dict[bytes, tuple[str, npt.NDArray[Any]]] = {}
    whole, bad = _whole(images, preprocessing, count, found)
    rng = np.random.default_rng(seed)
    for attempt in range(4 * count):
        if len(found) == count:
            break
        item = whole[attempt % len(whole)]
        values = _varied(item, preprocessing, rng)
        found.setdefault(values.tobytes(), (f"part of {images.relative(item)}", values))
    if len(found) < count:
        raise ImageError(
            f"Only {len(found)} of {count} distinct inputs could be made from "
            f"{images.description}.",
            "Give more images, with --images DIR or FILE.npz.",
        )
    inputs, pixels = stacked_inputs([values for _, values in found.values()], preprocessing)
    taken = f"{len(whole)} images" if len(whole) == count else f"{count} images and crops"
    described = images.description.removeprefix(f"{len(images)} images")
    skipped = f"; {len(bad)} could not be read, the first: {bad[0]}" if bad else ""
    described = images.description if source is None else f"{taken}{described}{skipped}"
    return CheckImages(inputs, pixels, tuple(name for name, _ in found.values()), described)


def _whole(
    images: ImageSet,
    preprocessing: Preprocessing,
    count: int,
    found: dict[bytes, tuple[str, npt.NDArray[Any]]],
) -> tuple[list[ImageItem], list[str]]:
    """Fill ``found`` with distinct images; return those, and why others could not be read."""
    total = len(images)
    spread = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    whole: list[ImageItem] = []
    bad: list[str] = []
    for index in dict.fromkeys([*spread, *range(total)]):  # the rest, should some be unreadable
        item = images.items[index]
        try:
            values = item_values(item, preprocessing)
        except ImageError as error:
            bad.append(error.message)
            continue
        if values.tobytes() not in found:  # the same image twice tells nothing
            found[values.tobytes()] = (images.relative(item), values)
            whole.append(item)
        if len(found) == count:
            break
    if not whole:
        raise ImageError(
            f"Not one of the {total} images could be read; the first: {bad[0]}",
            "Give images that can be read.",
        )
    return whole, bad


def _varied(
    item: ImageItem, preprocessing: Preprocessing, rng: np.random.Generator
) -> npt.NDArray[Any]:
    """Return a random square of an image, mirrored half of the time, or a shift of an array."""
    from PIL import ImageOps

    if not is_image(item):
        values = item_values(item, preprocessing)
        axes = (1, 2) if values.dtype == np.float32 else (0, 1)
        return np.roll(values, rng.integers(1, preprocessing.image_size, 2).tolist(), axes)
    image = opened(item, preprocessing.channels)
    short = min(image.size)
    side = int(rng.integers(max(1, round(SMALLEST_CROP * short)), short, endpoint=True))
    left, top = (int(rng.integers(0, whole - side, endpoint=True)) for whole in image.size)
    crop = image.crop((left, top, left + side, top + side))
    crop = ImageOps.mirror(crop) if rng.random() < 0.5 else crop
    return pixels_from_image(crop, preprocessing)
