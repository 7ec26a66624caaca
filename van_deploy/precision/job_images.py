"""The images of one quantisation: calibrated on, held out of that, and judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.calibration_set import ImageSelection, calibration_set_named
from van_deploy.config import QuantizeSettings
from van_deploy.data import ImageSet, decoded_batches, image_set, labelled_images, sample_set
from van_deploy.data.calibration import choose, digits_set, noise_set, refuse_overlap, split
from van_deploy.errors import ImageError, InputError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.stopwatch import Stopwatch

MOST_UNREADABLE = 0.01
"""Largest share of the images that may be unreadable."""

NOISE_IMAGES = 64

Images = npt.NDArray[np.float32]


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
        """Yield network input ``(n, C, S, S)`` float32 with the numbers of its images."""
        for part in decoded_batches(
            chosen.items, self.preprocessing, batch, most_unreadable=MOST_UNREADABLE
        ):
            self.unreadable.update((reason, None) for _, reason in part.unreadable)
            if part.indices:
                yield part.inputs, list(part.indices)
                self.watch.reached(part.indices[-1] + 1, len(chosen))

    def few(self, chosen: ImageSet, count: int) -> Images:
        """Return network input of at most ``count`` images, spread evenly over ``chosen``."""
        return np.concatenate([part for part, _ in self.read(spread_over(chosen, count), 16)])


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
    selection = calibration_set_named(name).images if name else ImageSelection()
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
        refuse_overlap(chosen, judges)
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
        return labelled_images(images, classes, manifest.class_names, class_order=order)
    except InputError as error:
        if not any(item.group for item in images.items):
            return images
        why = error.message.splitlines()[0].rstrip(".:")
        return replace(images, description=f"{images.description}, without labels: {why}")


def choose_images(selection: ImageSelection, images: Path | None = None) -> ImageSet:
    """Return the images a selection means.

    Args:
        selection: which, and how many.
        images: the user's folder or ``.npz``, instead of the selection's own path.

    Raises:
        ImageError: there are none, or they are not the ones the set names.
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
    chosen = choose(found, selection.count, seed=selection.seed, balanced=selection.balanced)
    if selection.digest and images is None and chosen.digest != selection.digest:
        raise ImageError(
            f"The images are not the ones the calibration set names: their digest is "
            f"{chosen.digest[:16]}…, the set's {selection.digest[:16]}….",
            "Restore the images, or correct the digest in the set.",
        )
    return chosen


def spread_over(chosen: ImageSet, count: int) -> ImageSet:
    """Return at most ``count`` images, spread evenly over ``chosen``."""
    step = max(1, len(chosen) // count)
    return chosen.take(range(len(chosen))[::step][:count])
