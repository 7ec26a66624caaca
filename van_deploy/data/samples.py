"""Images to check a network on: the user's, or samples when there are none. Never plain noise.

Photographs that lie inside scikit-image or scikit-learn are used where one of
the two is installed; their files are read directly, so nothing is imported and
nothing is downloaded. Elsewhere, and for channels that no photograph has, the
samples are synthetic and labelled so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config.sizes import ImageSize, sides_of
from van_deploy.data.decode import Batch, item_values, opened
from van_deploy.data.items import ImageItem, ImageSet, image_set
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit, digits_images
from van_deploy.model.pixels import pixels_from_image
from van_deploy.model.preprocess import Preprocessing

# Photographs of ordinary scenes only: the packages also carry charts, text and micrographs.
PHOTOGRAPHS = {
    "skimage": [
        *("data/astronaut.png", "data/chelsea.png", "data/coffee.png"),
        *("data/motorcycle_left.png", "data/rocket.jpg"),
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
SYNTHETIC_IMAGES = 8
PART = "part of "
SMALLEST_CROP = 0.4  # of the short side


@dataclass(frozen=True)
class CheckImages(Batch):
    """Distinct network inputs, and what they are.

    Attributes:
        names: what each is called in a report.
        description: all of them in one phrase.
    """

    names: tuple[str, ...] = ()
    description: str = ""

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
    if model_name == EMBEDDED_NAME:
        return digits_set("heldout")
    size: ImageSize = 320
    channels, why = 3, "neither scikit-image nor scikit-learn is installed"
    if preprocessing is not None and preprocessing.channels not in {1, 3, 4}:
        size, channels = preprocessing.image_size, preprocessing.channels
        why = f"no photograph has {channels} channels"
    elif photographs := _photographs():
        named = ", ".join(item.name for item in photographs)
        return ImageSet(photographs, f"{len(photographs)} natural photographs: {named}")
    items = tuple(
        ImageItem(f"synthetic {seed}", dead_leaves_image(seed, size, channels))
        for seed in range(SYNTHETIC_IMAGES)
    )
    return ImageSet(items, f"{len(items)} synthetic dead-leaves images (not photographs: {why})")


def _photographs() -> tuple[ImageItem, ...]:
    """Return the photographs that lie in packages on this machine."""
    found = []
    for package, files in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)  # which imports nothing
        if spec is not None and spec.origin is not None:
            found += [Path(spec.origin).parent / file for file in files]
    # Newer releases moved some of them out of the package.
    return tuple(ImageItem(path.stem, path) for path in found if path.is_file())


def dead_leaves_image(
    seed: int, size: ImageSize, channels: int = 3, leaves: int = 1000
) -> npt.NDArray[np.uint8]:
    """Return a synthetic image ``(H, W, channels)`` uint8, always the same one.

    Shaded discs that hide each other, with radii of density ``r**-3``: the edges, contrasts and
    power spectrum resemble those of photographs (A. B. Lee, D. Mumford and J. Huang, "Occlusion
    models for natural images", International Journal of Computer Vision 41, 2001).
    """
    rng, sides = np.random.default_rng(seed), sides_of(size)
    canvas = np.tile(rng.uniform(0, 255, channels), (*sides, 1))
    low, high = 2.0, 0.35 * min(sides)  # pixels
    radii = (low**-2 - rng.uniform(size=leaves) * (low**-2 - high**-2)) ** -0.5
    for radius in radii:
        y, x = rng.uniform(-radius, np.add(sides, radius))
        window = [slice(max(0, int(c - radius)), max(0, int(c + radius + 2))) for c in (y, x)]
        part = canvas[tuple(window)]
        rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
        rows, columns = rows + window[0].start - y, columns + window[1].start - x
        slope = rng.normal(0, 15, 2) / radius
        shade = rows * slope[0] + columns * slope[1] + rng.normal(0, 4, part.shape[:2])
        inside = rows**2 + columns**2 <= radius**2
        part[inside] = (rng.uniform(0, 255, channels) + shade[..., None])[inside]
    return np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)


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
    images = sample_set(model_name, preprocessing) if source is None else image_set(source)
    found: dict[bytes, tuple[str, npt.NDArray[Any]]] = {}
    bad: list[str] = []
    for name, values in _candidates(images, preprocessing, count, seed, bad):
        found.setdefault(values.tobytes(), (name, values))  # the same image twice tells nothing
        if len(found) == count:
            break
    unread = f"; {len(bad)} could not be read, the first: {bad[0]}" if bad else ""
    if len(found) < count:
        raise ImageError(
            f"Only {len(found)} of {count} distinct inputs could be made from the "
            f"{images.description}{unread or '.'}",
            "Give more images that can be read.",
        )
    batch = Batch.of(list(enumerate(values for _, values in found.values())), preprocessing)
    names = tuple(name for name, _ in found.values())
    parts = any(name.startswith(PART) for name in names)
    taken = f"{count} images and parts of" if parts else f"{count} of"
    return CheckImages(
        **vars(batch), names=names, description=f"{taken} {images.description}{unread}"
    )


def _candidates(
    images: ImageSet, preprocessing: Preprocessing, count: int, seed: int, bad: list[str]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield images whole, spread over their set, then random parts of them, each with its name.

    Why an image could not be read is added to ``bad``.
    """
    total, whole, rng = len(images), [], np.random.default_rng(seed)
    spread = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    for index in dict.fromkeys([*spread, *range(total)]):  # the rest, should some be unreadable
        item = images.items[index]
        try:
            yield images.relative(item), item_values(item, preprocessing)
        except ImageError as error:
            bad.append(error.message)
        else:
            whole.append(item)
    for attempt in range(4 * count if whole else 0):
        item = whole[attempt % len(whole)]
        yield f"{PART}{images.relative(item)}", _part(item, preprocessing, rng)


def _part(
    item: ImageItem, preprocessing: Preprocessing, rng: np.random.Generator
) -> npt.NDArray[Any]:
    """Return a random square of an image, mirrored half of the time, or a shift of an array."""
    from PIL import ImageOps

    image = opened(item, preprocessing.channels)
    if image is None:
        values = item_values(item, preprocessing)
        axes = (0, 1) if values.dtype == np.uint8 else (1, 2)
        return np.roll(values, rng.integers(1, preprocessing.sides).tolist(), axes)
    short = min(image.size)
    side = int(rng.integers(max(1, round(SMALLEST_CROP * short)), short, endpoint=True))
    left, top = (int(rng.integers(0, whole - side, endpoint=True)) for whole in image.size)
    crop = image.crop((left, top, left + side, top + side))
    return pixels_from_image(ImageOps.mirror(crop) if rng.random() < 0.5 else crop, preprocessing)


def digits_set(part: DigitsSplit) -> ImageSet:
    """Return the handwritten digits inside the package: ``train`` or ``heldout``."""
    values, labels = digits_images(part)
    items = tuple(
        ImageItem(f"digit {number}", image, str(label), int(label))
        for number, (image, label) in enumerate(zip(values, labels, strict=True))
    )
    kind = "training" if part == "train" else "held-out"
    return ImageSet(items, f"{len(items)} {kind} images of handwritten digits")


def noise_set(count: int, preprocessing: Preprocessing, seed: int = 0) -> ImageSet:
    """Return seeded normal noise as network input ``(C, H, W)``, labelled as what it is."""
    rng = np.random.default_rng(seed)
    shape = (preprocessing.channels, *preprocessing.sides)
    items = [
        ImageItem(f"noise {number}", rng.standard_normal(shape).astype(np.float32))
        for number in range(count)
    ]
    return ImageSet(tuple(items), f"{count} samples of NOISE, no images", noise=True)
