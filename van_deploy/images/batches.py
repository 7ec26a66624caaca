"""From image files to batches of network input, one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from van_deploy.errors import ImageError, UsageError
from van_deploy.images.files import open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageTransform", "UnreadableImages", "load_batches"]

ImageTransform: TypeAlias = "Callable[[Image.Image], Any]"
"""An RGB picture to normalised ``(3, S, S)`` float32, as an array or a CPU tensor."""


@dataclass
class UnreadableImages:
    """The images that could not be read, to hand to ``load_batches`` as ``on_bad``.

    Attributes:
        found: every such file with the error that names it, in the order met.

    >>> bad = UnreadableImages()
    >>> bad(Path("a.jpg"), ImageError("'a.jpg' cannot be read as an image: it is truncated."))
    >>> print(bad.describe())
    1 image could not be read:
      'a.jpg' cannot be read as an image: it is truncated.
    """

    found: list[tuple[Path, ImageError]] = field(default_factory=list)

    def __call__(self, path: Path, error: ImageError) -> None:
        """Remember one unreadable file."""
        self.found.append((path, error))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.found)

    def describe(self, limit: int = 10) -> str:
        """Return the count and the first ``limit`` reasons, one a line; empty if there are none."""
        if not self.found:
            return ""
        noun = "image" if len(self) == 1 else "images"
        lines = [f"{len(self)} {noun} could not be read:"]
        lines += [f"  {error.message}" for _, error in self.found[:limit]]
        if len(self) > limit:
            lines.append(f"  and {len(self) - limit} more")
        return "\n".join(lines)

    def refuse_above(self, share: float, total: int) -> None:
        """Do nothing if at most ``share`` (0..1) of ``total`` images were unreadable.

        Raises:
            ImageError: there were more, or there was no readable image at all.
        """
        if len(self) and (len(self) > share * total or len(self) == total):
            raise ImageError(
                f"{len(self)} of {total} images could not be read, more than "
                f"the {100 * share:g} % allowed.\n{self.describe()}",
                "Replace or remove these files.",
            )


def load_batches(
    paths: Iterable[Path],
    transform: ImageTransform,
    batch: int,
    on_bad: Callable[[Path, ImageError], None] | None = None,
) -> Iterator[tuple[NDArray[np.float32], list[Path]]]:
    """Yield normalised images ``(n, 3, S, S)`` float32 with the paths they came from.

    Every batch has ``n == batch`` but the last, which may be smaller: an
    unreadable image is passed over and the next one takes its place.

    Args:
        paths: image files, in the order wanted.
        transform: the preprocessing of the weights.
        batch: images a batch, 1 or more.
        on_bad: called with each unreadable file and why, for instance an
            :class:`UnreadableImages`. Without it the first one ends the run.

    Raises:
        UsageError: ``batch`` is below 1.
        ImageError: an image cannot be read and there is no ``on_bad``.
    """
    if batch < 1:
        raise UsageError(f"A batch of {batch} images makes no sense.", "Give 1 or more.")
    return _batches(paths, transform, batch, on_bad)


def _batches(
    paths: Iterable[Path],
    transform: ImageTransform,
    batch: int,
    on_bad: Callable[[Path, ImageError], None] | None,
) -> Iterator[tuple[NDArray[np.float32], list[Path]]]:
    inputs: list[NDArray[np.float32]] = []
    names: list[Path] = []
    for path in paths:
        try:
            image = open_image(path)
        except ImageError as error:
            if on_bad is None:
                raise
            on_bad(path, error)
            continue
        inputs.append(np.asarray(transform(image), dtype=np.float32))
        names.append(path)
        if len(inputs) == batch:
            yield np.stack(inputs), names
            inputs, names = [], []
    if inputs:
        yield np.stack(inputs), names
