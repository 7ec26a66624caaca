"""Images with the original network's answers: what every artifact is judged on.

Feature maps are large (van_b0 at 224 x 224 gives 3 MB an image in float64), so what is kept and
compared of a map is its *sketch*: the values, each with a sign that only its place decides, are
summed into :data:`SKETCH` buckets (count sketch: M. Charikar, K. Chen and M. Farach-Colton,
"Finding frequent items in data streams", 2002). A sketch is linear, so the difference of two is
the sketch of the difference, and keeps sums of squares: of one image to 3 %, 0.14 dB.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.config.sizes import ImageSize, SizeRange, sides_of, size_text
from van_deploy.data.images import Batch
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.metrics import Array, Comparison, Task, compare, sqnr_db
from van_deploy.model.preprocess import Pixels
from van_deploy.model.variants import VanConfig
from van_deploy.runners.base import Images

SKETCH = 2048
"""Numbers that are kept of one feature map of one image."""

OTHER_IMAGES = 2
"""Images that are compared at each other size."""


@dataclass(frozen=True)
class Outputs:
    """How a network's outputs become rows of numbers that can be compared.

    Attributes:
        widths: of a backbone, how many columns each map's sketch has, by its name; empty for a
            classifier, whose logits are taken as they are.
    """

    widths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: VanConfig, size: ImageSize) -> Outputs:
        """Return those of a network and images of a size."""
        shapes = config.map_shapes(sides_of(size))
        return cls({name: min(SKETCH, math.prod(shape)) for name, shape in shapes.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """What the network gives."""
        return tuple(self.widths) or (OUTPUT_NAME,)

    def rows(self, given: Mapping[str, Array]) -> Array:
        """Return the logits ``(N, K)``, or the sketches of all maps side by side.

        Raises:
            KeyError: an output is missing.
        """
        if not self.widths:
            return given[OUTPUT_NAME]
        return np.concatenate([sketch(given[name]) for name in self.widths], axis=1)

    def parts(self, rows: Array) -> dict[str, Array]:
        """Return the columns of each output by its name."""
        ends = np.cumsum(list(self.widths.values()), dtype=np.int64)[:-1]
        return dict(zip(self.names, np.split(rows, ends, axis=1), strict=True))

    def sqnr_db(self, expected: Array, found: Array) -> float:
        """Return the SQNR of the logits, or of the worst map, in dB."""
        actual = self.parts(found)
        return min(sqnr_db(e, actual[name]) for name, e in self.parts(expected).items())

    def compare(self, expected: Array, found: Array) -> Comparison:
        """Return the figures of merit of the logits, or of the worst map."""
        actual, classes = self.parts(found), not self.widths
        pairs = [(part, actual[name]) for name, part in self.parts(expected).items()]
        return min((compare(*pair, classes=classes) for pair in pairs), key=lambda c: c.sqnr_db)


LOGITS = Outputs()
"""Those of a classifier."""

Answers = Callable[[str, Images, Outputs], tuple[Array, float]]
"""From a size, images, and how outputs become rows, to a network's in float64 and its noise."""


@dataclass(frozen=True)
class Samples:
    """Images with the original network's answers.

    Attributes:
        inputs: ``(N, C, H, W)`` float32, normalised.
        pixels: the same ``(N, H, W, C)`` uint8; None where there are only inputs.
        logits: ``(N, K)`` float64, of the original network in float64; of a backbone, the
            sketches of its maps side by side.
        noise_db: SQNR of the same network in float32 against these; of a backbone, the least of
            any map.
        names: what each image is called.
        description: all of them in one phrase.
        task: how logits become labels.
        golden: whether they are those of the bundle.
        outputs: how outputs become such rows.
        others: some of the images at other sizes.
    """

    inputs: Images
    pixels: Pixels | None
    logits: Array
    noise_db: float
    names: tuple[str, ...]
    description: str
    task: Task = Task.SINGLE_LABEL
    golden: bool = False
    outputs: Outputs = LOGITS
    others: tuple[Samples, ...] = ()

    @property
    def size(self) -> str:
        """Height and width of the images, such as ``224x320``."""
        return "x".join(map(str, self.inputs.shape[2:]))

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.inputs)

    def first(self, count: int) -> Samples:
        """Return at most ``count`` of them."""
        parts = {n: getattr(self, n)[:count] for n in ("inputs", "logits", "names")}
        pixels = None if self.pixels is None else self.pixels[:count]
        described = "" if count >= len(self) else f"the first {count} of "
        return replace(self, **parts, pixels=pixels, description=described + self.description)


def sketch(maps: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the sketch ``(N, SKETCH)`` of maps ``(N, C, h, w)``; small ones as they are."""
    rows = maps.reshape(len(maps), -1).astype(np.float64)
    if rows.shape[1] <= SKETCH:
        return rows
    signs, buckets = _hashed(rows.shape[1])
    return np.stack([np.bincount(buckets, signs * row, SKETCH) for row in rows])


@functools.cache
def _hashed(count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return a sign and a bucket for each of ``count`` places, the same on every machine.

    By SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014).
    """
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    signs = np.where(state >> np.uint64(63), -1.0, 1.0)
    return signs, (state % np.uint64(SKETCH)).astype(np.int64)


def other_sizes(sizes: SizeRange | None, native: ImageSize) -> tuple[ImageSize, ...]:
    """Return the sizes to compare at besides the network's own."""
    return tuple(size for size in sizes.tried() if size != native) if sizes else ()


def samples_from(
    images: Batch,
    config: VanConfig,
    sizes: Sequence[ImageSize],
    answers: Answers,
    golden: bool,
) -> Samples:
    """Return images with answers, the first of them at other sizes, too.

    Nothing is resized, so that every machine makes the same ones: there images are repeated
    side by side and cut.

    Args:
        images: at the network's own size.
        config: of the network.
        sizes: the others.
        answers: gives the rows of the network in float64, and float32's noise. It is told the size,
            such as ``192x192`` ("" for the network's own), the images, and how outputs become
            rows.
        golden: whether they are those of the bundle.
    """

    def at(size: ImageSize | None) -> Samples:
        count = len(images) if size is None else min(OTHER_IMAGES, len(images))
        inputs, pixels, described = images.inputs[:count], images.pixels, images.description
        pixels = None if pixels is None else pixels[:count]
        if size is not None:
            inputs = _tiled(inputs, size, 2)
            pixels = None if pixels is None else _tiled(pixels, size, 1)
            described = f"{count} images repeated to {size_text(size)}"
        outputs = Outputs.of(config, inputs.shape[2:])
        answered = answers("" if size is None else size_text(size), inputs, outputs)
        given = (inputs, pixels, *answered, images.names[:count], described)
        return Samples(*given, Task.of(config.num_classes, config.problem_type), golden, outputs)

    return replace(at(None), others=tuple(at(size) for size in sizes))


def _tiled(values: npt.NDArray[Any], size: ImageSize, axis: int) -> npt.NDArray[Any]:
    """Return images whose height is that axis, and the width behind it, repeated and cut."""
    for place, side in enumerate(sides_of(size), axis):
        values = values.take(np.arange(side) % values.shape[place], axis=place)
    return values
