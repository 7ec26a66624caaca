"""The images of one quantisation: calibrated on, held out of that, and judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle
from van_deploy.config import QuantizeSettings
from van_deploy.errors import ImageError, UsageError
from van_deploy.images import UnreadableImages, sample_pictures
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.calibration import (
    NO_IMAGES,
    ChosenImages,
    Picture,
    choose_images,
    refuse_overlap,
)
from van_deploy.precision.inputs import input_batches, noise_images
from van_deploy.precision.manifests import CalibrationSet, ImageSelection, calibration_set_named
from van_deploy.precision.stopwatch import Stopwatch

__all__ = ["JobImages", "images_for", "spread_over"]

NOISE_IMAGES = 64
REMEMBERED_BYTES = 256 << 20
"""Network input of the images that judge is kept in memory up to this: a search reads it often."""

Images = npt.NDArray[np.float32]
Batch = tuple[Images, list[int]]


@dataclass
class JobImages:
    """What a quantisation looks at.

    Attributes:
        calibration: the ranges and everything learnt come from these.
        held_out: of the calibration images: they judge methods.
        judges: they judge the result.
        preprocessing: of the network.
        watch: told how far the reading is.
        unreadable: what could not be read.
    """

    calibration: ChosenImages
    held_out: ChosenImages
    judges: ChosenImages
    preprocessing: Preprocessing
    watch: Stopwatch
    unreadable: UnreadableImages = field(default_factory=UnreadableImages)
    _judged: list[Batch] = field(default_factory=list)

    def batches(self, chosen: ChosenImages, batch: int) -> Iterator[Images]:
        """Yield network input ``(n, C, S, S)`` float32, and say how far it is."""
        done, total = 0, len(chosen.pictures)
        for inputs, _ in input_batches(chosen, self.preprocessing, batch, self.unreadable):
            yield inputs
            done += len(inputs)
            self.watch.reached(done, total)

    def judged(self, batch: int = 32) -> Iterator[Batch]:
        """Yield the network input of the judges with the numbers of their pictures."""
        if self._judged:
            yield from self._judged
            return
        side = self.preprocessing.image_size
        whole = 4 * self.preprocessing.channels * side * side * len(self.judges.pictures)
        found: list[Batch] = []
        for part in input_batches(self.judges, self.preprocessing, batch, self.unreadable):
            yield part
            if whole <= REMEMBERED_BYTES:
                found.append(part)
        self._judged = found


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
        chosen = noise_images(NOISE_IMAGES, preprocessing, selection.seed)
    elif images is not None or found is not None:
        chosen = choose_images(selection, images)
    elif bundle.name == EMBEDDED_NAME:
        chosen = choose_images(calibration_set_named("digits").images)
    elif settings.precision == "fp16":
        chosen = _sample_images()
    else:
        raise ImageError(*NO_IMAGES)
    judges = None
    if evaluate is not None:
        judges = choose_images(ImageSelection(count=1 << 31, held_out=0.0), evaluate)
        refuse_overlap(chosen, judges)
    calibrated, held_out = chosen.split(selection.held_out, selection.seed)
    return JobImages(calibrated, held_out, judges or held_out, preprocessing, watch)


def spread_over(chosen: ChosenImages, count: int) -> ChosenImages:
    """Return at most ``count`` images, spread evenly over ``chosen``."""
    step = max(1, len(chosen.pictures) // count)
    return replace(chosen, pictures=chosen.pictures[::step][:count])


def _sample_images() -> ChosenImages:
    """Return photographs found in installed packages, for an audit without the user's images."""
    samples = sample_pictures()
    pictures = tuple(
        Picture(
            f"sample {number}", hashlib.sha256(image.tobytes()).hexdigest(), "", np.asarray(image)
        )
        for number, image in enumerate(samples.images)
    )
    return ChosenImages(pictures, samples.description)
