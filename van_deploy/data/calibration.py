"""Which images calibrate INT8, and which are held out: seeded, balanced and disjoint."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from van_deploy.data.items import ImageItem, ImageSet
from van_deploy.errors import ImageError
from van_deploy.model.embedded import DigitsSplit, digits_images
from van_deploy.model.preprocess import Preprocessing


def choose(images: ImageSet, count: int, *, seed: int = 0, balanced: bool = True) -> ImageSet:
    """Return at most ``count`` images, chosen by the seed, in their first order.

    Args:
        images: to choose from.
        count: how many at most.
        seed: of the choice.
        balanced: the same number from every class folder, as far as there are that many.

    Raises:
        ImageError: there are fewer than 2.
    """
    if len(images) < 2:
        raise ImageError(
            f"{len(images)} image(s) are too few to calibrate on.",
            "Give at least 2; about 512 are usual.",
        )
    if balanced:
        chosen = _balanced(images, count, seed)
    else:
        order = np.random.default_rng(seed).permutation(len(images))
        chosen = sorted(order[:count].tolist())
    return images.take(chosen, f"{len(chosen)} of {images.description}")


def split(images: ImageSet, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Return the images to calibrate on, and the share ``held_out`` (0..1) of them kept aside.

    The split is by class folder and at least one image is on each side. No image is on both:
    a copy of a held-out image, byte for byte, is not calibrated on.

    Raises:
        ImageError: there are fewer than 2 different ones.
    """
    aside = max(1, round(held_out * len(images)))
    chosen = _balanced(images, aside, seed + 1)
    held = {images.items[index].digest for index in chosen}
    kept = [index for index, item in enumerate(images.items) if item.digest not in held]
    if not kept:
        raise ImageError(
            f"{len(images)} image(s) cannot be split into two parts: "
            "too few of them are different.",
            "Give at least 2 images; about 512 are usual.",
        )
    described = f"{aside} held-out images of {images.description}"
    return images.take(kept), images.take(chosen, described)


def _balanced(images: ImageSet, count: int, seed: int) -> list[int]:
    """Return ``count`` indices: one of every class folder, then another of every one, ..."""
    classes: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(images.items):
        classes[item.group].append(index)
    rng = np.random.default_rng(seed)
    groups = [sorted(classes)[int(index)] for index in rng.permutation(len(classes))]
    shuffled = [rng.permutation(classes[group]) for group in groups]
    rounds = max(len(members) for members in shuffled)
    order = [int(m[turn]) for turn in range(rounds) for m in shuffled if turn < len(m)]
    return sorted(order[:count])


def refuse_overlap(calibration: ImageSet, evaluation: ImageSet) -> None:
    """Do nothing if no image is in both sets.

    Raises:
        ImageError: some are, by digest.
    """
    known = {item.digest: item.name for item in calibration.items}
    both = [(known[i.digest], i.name) for i in evaluation.items if i.digest in known]
    if both:
        first = "; ".join(f"{a} and {b}" for a, b in both[:3])
        raise ImageError(
            f"{len(both)} calibration image(s) are also evaluation images, byte for byte: {first}.",
            "Accuracy measured on calibration images says nothing: take them out of one folder.",
        )


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
