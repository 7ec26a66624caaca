"""The images of one quantisation: calibrated on, held out of that, and judged on.

Which images calibrate is chosen by a seed, balanced over the class folders; what is held out of
them, and what judges, shares no image with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import QuantizeSettings
from van_deploy.data.images import ImageSet, decoded_batches, image_set
from van_deploy.data.labels import label_images
from van_deploy.data.samples import digits_set, noise_set, sample_set
from van_deploy.errors import ImageError, InputError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.scales import Images
from van_deploy.recipe import ImageSelection, load_calibration_set
from van_deploy.stopwatch import Stopwatch

MOST_UNREADABLE = 0.01  # largest share of the images
NOISE_IMAGES = 64
_FEW = "Give at least 2 different images; about 512 are usual."


@dataclass
class JobImages:
    """What a quantisation looks at.

    Attributes:
        calibration: the ranges and everything learnt come from these.
        held_out: of the calibration images: they judge methods.
        judges: they judge the result.
        named: whether the user named them; else they are the held-out ones.
        preprocessing: of the network.
        watch: told how far the reading is.
        unreadable: the reasons why images could not be read.
    """

    calibration: ImageSet
    held_out: ImageSet
    judges: ImageSet
    named: bool
    preprocessing: Preprocessing
    watch: Stopwatch
    unreadable: dict[str, None] = field(default_factory=dict)

    @property
    def others(self) -> ImageSet:
        """All images that do not judge the result."""
        if not self.named:
            return self.calibration
        return replace(self.calibration, items=(*self.calibration.items, *self.held_out.items))

    def read(self, chosen: ImageSet, batch: int) -> Iterator[tuple[Images, list[int]]]:
        """Yield network input ``(n, C, S, S)`` float32 with the numbers of its images.

        Raises:
            ImageError: more than :data:`MOST_UNREADABLE` of them cannot be read.
        """
        bad: list[str] = []
        for part in decoded_batches(chosen.items, self.preprocessing, batch):
            bad += [reason for _, reason in part.unreadable]
            self.unreadable.update(dict.fromkeys(bad))
            if len(bad) > MOST_UNREADABLE * len(chosen):
                raise ImageError(
                    f"{len(bad)} of {len(chosen)} images could not be read, more than "
                    f"{100 * MOST_UNREADABLE:g} %; the first: {bad[0]}",
                    "Replace or remove these files.",
                )
            if part.indices:
                yield part.inputs, list(part.indices)
                self.watch.update(part.indices[-1] + 1, len(chosen))

    def few(self, chosen: ImageSet, count: int) -> Images:
        """Return network input of at most ``count`` images, spread evenly over ``chosen``."""
        return np.concatenate([part for part, _ in self.read(subsample(chosen, count), 16)])


def images_for(bundle: Bundle, settings: QuantizeSettings, watch: Stopwatch) -> JobImages:
    """Return the images of a quantisation.

    Args:
        bundle: whose network is quantised.
        settings: what is made, and from which images.
        watch: told how far the reading is.

    Raises:
        ImageError: there are none, or one is on both sides.
        RecipeError: there is no such calibration set, or it is wrong.
    """
    images, name = settings.sources
    if images is None and name is None and bundle.name == EMBEDDED_NAME:
        name = "digits"
    selection = load_calibration_set(name).images if name else ImageSelection()
    preprocessing = bundle.manifest.preprocessing
    if settings.noise:
        chosen = noise_set(NOISE_IMAGES, preprocessing, selection.seed)
    elif images is None and name is None and settings.precision != "int8":
        chosen = sample_set("", preprocessing)
    else:
        chosen = choose_images(selection, images)
    chosen, judges = _labelled(bundle, chosen, settings), None
    if settings.evaluate is not None:
        judges = _labelled(bundle, image_set(settings.evaluate), settings)
        known = {item.digest: item.name for item in chosen.items}
        both = [(known[i.digest], i.name) for i in judges.items if i.digest in known]
        if both:
            raise ImageError(
                f"{len(both)} calibration image(s) are, byte for byte, evaluation images in "
                f"'{settings.evaluate}', too: {'; '.join(f'{a} as {b}' for a, b in both[:3])}.",
                "Accuracy measured on calibration images says nothing: take them out of one "
                "folder.",
            )
    calibrated, held_out = split(chosen, selection.held_out, selection.seed)
    named = judges is not None
    return JobImages(calibrated, held_out, judges or held_out, named, preprocessing, watch)


def _labelled(bundle: Bundle, images: ImageSet, settings: QuantizeSettings) -> ImageSet:
    """Return the images with labels, if their folders say them without doubt."""
    manifest = bundle.manifest
    if manifest.architecture.out_indices:  # feature maps are of no class
        return images
    classes, order = manifest.architecture.num_classes, settings.class_order
    try:
        return label_images(images, classes, manifest.class_names, class_order=order)
    except InputError as error:
        if not any(item.group for item in images.items):
            return images
        why = error.message.splitlines()[0].rstrip(".:")
        return replace(images, description=f"{images.description}, without labels: {why}")


def choose_images(selection: ImageSelection, images: Path | None = None) -> ImageSet:
    """Return the images a selection means, in their first order.

    Args:
        selection: which, and how many; with ``balanced``, the same number from every class
            folder, as far as there are that many.
        images: the user's folder or ``.npz``, instead of the selection's own path.

    Raises:
        ImageError: there are fewer than 2, or they are not the ones the set names.
    """
    if selection.source == "digits" and images is None:
        found = digits_set("train")
    elif images or selection.path:
        found = image_set(images or selection.path)
    else:
        raise ImageError(
            "INT8 needs images to calibrate on, and none were given.",
            "Pass --images DIR (about 512 training images), or a set with --calibration NAME. "
            "Noise is used only with --calibrate-on-noise, and fits no real image.",
        )
    if len(found) < 2:
        raise ImageError(f"{len(found)} image(s) are too few to calibrate on.", _FEW)
    indices = _chosen(found, selection.count, selection.seed, selection.balanced)
    chosen = found.take(indices, f"{len(indices)} of {found.description}")
    if selection.digest and images is None and chosen.digest != selection.digest:
        raise ImageError(
            f"The images are not the ones the calibration set names: their digest is "
            f"{chosen.digest[:16]}…, the set's {selection.digest[:16]}….",
            "Restore the images, or correct the digest in the set.",
        )
    return chosen


def split(images: ImageSet, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Return the images to calibrate on, and the share ``held_out`` (0..1) of them kept aside.

    The split is by class folder and at least one image is on each side. No image is on both:
    a copy of a held-out image, byte for byte, is not calibrated on.

    Raises:
        ImageError: there are fewer than 2 different ones.
    """
    aside = _chosen(images, max(1, round(held_out * len(images))), seed + 1)
    held = images.take(aside, f"{len(aside)} held-out images of {images.description}")
    known = {item.digest for item in held.items}
    kept = [index for index, item in enumerate(images.items) if item.digest not in known]
    if not kept:
        raise ImageError(f"{len(images)} image(s) cannot be split into two parts.", _FEW)
    return images.take(kept), held


def _chosen(images: ImageSet, count: int, seed: int, balanced: bool = True) -> list[int]:
    """Return ``count`` indices; balanced: one of every class folder, then another of each, ..."""
    rng = np.random.default_rng(seed)
    if not balanced:
        return sorted(rng.permutation(len(images))[:count].tolist())
    classes: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(images.items):
        classes[item.group].append(index)
    groups = [sorted(classes)[int(index)] for index in rng.permutation(len(classes))]
    shuffled = [rng.permutation(classes[group]) for group in groups]
    rounds = max(len(members) for members in shuffled)
    order = [int(m[turn]) for turn in range(rounds) for m in shuffled if turn < len(m)]
    return sorted(order[:count])


def subsample(chosen: ImageSet, count: int) -> ImageSet:
    """Return at most ``count`` images, spread evenly over ``chosen``."""
    step = max(1, len(chosen) // count)
    return chosen.take(range(len(chosen))[::step][:count])
