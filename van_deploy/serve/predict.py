"""Pictures in, named classes out: files, folders and bytes through one artefact.

Batches are filled across pictures, whatever folder they come from; a picture
that cannot be read gets an error in its place and the others their answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from van_deploy.data import find_images, open_image
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.pixels import MAX_PIXELS, Pixels, pixels_from_image
from van_deploy.runners.network import Network, TopClasses

__all__ = [
    "NamedClass",
    "Prediction",
    "Source",
    "Speed",
    "named_classes",
    "predict",
    "sources_from",
]


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
    """The answer to one picture.

    Attributes:
        source: its path, or ``-`` for standard input.
        top: most probable classes, most probable first; empty if unreadable.
        error: why it could not be read, or None.
    """

    source: str
    top: tuple[NamedClass, ...]
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """A picture still to be read: a path, or the bytes themselves."""

    name: str
    content: Path | bytes


@dataclass
class Speed:
    """Where the time of a run went.

    Attributes:
        pictures: answered.
        decode_s: reading, decoding, resizing and cropping.
        infer_s: the network, with normalisation where that is outside it.
    """

    pictures: int = 0
    decode_s: float = 0.0
    infer_s: float = 0.0

    def __str__(self) -> str:
        """Return the speed in one line."""
        if not self.pictures:
            return "no picture was answered"
        decode, infer = (1e3 * s / self.pictures for s in (self.decode_s, self.infer_s))
        rate = self.pictures / max(self.decode_s + self.infer_s, 1e-9)
        return (
            f"{self.pictures} pictures, {rate:.1f} a second: {decode:.2f} ms to read and "
            f"{infer:.2f} ms to answer each"
        )


@dataclass
class _Batch:
    """Sources in their order, and the pixels of those that could be read."""

    sources: list[tuple[str, str | None]] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)


def sources_from(images: Sequence[str | Path | bytes]) -> tuple[Source, ...]:
    """Return the pictures asked for, in their order.

    Args:
        images: files, folders (searched at any depth), or the bytes of a file, which are
            called ``-``.

    Raises:
        UsageError: one is a URL.
        ImageError: a file or folder does not exist, or a folder holds no image.
    """
    found: list[Source] = []
    for image in images:
        if isinstance(image, bytes):
            found.append(Source("-", image))
            continue
        word = str(image)
        if "://" in word:
            raise UsageError(
                f"'{word}' is a URL; nothing is downloaded here.",
                "Download it first, or pipe it in: curl URL | van-deploy predict BUNDLE -",
            )
        path = Path(word)
        if path.is_dir():
            found += [Source(str(found_), found_) for found_ in find_images(path)]
        elif path.exists():
            found.append(Source(word, path))
        else:
            raise ImageError(f"There is no image '{word}'.", "Check the path.")
    return tuple(found)


def predict(
    network: Network,
    sources: Iterable[Source],
    *,
    top: int = 5,
    batch: int = 8,
    speed: Speed | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Yield the answer to each picture, in order.

    Args:
        network: opened.
        sources: the pictures.
        top: how many classes.
        batch: pictures a batch, at most the network's ``max_batch``.
        speed: added to as the run goes on.
        max_pixels: larger pictures are not opened.

    Raises:
        UsageError: ``top`` or ``batch`` is not possible.
    """
    if top < 1 or not 1 <= batch <= network.max_batch:
        raise UsageError(
            f"{top} classes in batches of {batch} are not possible.",
            f"Ask for 1 class or more, and batches of 1 to {network.max_batch}.",
        )
    speed = speed if speed is not None else Speed()
    waiting = _Batch()
    for source in sources:
        start = time.perf_counter()
        try:
            image = open_image(
                source.content,
                channels=network.preprocessing.channels,
                name="Standard input" if source.name == "-" else "",
                max_pixels=max_pixels,
            )
            waiting.pixels.append(pixels_from_image(image, network.preprocessing))
            waiting.sources.append((source.name, None))
        except ImageError as error:
            waiting.sources.append((source.name, error.message))
        speed.decode_s += time.perf_counter() - start
        if len(waiting.pixels) == batch:
            yield from _answers(network, waiting, top, speed)
            waiting = _Batch()
    yield from _answers(network, waiting, top, speed)


def named_classes(top: TopClasses, row: int, names: Sequence[str] | None) -> tuple[NamedClass, ...]:
    """Return one row's classes with their names."""
    pairs = zip(top.classes[row].tolist(), top.probabilities[row].tolist(), strict=True)
    return tuple(NamedClass(c, names[c] if names else str(c), float(p)) for c, p in pairs)


def _answers(network: Network, batch: _Batch, top: int, speed: Speed) -> Iterator[Prediction]:
    answers: Iterator[tuple[NamedClass, ...]] = iter(())
    if batch.pixels:
        start = time.perf_counter()
        outputs = network.run(network.prepare(np.stack(batch.pixels)))
        speed.infer_s += time.perf_counter() - start
        speed.pictures += len(batch.pixels)
        ranked = network.top(outputs, top)
        names = network.bundle.manifest.class_names
        answers = iter([named_classes(ranked, row, names) for row in range(len(batch.pixels))])
    for name, error in batch.sources:
        yield Prediction(name, () if error else next(answers), error)
