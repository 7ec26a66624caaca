"""Select the images of a quantisation: calibration, held-out and evaluation images.

Calibration images are drawn with a seed and balanced over the class folders. Held-out and
evaluation images share no image with them.
"""

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
from van_deploy.metrics import Task
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.scales import Images
from van_deploy.recipe import ImageSelection, load_calibration_set
from van_deploy.runners.network import task_of
from van_deploy.stopwatch import Stopwatch

UNREADABLE_LIMIT = 0.01  # largest accepted share of unreadable images; one is always accepted
NOISE_IMAGES = 64


@dataclass
class ImageSets:
    """The image sets of a quantisation.

    Attributes:
        calibration: used to record ranges and to correct biases.
        held_out: split off the calibration images; used to compare techniques.
        evaluation: used to check the result.
        has_evaluation_set: whether the user gave the evaluation images; otherwise they are the
            held-out ones.
        preprocessing: of the network.
        watch: receives the progress of reading.
        unreadable: the reasons why images could not be read.
    """

    calibration: ImageSet
    held_out: ImageSet
    evaluation: ImageSet
    has_evaluation_set: bool
    preprocessing: Preprocessing
    watch: Stopwatch
    unreadable: dict[str, None] = field(default_factory=dict)

    @property
    def search(self) -> ImageSet:
        """Images to search layers for an accuracy budget on: all except the evaluation images."""
        if not self.has_evaluation_set:
            return self.calibration
        return replace(self.calibration, items=(*self.calibration.items, *self.held_out.items))

    def read(self, images: ImageSet, batch: int) -> Iterator[tuple[Images, list[int]]]:
        """Yield network inputs ``(n, C, S, S)`` float32 with the indices of their images.

        Raises:
            ImageError: more than :data:`UNREADABLE_LIMIT` of the images cannot be read.
        """
        errors: list[str] = []
        accepted = max(UNREADABLE_LIMIT * len(images), min(1, len(images) - 1))
        for decoded in decoded_batches(images.items, self.preprocessing, batch):
            errors += [reason for _, reason in decoded.unreadable]
            self.unreadable.update(dict.fromkeys(errors))
            if len(errors) > accepted:
                raise ImageError(
                    f"{len(errors)} of {len(images)} images could not be read, more than "
                    f"{100 * UNREADABLE_LIMIT:g} %; the first: {errors[0]}",
                    "Replace or remove these files.",
                )
            if decoded.indices:
                yield decoded.inputs, list(decoded.indices)
                self.watch.update(decoded.indices[-1] + 1, len(images))

    def sample(self, images: ImageSet, count: int) -> Images:
        """Return network inputs of at most ``count`` images, evenly spaced in ``images``."""
        return np.concatenate([inputs for inputs, _ in self.read(images.subsample(count), 16)])


def select_images(bundle: Bundle, settings: QuantizeSettings, watch: Stopwatch) -> ImageSets:
    """Return the image sets of a quantisation.

    Args:
        bundle: contains the network to quantise.
        settings: select the images.
        watch: receives the progress of reading.

    Raises:
        ImageError: there are no images, or an image is in both the calibration and the
            evaluation set.
        RecipeError: the calibration set does not exist or is invalid.
    """
    images, name = settings.sources
    if images is None and name is None and bundle.name == EMBEDDED_NAME:
        name = "digits"
    selection = load_calibration_set(name).images if name else ImageSelection()
    preprocessing = bundle.manifest.preprocessing
    if settings.noise or (selection.source == "noise" and images is None):
        chosen = noise_set(min(NOISE_IMAGES, selection.count), preprocessing, selection.seed)
    elif images is None and name is None and settings.precision != "int8":
        chosen = sample_set("", preprocessing)
    else:
        chosen = choose_images(selection, images)
    chosen, evaluation = _with_labels(bundle, chosen, settings), None
    if settings.evaluate is not None:
        evaluation = _with_labels(bundle, image_set(settings.evaluate), settings)
        names = {item.digest: item.name for item in chosen.items}
        both = [(names[i.digest], i.name) for i in evaluation.items if i.digest in names]
        if both:
            raise ImageError(
                f"{len(both)} calibration image(s) are identical to evaluation images in "
                f"'{settings.evaluate}': {'; '.join(f'{a} and {b}' for a, b in both[:3])}.",
                "Remove them from one of the folders: accuracy on calibration images is biased.",
            )
    calibration, held_out = split(chosen, selection.held_out, selection.seed)
    has_set, evaluation = evaluation is not None, evaluation or held_out
    return ImageSets(calibration, held_out, evaluation, has_set, preprocessing, watch)


def _with_labels(bundle: Bundle, images: ImageSet, settings: QuantizeSettings) -> ImageSet:
    """Return the images with labels, if their folder names are unambiguous."""
    manifest, known = bundle.manifest, images.labels
    classes, order = manifest.architecture.num_classes, settings.class_order
    has_classes = task_of(bundle) in {Task.SINGLE_LABEL, Task.BINARY}  # a folder names one class
    if known is not None:  # of the packaged digits
        has_classes &= bool(known.max() < max(classes, 2))
    if manifest.architecture.out_indices or not has_classes:
        return replace(images, items=tuple(replace(item, label=None) for item in images.items))
    try:
        return label_images(images, classes, manifest.class_names, class_order=order)
    except InputError as error:
        if not any(item.group for item in images.items):
            return images
        reason = error.message.splitlines()[0].rstrip(".:")
        return replace(images, description=f"{images.description}, without labels: {reason}")


def choose_images(selection: ImageSelection, images: Path | None = None) -> ImageSet:
    """Return the images of a selection, in their original order.

    Args:
        selection: the source and the number of images; with ``balanced``, the same number from
            every class folder, as far as it has that many.
        images: the user's folder or ``.npz``, which replaces the selection's path.

    Raises:
        ImageError: no images are given, or their digest is not the selection's.
    """
    if selection.source == "digits" and images is None:
        source = digits_set("train")
    elif images or selection.path:
        source = image_set(images or selection.path)
    else:
        raise ImageError(
            "INT8 needs calibration images, and none were given.",
            "Pass --images DIR (about 512 training images), or a set with --calibration NAME. "
            "--calibrate-on-noise is for tests: noise does not represent real images.",
        )
    indices = _select(source, selection.count, selection.seed, selection.balanced)
    chosen = source.take(indices, f"{len(indices)} of {source.description}")
    if selection.digest and chosen.digest != selection.digest:
        raise ImageError(
            f"The images do not match the calibration set: their digest is "
            f"{chosen.digest[:16]}…, the set expects {selection.digest[:16]}….",
            "Restore the images, or correct the digest in the calibration set.",
        )
    return chosen


def split(images: ImageSet, held_out: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split images into calibration images and the share ``held_out`` (0..1) of held-out ones.

    The split is balanced over the class folders, and each part has at least one image. Exact
    copies of a held-out image are removed from the calibration images.

    Raises:
        ImageError: there are fewer than 2 different images.
    """
    indices = _select(images, max(1, round(held_out * len(images))), seed + 1)
    held = images.take(indices, f"{len(indices)} held-out images of {images.description}")
    digests = {item.digest for item in held.items}
    calibration = [i for i, item in enumerate(images.items) if item.digest not in digests]
    if not calibration:
        raise ImageError(
            f"{len(images)} image(s) cannot be split into calibration and held-out images.",
            "Give at least 2 different images; about 512 are usual.",
        )
    description = f"{len(calibration)} calibration images of {images.description}"
    return images.take(calibration, description), held


def _select(images: ImageSet, count: int, seed: int, balanced: bool = True) -> list[int]:
    """Return ``count`` random indices; balanced ones take a class folder's images in turn."""
    rng = np.random.default_rng(seed)
    if not balanced:
        return sorted(rng.permutation(len(images))[:count].tolist())
    classes: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(images.items):
        classes[item.group].append(index)
    groups = [sorted(classes)[int(index)] for index in rng.permutation(len(classes))]
    shuffled = [rng.permutation(classes[group]) for group in groups]
    rounds = max(len(members) for members in shuffled)
    order = [int(m[i]) for i in range(rounds) for m in shuffled if i < len(m)]
    return sorted(order[:count])
