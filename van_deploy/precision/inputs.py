"""Pictures turned into batches of network input; noise, where it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.errors import ImageError, UsageError
from van_deploy.images import UnreadableImages, open_image
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.precision.calibration import ChosenImages, Picture, array_digest

if TYPE_CHECKING:
    from van_deploy.model.preprocess import Preprocessing

__all__ = ["UNREADABLE_LIMIT", "input_batches", "noise_images"]

UNREADABLE_LIMIT = 0.01
"""Largest share of the images that may be unreadable."""


def input_batches(
    chosen: ChosenImages,
    preprocessing: Preprocessing,
    batch: int,
    unreadable: UnreadableImages,
) -> Iterator[tuple[npt.NDArray[np.float32], list[int]]]:
    """Yield network inputs ``(n, C, S, S)`` float32 with the numbers of their pictures.

    Pictures that cannot be read are passed over and remembered in ``unreadable``.

    Raises:
        ImageError: more than :data:`UNREADABLE_LIMIT` of them cannot be read.
    """
    inputs: list[npt.NDArray[np.float32]] = []
    numbers: list[int] = []
    for number, picture in enumerate(chosen.pictures):
        try:
            inputs.append(_input(picture, preprocessing))
        except ImageError as error:
            unreadable(Path(picture.name), error)
            unreadable.refuse_above(UNREADABLE_LIMIT, len(chosen.pictures))
            continue
        numbers.append(number)
        if len(inputs) == batch:
            yield np.stack(inputs), numbers
            inputs, numbers = [], []
    if inputs:
        yield np.stack(inputs), numbers


def _input(picture: Picture, preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    from PIL import Image

    if isinstance(picture.source, Path):
        opened = open_image(picture.source)
    elif picture.source.dtype == np.float32:
        return _given_input(picture.source, picture.name, preprocessing)
    else:
        opened = Image.fromarray(np.ascontiguousarray(picture.source)).convert("RGB")
    return normalised(pixels_from_image(opened, preprocessing)[None], preprocessing)[0]


def _given_input(
    values: npt.NDArray[Any], name: str, preprocessing: Preprocessing
) -> npt.NDArray[np.float32]:
    wanted = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    if values.shape != wanted:
        raise UsageError(
            f"The {name} is network input of shape {values.shape}; the network takes {wanted}.",
            "Save it in the network's size, or give uint8 pictures of any size.",
        )
    return np.asarray(values, np.float32)


def noise_images(count: int, preprocessing: Preprocessing, seed: int) -> ChosenImages:
    """Return seeded normal noise as network input, labelled as what it is."""
    rng = np.random.default_rng(seed)
    shape = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
    pictures = []
    for number in range(count):
        values = rng.standard_normal(shape).astype(np.float32)
        pictures.append(Picture(f"noise {number}", array_digest(values), "", values))
    return ChosenImages(tuple(pictures), f"{count} samples of NOISE, no images", noise=True)
