"""Which images calibrate INT8: a seeded, balanced choice, named by digest.

A calibration set (:mod:`van_deploy.calibration_set`) says which; a folder of
images needs none.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.calibration_set import ImageSelection
from van_deploy.errors import ImageError, UsageError
from van_deploy.files import content_key
from van_deploy.images import file_digest, find_images
from van_deploy.model.embedded import digits_images
from van_deploy.precision.archives import DAMAGE, opened_arrays

__all__ = [
    "NO_IMAGES",
    "ChosenImages",
    "Picture",
    "array_digest",
    "choose_images",
    "refuse_overlap",
]

NO_IMAGES = (
    "INT8 needs images to calibrate on, and none were given.",
    "Pass --images DIR (about 512 training images), or a set with --calibration NAME. "
    "Noise is used only with --calibrate-on-noise, and fits no real picture.",
)


@dataclass(frozen=True)
class Picture:
    """One image, not opened yet.

    Attributes:
        name: what errors call it.
        digest: SHA-256 of its file, or of its values.
        group: the folder it lies in, its class; "" if there is only one.
        source: a file, or the values themselves: ``(H, W)`` or ``(H, W, 3)`` uint8, or
            normalised network input ``(C, S, S)`` float32.
    """

    name: str
    digest: str
    group: str
    source: Path | npt.NDArray[Any]


@dataclass(frozen=True)
class ChosenImages:
    """The images of a calibration or an evaluation.

    Attributes:
        pictures: in the order they are used.
        description: what they are, one phrase for reports and manifests.
        noise: whether they are no pictures at all.
    """

    pictures: tuple[Picture, ...]
    description: str
    noise: bool = False

    @property
    def digest(self) -> str:
        """SHA-256 over all their digests, in their order."""
        return content_key({"images": [picture.digest for picture in self.pictures]})

    def split(self, held_out: float, seed: int) -> tuple[ChosenImages, ChosenImages]:
        """Return the images to calibrate on, and the share ``held_out`` of them kept aside.

        The split is by class, and at least one image goes to each side.
        """
        aside = max(1, round(held_out * len(self.pictures)))
        chosen = _balanced(self.pictures, aside, seed + 1)
        names = {id(picture) for picture in chosen}
        kept = tuple(picture for picture in self.pictures if id(picture) not in names)
        if not kept:
            raise ImageError(
                f"{len(self.pictures)} image(s) cannot be split into two parts.",
                "Give at least 2 images; about 512 are usual.",
            )
        return (
            replace(self, pictures=kept),
            ChosenImages(tuple(chosen), f"{aside} held-out images of {self.description}"),
        )

    def labels(self, class_names: Sequence[str] | None, classes: int) -> npt.NDArray[Any] | None:
        """Return each image's class ``(N,)``, or None if the folders do not say.

        A folder's name is a class name, or a class number; or there are as many
        folders as classes and they are in the alphabetical order of ImageFolder.
        """
        groups = sorted({picture.group for picture in self.pictures})
        names = {name: index for index, name in enumerate(class_names or ())}
        if set(groups) <= set(names):
            table = names
        elif len(groups) == classes:
            table = {group: index for index, group in enumerate(groups)}
        elif all(group.isdigit() and int(group) < classes for group in groups):
            table = {group: int(group) for group in groups}
        else:
            return None
        return np.array([table[picture.group] for picture in self.pictures])


def choose_images(selection: ImageSelection, images: Path | None = None) -> ChosenImages:
    """Return the images a selection means.

    Args:
        selection: which, and how many.
        images: the user's folder or ``.npz``, instead of the selection's own path.

    Raises:
        ImageError: there are none, or they are not the ones the manifest names.
    """
    if selection.source == "noise":
        raise UsageError(*NO_IMAGES)
    if selection.source == "digits" and images is None:
        chosen = _digits(selection)
    else:
        path = images or (Path(selection.path) if selection.path else None)
        if path is None:
            raise ImageError(*NO_IMAGES)
        chosen = _of_path(path, selection)
    if selection.digest and images is None and chosen.digest != selection.digest:
        raise ImageError(
            f"The images are not the ones the calibration set names: their digest is "
            f"{chosen.digest[:16]}…, the set's {selection.digest[:16]}….",
            "Restore the images, or correct the digest in the set.",
        )
    return chosen


def _digits(selection: ImageSelection) -> ChosenImages:
    values, labels = digits_images("train")
    pictures = [
        Picture(f"digit {number}", array_digest(image), str(label), image)
        for number, (image, label) in enumerate(zip(values, labels, strict=True))
    ]
    chosen = _pick(pictures, selection)
    return ChosenImages(chosen, f"{len(chosen)} handwritten digits of the training part")


def _of_path(path: Path, selection: ImageSelection) -> ChosenImages:
    if path.suffix == ".npz":
        chosen = _pick(_pictures_of_npz(path), selection)
        return ChosenImages(chosen, f"{len(chosen)} images of '{path}'")
    files = find_images(path)
    groups = [_group(file, path) for file in files]
    blank = [Picture(str(f), "", g, f) for f, g in zip(files, groups, strict=True)]
    picked = _pick(blank, selection)
    chosen = tuple(replace(p, digest=file_digest(p.name)) for p in picked)
    return ChosenImages(chosen, f"{len(chosen)} of {len(files)} images of '{path}'")


def _group(file: Path, folder: Path) -> str:
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 else ""


def _pictures_of_npz(path: Path) -> list[Picture]:
    """Return the pictures of an ``.npz``: its array ``images``, or its only one."""
    try:
        with opened_arrays(path) as stored:
            names = list(stored)
            key = "images" if "images" in names else names[0] if len(names) == 1 else None
            if key is None:
                raise ImageError(
                    f"'{path}' has no array called 'images' (it has: {', '.join(names)}).",
                    "Save it with np.savez(path, images=array).",
                )
            values = stored[key]
            labels = stored["labels"] if "labels" in names else None
    except (*DAMAGE, OSError) as error:
        raise ImageError(
            f"'{path}' cannot be read as an .npz of images: {error}.",
            "Save it with np.savez(path, images=array).",
        ) from error
    bytes_of_pictures = values.dtype == np.uint8 and values.ndim in {3, 4}
    if not bytes_of_pictures and not (values.dtype == np.float32 and values.ndim == 4):
        raise ImageError(
            f"The images in '{path}' are {values.dtype} of shape {values.shape}.",
            "Give uint8 pictures (N, H, W) or (N, H, W, 3), or normalised float32 (N, C, S, S).",
        )
    if labels is not None and labels.shape != (len(values),):
        raise ImageError(
            f"'{path}' has {len(values)} images and labels of shape {labels.shape}.",
            "Give one label an image, or none at all.",
        )
    groups = [""] * len(values) if labels is None else [str(label) for label in labels]
    return [
        Picture(f"image {number} of '{path}'", array_digest(value), group, value)
        for number, (value, group) in enumerate(zip(values, groups, strict=True))
    ]


def array_digest(values: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _pick(pictures: Sequence[Picture], selection: ImageSelection) -> tuple[Picture, ...]:
    """Return at most ``count`` pictures, chosen by the seed, in their first order."""
    if len(pictures) < 2:
        raise ImageError(
            f"{len(pictures)} image(s) are too few to calibrate on.",
            "Give at least 2; about 512 are usual.",
        )
    if selection.balanced:
        return tuple(_balanced(pictures, selection.count, selection.seed))
    order = np.random.default_rng(selection.seed).permutation(len(pictures))
    return tuple(pictures[int(index)] for index in sorted(order[: selection.count]))


def _balanced(pictures: Sequence[Picture], count: int, seed: int) -> list[Picture]:
    """Return ``count`` pictures: one of every class, then another of every class, ..."""
    classes: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        classes[picture.group].append(index)
    rng = np.random.default_rng(seed)
    groups = [sorted(classes)[int(index)] for index in rng.permutation(len(classes))]
    shuffled = [rng.permutation(classes[group]) for group in groups]
    rounds = max(len(members) for members in shuffled)
    order = [int(m[turn]) for turn in range(rounds) for m in shuffled if turn < len(m)]
    return [pictures[index] for index in sorted(order[:count])]


def refuse_overlap(calibration: ChosenImages, evaluation: ChosenImages) -> None:
    """Do nothing if no image is in both sets.

    Raises:
        ImageError: some are, by digest.
    """
    known = {picture.digest: picture.name for picture in calibration.pictures}
    both = [(known[p.digest], p.name) for p in evaluation.pictures if p.digest in known]
    if both:
        first = "; ".join(f"{a} and {b}" for a, b in both[:3])
        raise ImageError(
            f"{len(both)} calibration image(s) are also evaluation images, byte for byte: {first}.",
            "Accuracy measured on calibration images says nothing: take them out of one folder.",
        )
