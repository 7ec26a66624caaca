"""Images to verify a network with: the user's, or sample images.

The samples are photographs from scikit-image or scikit-learn if one of them is
installed; their files are read directly, without an import or a download.
Otherwise, and for other numbers of channels, the samples are synthetic images,
and their description says so.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.config.sizes import ImageSize, height_width
from van_deploy.data.images import Batch, ImageItem, ImageSet, Values, image_set, load_item
from van_deploy.errors import ImageError
from van_deploy.model.embedded import EMBEDDED_NAME, DigitsSplit, digits_images
from van_deploy.model.preprocess import Preprocessing

# Descriptions of sample images that are not of the network's own data set.
GENERIC = ("natural photographs", "synthetic dead-leaves images")

# Photographs of natural scenes only: the packages also have charts, text and micrographs.
PHOTOGRAPHS = (
    *("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png"),
    *("skimage/data/motorcycle_left.png", "skimage/data/rocket.jpg"),
    *("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"),
)
SYNTHETIC_IMAGES, LEAVES = 8, 1000
SHIFT_PREFIX = "shifted "


def sample_set(model_name: str = "", preprocessing: Preprocessing | None = None) -> ImageSet:
    """Return sample images in a fixed order.

    The held-out digits for ``van_digits``; else photographs from installed packages; else, or if
    photographs do not have the network's number of channels, synthetic images.

    Args:
        model_name: of the network.
        preprocessing: of the network; None for an RGB network.
    """
    if model_name == EMBEDDED_NAME:
        return digits_set("heldout")
    size: ImageSize = 320
    channels, names, items = 3, [*PHOTOGRAPHS], list[ImageItem]()
    if preprocessing is not None and preprocessing.channels not in {1, 3, 4}:
        size, channels, names = preprocessing.image_size, preprocessing.channels, []
    for name in names:
        spec = importlib.util.find_spec(name.partition("/")[0])  # does not import it
        path = Path(spec.origin).parents[1] / name if spec and spec.origin else Path()
        items += [ImageItem(path.stem, path)] if path.is_file() else []  # depends on the release
    if items:
        file_names = ", ".join(item.name for item in items)
        return ImageSet(tuple(items), f"{len(items)} {GENERIC[0]}: {file_names}")
    leaves = [dead_leaves_image(seed, size, channels) for seed in range(SYNTHETIC_IMAGES)]
    items = [ImageItem(f"synthetic {seed}", image) for seed, image in enumerate(leaves)]
    description = f"{len(items)} {GENERIC[1]} (no photographs with {channels} channels installed)"
    return ImageSet(tuple(items), description)


def digits_set(split: DigitsSplit) -> ImageSet:
    """Return the packaged handwritten digits, ``train`` or ``heldout``."""
    items = tuple(
        ImageItem(f"digit {number}", image, str(label), int(label))
        for number, (image, label) in enumerate(zip(*digits_images(split), strict=True))
    )
    kind = "training" if split == "train" else "held-out"
    return ImageSet(items, f"{len(items)} {kind} images of handwritten digits")


def noise_set(count: int, preprocessing: Preprocessing, seed: int = 0) -> ImageSet:
    """Return seeded normal noise as network input ``(C, H, W)``."""
    shape = (count, preprocessing.channels, *preprocessing.sides)
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    items = tuple(ImageItem(f"noise {number}", each) for number, each in enumerate(values))
    return ImageSet(items, f"{count} samples of NOISE, no images", noise=True)


def dead_leaves_image(seed: int, size: ImageSize, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Return a synthetic image ``(H, W, channels)`` uint8, deterministic for each seed.

    Shaded, overlapping discs with radii of density ``r**-3``: their edges, contrast and power
    spectrum are similar to those of photographs (A. B. Lee, D. Mumford and J. Huang, "Occlusion
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

    The images are spread evenly over their set. If there are fewer than ``count``, random cyclic
    shifts of them are added. The result is deterministic.

    Args:
        model_name: of the network: the samples of ``van_digits`` are its held-out digits.
        preprocessing: of the network.
        count: number of inputs, 1 or more.
        source: the user's folder or ``.npz``; None for samples.

    Raises:
        UsageError: an array has other channels or another size than the network's input.
        ImageError: there are fewer than ``count`` distinct inputs, or no readable image.
    """
    images = sample_set(model_name, preprocessing) if source is None else image_set(source)
    total, rng, errors = len(images), np.random.default_rng(0), list[str]()

    def candidates() -> Iterator[tuple[str, Values]]:
        readable: list[ImageItem] = []
        spread = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
        for index in dict.fromkeys([*spread, *range(total)]):  # the rest replace unreadable images
            item = images.items[index]
            try:
                yield item.name, load_item(item, preprocessing)
                readable.append(item)
            except ImageError as error:
                errors.append(error.message)
        for item in readable * (4 * -(-count // len(readable))) if readable else ():
            values = load_item(item, preprocessing)
            axes = (0, 1) if values.dtype == np.uint8 else (1, 2)
            shifted = np.roll(values, rng.integers(1, preprocessing.sides).tolist(), axes)
            yield f"{SHIFT_PREFIX}{item.name}", shifted

    distinct: dict[bytes, tuple[str, Values]] = {}
    for name, values in candidates():
        distinct.setdefault(values.tobytes(), (name, values))
        if len(distinct) == count:
            break
    unread = f"; {len(errors)} could not be read, the first: {errors[0]}" if errors else ""
    if len(distinct) < count:
        message = f"Only {len(distinct)} of {count} distinct inputs could be made from the "
        message += f"{images.description}{unread or '.'}"
        raise ImageError(message, "Give more readable images.")
    names, inputs = zip(*distinct.values(), strict=True)
    has_shifts = any(name.startswith(SHIFT_PREFIX) for name in names)
    batch = Batch.stack(dict(enumerate(inputs)), preprocessing)
    kind = "images and shifts of" if has_shifts else "of"
    return replace(batch, names=names, description=f"{count} {kind} {images.description}{unread}")
