"""Images to check a network on: the user's, or samples when there are none. Never plain noise.

Photographs that lie inside scikit-image or scikit-learn are used where one of
the two is installed; their files are read directly, so nothing is imported and
nothing is downloaded. Elsewhere, and for channels that no photograph has, the
samples are synthetic and labelled so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.data.images import Batch, ImageItem, ImageSet, Values, image_set, item_values
from van_deploy.errors import ImageError
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit, digits_images
from van_deploy.model.preprocess import Preprocessing

# What sample images are called that no network was trained on in particular.
GENERIC = ("natural photographs", "synthetic dead-leaves images")

# Photographs of ordinary scenes only: the packages also carry charts, text and micrographs.
PHOTOGRAPHS = (
    *("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png"),
    *("skimage/data/motorcycle_left.png", "skimage/data/rocket.jpg"),
    *("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
)
SYNTHETIC_IMAGES, LEAVES = 8, 1000
SHIFTED = "shifted "


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
    channels, names, items = 3, [*PHOTOGRAPHS], list[ImageItem]()
    if preprocessing is not None and preprocessing.channels not in {1, 3, 4}:
        size, channels, names = preprocessing.image_size, preprocessing.channels, []
    for name in names:
        spec = importlib.util.find_spec(name.partition("/")[0])  # which imports nothing
        path = Path(spec.origin).parents[1] / name if spec and spec.origin else Path()
        items += [ImageItem(path.stem, path)] if path.is_file() else []  # releases differ
    if items:
        named = ", ".join(item.name for item in items)
        return ImageSet(tuple(items), f"{len(items)} {GENERIC[0]}: {named}")
    leaves = [dead_leaves_image(seed, size, channels) for seed in range(SYNTHETIC_IMAGES)]
    items = [ImageItem(f"synthetic {seed}", image) for seed, image in enumerate(leaves)]
    what = f"{len(items)} {GENERIC[1]} (no photographs of {channels} channels here)"
    return ImageSet(tuple(items), what)


def digits_set(part: DigitsSplit) -> ImageSet:
    """Return the handwritten digits inside the package: ``train`` or ``heldout``."""
    items = tuple(
        ImageItem(f"digit {number}", image, str(label), int(label))
        for number, (image, label) in enumerate(zip(*digits_images(part), strict=True))
    )
    kind = "training" if part == "train" else "held-out"
    return ImageSet(items, f"{len(items)} {kind} images of handwritten digits")


def noise_set(count: int, preprocessing: Preprocessing, seed: int = 0) -> ImageSet:
    """Return seeded normal noise as network input ``(C, H, W)``, labelled as what it is."""
    shape = (count, preprocessing.channels, *preprocessing.sides)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    items = tuple(ImageItem(f"noise {number}", each) for number, each in enumerate(values))
    return ImageSet(items, f"{count} samples of NOISE, no images", noise=True)


def dead_leaves_image(seed: int, size: ImageSize, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return a synthetic image ``(H, W, channels)`` uint8, always the same one.

    Shaded discs that hide each other, with radii of density ``r**-3``: the edges, contrasts and
    power spectrum resemble those of photographs (A. B. Lee, D. Mumford and J. Huang, "Occlusion
    models for natural images", International Journal of Computer Vision 41, 2001).
    """
    rng, sides = np.random.default_rng(seed), height_width(size)
    canvas = np.tile(rng.uniform(0, 255, channels), (*sides, 1))
    low, high = 2.0, 0.35 * min(sides)  # pixels
    radii = (low**-2 - rng.uniform(size=LEAVES) * (low**-2 - high**-2)) ** -0.5
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


def verification_images(
    model_name: str, preprocessing: Preprocessing, count: int, source: Path | ImageSet | None = None
) -> Batch:
    """Return ``count`` distinct network inputs from the user's images or from samples.

    The images are taken as they are, spread over their set. Where there are fewer than
    ``count``, random cyclic shifts of them make up the number. The same arguments give the same
    inputs.

    Args:
        model_name: of the network: ``van_digits`` is checked on its held-out digits.
        preprocessing: of the network.
        count: how many, 1 or more.
        source: the user's folder or ``.npz``; None for samples.

    Raises:
        UsageError: the images are of other channels or another size.
        ImageError: not one can be read, or they do not yield that many distinct inputs.
    """
    images = sample_set(model_name, preprocessing) if source is None else image_set(source)
    total, rng, bad = len(images), np.random.default_rng(0), list[str]()

    def candidates() -> Iterator[tuple[str, Values]]:
        whole: list[ImageItem] = []
        spread = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
        for index in dict.fromkeys([*spread, *range(total)]):  # the rest, should some be unreadable
            item = images.items[index]
            try:
                yield item.name, item_values(item, preprocessing)
                whole.append(item)
            except ImageError as error:
                bad.append(error.message)
        for item in whole * (4 * -(-count // len(whole))) if whole else ():
            values = item_values(item, preprocessing)
            axes = (0, 1) if values.dtype == np.uint8 else (1, 2)
            part = np.roll(values, rng.integers(1, preprocessing.sides).tolist(), axes)
            yield f"{SHIFTED}{item.name}", part

    found: dict[bytes, tuple[str, Values]] = {}
    for name, values in candidates():
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
    names, every = zip(*found.values(), strict=True)
    shifted = "images and shifts of" if any(name.startswith(SHIFTED) for name in names) else "of"
    batch = Batch.of(dict(enumerate(every)), preprocessing)
    described = f"{count} {shifted} {images.description}{unread}"
    return replace(batch, names=names, description=described)
