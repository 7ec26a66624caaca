"""Images in, named classes out: files, folders and bytes through one artifact."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from van_deploy.data import find_images, open_image
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.runners.answers import TopClasses
from van_deploy.runners.network import Network


@dataclass(frozen=True)
class NamedClass:
    """One class of an answer.

    Attributes:
        index: column of the logits.
        name: what the weights call it; the index as text if they do not say.
        probability: 0 to 1.
    """

    index: int
    name: str
    probability: float


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


@dataclass
class Speed:
    """Where the time of a run went.

    Attributes:
        images: images answered.
        decode_s: reading, decoding, resizing and cropping.
        infer_s: the network, with normalisation where that is outside it.
    """

    images: int = 0
    decode_s: float = 0.0
    infer_s: float = 0.0

    def __str__(self) -> str:
        """Return the speed in one line."""
        if not self.images:
            return "no image was answered"
        decode, infer = (1e3 * s / self.images for s in (self.decode_s, self.infer_s))
        rate = self.images / max(self.decode_s + self.infer_s, 1e-9)
        return (
            f"{self.images} images, {rate:.1f} a second: {decode:.2f} ms to read and "
            f"{infer:.2f} ms to answer each"
        )


def sources_from(images: Sequence[str | Path | bytes]) -> tuple[Path | bytes, ...]:
    """Return the images asked for, in their order.

    Args:
        images: files, folders (searched at any depth), or the bytes of a file.

    Raises:
        UsageError: one is a URL.
        ImageError: a file or folder does not exist, or a folder holds no image.
    """
    found: list[Path | bytes] = []
    for image in images:
        if isinstance(image, bytes):
            found.append(image)
        elif "://" in str(image):
            raise UsageError(
                f"'{image}' is a URL; nothing is downloaded here.",
                "Download it first, or pipe it in: curl URL | van-deploy predict BUNDLE -",
            )
        elif not (path := Path(image)).exists():
            raise ImageError(f"There is no image '{image}'.", "Check the path.")
        else:
            found += find_images(path) if path.is_dir() else [path]
    return tuple(found)


def predict(
    network: Network,
    sources: Iterable[Path | bytes],
    *,
    top: int = 5,
    batch: int = 8,
    speed: Speed | None = None,
) -> Iterator[Prediction]:
    """Yield the answer to each image, in order.

    Batches are filled across folders; an image that cannot be read gets an error in its place.

    Args:
        network: opened.
        sources: the images.
        top: how many classes.
        batch: images a batch, at most the network's ``max_batch``.
        speed: added to as the run goes on.

    Raises:
        UsageError: ``top`` or ``batch`` is not possible.
    """
    if top < 1 or not 1 <= batch <= network.max_batch:
        raise UsageError(
            f"{top} classes in batches of {batch} are not possible.",
            f"Ask for 1 class or more, and batches of 1 to {network.max_batch}.",
        )
    speed = speed if speed is not None else Speed()
    read: list[tuple[str, Pixels | str]] = []  # the name of each, and its pixels or why not
    for source in sources:
        start = time.perf_counter()
        name, called = ("-", "Standard input") if isinstance(source, bytes) else (str(source), "")
        try:
            image = open_image(source, channels=network.preprocessing.channels, name=called)
            read.append((name, pixels_from_image(image, network.preprocessing)))
        except ImageError as error:
            read.append((name, error.message))
        speed.decode_s += time.perf_counter() - start
        if sum(not isinstance(value, str) for _, value in read) == batch:
            yield from _answers(network, read, top, speed)
            read = []
    yield from _answers(network, read, top, speed)


def named_classes(top: TopClasses, row: int, names: Sequence[str] | None) -> tuple[NamedClass, ...]:
    """Return one row's classes with their names."""
    pairs = zip(top.classes[row].tolist(), top.probabilities[row].tolist(), strict=True)
    return tuple(NamedClass(c, names[c] if names else str(c), float(p)) for c, p in pairs)


def _answers(
    network: Network, read: Sequence[tuple[str, Pixels | str]], top: int, speed: Speed
) -> Iterator[Prediction]:
    """Yield the answers to images, some of which could not be read."""
    pixels = [value for _, value in read if not isinstance(value, str)]
    if pixels:
        start = time.perf_counter()
        outputs = network.run(network.prepare(np.stack(pixels)))
        speed.infer_s += time.perf_counter() - start
        speed.images += len(pixels)
        ranked, rows = network.top(outputs, top), iter(range(len(pixels)))
    for name, value in read:
        if isinstance(value, str):
            yield Prediction(name, (), value)
        else:
            names = network.bundle.manifest.class_names
            yield Prediction(name, named_classes(ranked, next(rows), names))
