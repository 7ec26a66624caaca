"""The images of one quantisation: calibrated on, held out of that, and judged on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.calibration_set import CalibrationSet, ImageSelection, calibration_set_named
from van_deploy.config import QuantizeSettings
from van_deploy.data import (
    ImageSet,
    decoded_batches,
    image_set,
    sample_set,
    with_labels_if_known,
)
from van_deploy.data.calibration import choose, digits_set, noise_set, refuse_overlap, split
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.stopwatch import Stopwatch

__all__ = ["MOST_UNREADABLE", "JobImages", "choose_images", "images_for", "spread_over"]

NO_IMAGES = (
    "INT8 needs images to calibrate on, and none were given.",
    "Pass --images DIR (about 512 training images), or a set with --calibration NAME. "
    "Noise is used only with --calibrate-on-noise, and fits no real picture.",
)
MOST_UNREADABLE = 0.01
"""Largest share of the images that may be unreadable."""

NOISE_IMAGES = 64

Images = npt.NDArray[np.float32]
Batch = tuple[Images, list[int]]


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

    def read(self, chosen: ImageSet, batch: int) -> Iterator[Batch]:
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


def images_for(
    bundle: Bundle,
    settings: QuantizeSettings,
    watch: Stopwatch,
    *,
    images: Path | None,
    calibration: CalibrationSet | str | None,
    evaluate: Path | None,
) -> JobImages:
    """Return the images of a quantisation.

    Args:
        bundle: whose network is quantised.
        settings: what is made.
        watch: told how far the reading is.
        images: folder or ``.npz`` to calibrate on.
        calibration: a set, or the name or path of one.
        evaluate: folder to judge on; by default a part of the calibration images.

    Raises:
        UsageError: noise and images were both asked for.
        ImageError: there are none, or one is on both sides.
    """
    found = calibration_set_named(calibration) if isinstance(calibration, str) else calibration
    selection = found.images if found else ImageSelection()
    preprocessing = bundle.manifest.preprocessing
    if settings.noise:
        if images is not None or found is not None:
            raise UsageError(
                "--calibrate-on-noise and images to calibrate on were both given.",
                "Leave one of them out; images are always better.",
            )
        chosen = noise_set(NOISE_IMAGES, preprocessing, selection.seed)
    elif images is not None or found is not None:
        chosen = choose_images(selection, images)
    elif bundle.name == EMBEDDED_NAME:
        chosen = choose_images(calibration_set_named("digits").images)
    elif settings.precision != "int8":
        chosen = sample_set("", preprocessing)
    else:
        raise ImageError(*NO_IMAGES)
    judges = None
    if evaluate is not None:
        judges = _labelled(bundle, image_set(evaluate), settings)
        refuse_overlap(chosen, judges)
    calibrated, held_out = split(
        _labelled(bundle, chosen, settings), selection.held_out, selection.seed
    )
    named = judges is not None
    return JobImages(calibrated, held_out, judges or held_out, named, preprocessing, watch)


def _labelled(bundle: Bundle, images: ImageSet, settings: QuantizeSettings) -> ImageSet:
    """Return the images with labels, if their folders say them without doubt."""
    manifest = bundle.manifest
    if manifest.architecture.out_indices:  # feature maps are of no class
        return images
    classes = manifest.architecture.num_classes
    order = settings.class_order
    labelled, why = with_labels_if_known(images, classes, manifest.class_names, order)
    if why and any(item.group for item in images.items):
        described = f"{images.description}, without labels: {why.splitlines()[0].rstrip('.:')}"
        return replace(images, description=described)
    return labelled


def choose_images(selection: ImageSelection, images: Path | None = None) -> ImageSet:
    """Return the images a selection means.

    Args:
        selection: which, and how many.
        images: the user's folder or ``.npz``, instead of the selection's own path.

    Raises:
        ImageError: there are none, or they are not the ones the set names.
    """
    if selection.source == "noise":
        raise UsageError(*NO_IMAGES)
    if selection.source == "digits" and images is None:
        found = digits_set("train")
    else:
        path = images or (Path(selection.path) if selection.path else None)
        if path is None:
            raise ImageError(*NO_IMAGES)
        found = image_set(path)
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
