"""Prediction: the classes of image files, folders and bytes with one artifact."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import IOBase
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.data.images import find_images, open_image
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Pixels, pixels_from_image
from van_deploy.runners.network import NamedClass, Network
from van_deploy.schema import path_argument

Image = str | Path | bytes
ONE_IMAGE = (str, bytes, bytearray, memoryview, IOBase)  # iterable, and not a list of images


@dataclass(frozen=True)
class Prediction:
    """Prediction for one image.

    Attributes:
        source: path of the image, or ``-`` for bytes.
        top: most probable classes in descending order; empty if the image is unreadable.
        error: why the image could not be read, or None.
    """

    source: str
    top: tuple[NamedClass, ...]
    error: str | None = None


def find_sources(images: Image | Iterable[Image]) -> tuple[Path | bytes, ...]:
    """Return image files and bytes in the given order, with the files of each folder.

    Args:
        images: files, folders (searched recursively), or the bytes of a file; one, or several.

    Raises:
        ImageError: a file or folder does not exist, or a folder contains no image.
        UsageError: an image is neither a path nor bytes.
    """
    sources: list[Path | bytes] = []
    is_one = isinstance(images, ONE_IMAGE) or not isinstance(images, Iterable)
    several: Any = (images,) if is_one else images
    for image in several:
        if isinstance(image, bytes):
            sources.append(image)
        elif not (path := path_argument("images", image)).exists():
            remedy = "Check the path; images are files or folders on this machine."
            raise ImageError(f"There is no image '{image}'.", remedy)
        else:
            sources += find_images(path) if path.is_dir() else [path]
    return tuple(sources)


def predict(
    network: Network, sources: Iterable[Path | bytes], top: int, batch: int | None = None
) -> Iterator[Prediction]:
    """Yield the prediction for each image, in order; an unreadable image gets an error.

    Args:
        network: an open network.
        sources: the images.
        top: number of classes.
        batch: images per batch, at most the network's ``max_batch``; None takes the bundle's
            optimum, where the network allows it.

    Raises:
        ConversionError: the network computed NaN or infinite values.
        UsageError: ``batch`` is too large, or the artifact does not return so many classes.
    """
    batch = batch or min(network.bundle.manifest.batch.opt, network.max_batch)
    if batch > network.max_batch:
        text = f"'{network.name}' does not take batches of {batch}."
        raise UsageError(text, f"Give a batch size from 1 to {network.max_batch}.")
    remaining = iter(sources)
    while chunk := list(islice(remaining, batch)):
        pixels, errors = list[Pixels](), list[str | None]()
        for source in chunk:
            label = "The data" if isinstance(source, bytes) else ""
            try:
                image = open_image(source, channels=network.preprocessing.channels, name=label)
                pixels.append(pixels_from_image(image, network.preprocessing))
                errors.append(None)
            except ImageError as error:
                errors.append(error.message)
        if pixels:
            inputs = network.prepare(np.stack(pixels))
            ranked = iter(network.top_classes(network.run(inputs), top))
        for source, message in zip(chunk, errors, strict=True):
            name = "-" if isinstance(source, bytes) else str(source)
            yield Prediction(name, () if message else next(ranked), message)
