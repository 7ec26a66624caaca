"""Images in, named classes out: files, folders and bytes through one artifact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from van_deploy.data.images import find_images, open_image
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Pixels, pixels_from_image
from van_deploy.runners.network import NamedClass, Network


@dataclass(frozen=True)
class Prediction:
    """The answer to one image.

    Attributes:
        source: its path, or ``-`` for bytes.
        top: most probable classes, most probable first; empty if unreadable.
        error: why it could not be read, or None.
    """

    source: str
    top: tuple[NamedClass, ...]
    error: str | None = None


def find_sources(images: Sequence[str | Path | bytes]) -> tuple[Path | bytes, ...]:
    """Return the images asked for, in their order.

    Args:
        images: files, folders (searched at any depth), or the bytes of a file.

    Raises:
        ImageError: a file or folder does not exist, or a folder holds no image.
    """
    found: list[Path | bytes] = []
    for image in images:
        if isinstance(image, bytes):
            found.append(image)
        elif not (path := Path(image)).exists():
            remedy = "Check the path; download what is a URL first."
            raise ImageError(f"There is no image '{image}'.", remedy)
        else:
            found += find_images(path) if path.is_dir() else [path]
    return tuple(found)


def predict(
    network: Network, sources: Iterable[Path | bytes], top: int, batch: int
) -> Iterator[Prediction]:
    """Yield the answer to each image, in order; one that cannot be read gets an error.

    Args:
        network: opened.
        sources: the images.
        top: how many classes.
        batch: images a batch, at most the network's ``max_batch``.

    Raises:
        UsageError: ``batch`` is too large, or the artifact does not give so many classes.
    """
    if batch > network.max_batch:
        text = f"'{network.name}' does not take batches of {batch}."
        raise UsageError(text, f"Ask for batches of 1 to {network.max_batch}.")
    remaining = iter(sources)
    while some := list(islice(remaining, batch)):
        pixels, answers = list[Pixels](), list[Prediction]()
        for source in some:
            name = "-" if isinstance(source, bytes) else str(source)
            try:
                shown = "Standard input" if name == "-" else ""
                image = open_image(source, channels=network.preprocessing.channels, name=shown)
                pixels.append(pixels_from_image(image, network.preprocessing))
                answers.append(Prediction(name, ()))
            except ImageError as error:
                answers.append(Prediction(name, (), error.message))
        if pixels:
            ranked = iter(network.top(network.run(network.prepare(np.stack(pixels))), top))
        for answer in answers:
            classes = () if answer.error else next(ranked)
            yield Prediction(answer.source, classes, answer.error)
