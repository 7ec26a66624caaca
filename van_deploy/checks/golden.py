"""What artifacts are judged on: images with the original network's answers in float64.

Golden samples are made once, from the original network, when the bundle is exported. From
then on any host judges any artifact without PyTorch and without the weights. ``golden.npz`` holds

============  ==============================================================================
``pixels``    ``(N, H, W, C)`` uint8, resized and cropped; or, for a network that was given
              network input, ``inputs``: ``(N, C, H, W)`` float32, normalised
``logits``    ``(N, K)`` float64: the original network in float64
``noise_db``  SQNR of the original network in float32 against that, which FP32 artifacts are
              judged by
============  ==============================================================================

Where height and width are dynamic there are ``logits 192x192`` of the first images at each other
size, repeated side by side and cut. Beside it lie two encoded originals, of which the first two
rows were read: decoding, resizing and cropping are checked too.

Feature maps are large (van_b0 at 224 x 224 gives 3 MB an image in float64), so what is kept and
compared of a backbone's map is its *sketch*: the values, each with a sign that only its place
decides, are summed into :data:`SKETCH` buckets (count sketch: M. Charikar, K. Chen and M.
Farach-Colton, "Finding frequent items in data streams", 2002). A sketch is linear, so the
difference of two is the sketch of the difference, and keeps sums of squares: of one image to 3 %,
0.14 dB. ``logits`` holds the sketches of all maps side by side.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle, Draft
from van_deploy.bundle.reading import verify
from van_deploy.checks.gates import RESIZE_LIMIT, Finding, pass_or_fail
from van_deploy.config.sizes import ImageSize, SizeRange, format_size, height_width
from van_deploy.data.images import Batch, decode_item, image_set, open_image
from van_deploy.data.samples import sample_set, verification_images
from van_deploy.errors import BundleError, ImageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.manifest import GoldenInfo
from van_deploy.metrics import Array, Comparison, Task, compare, sqnr_db
from van_deploy.model.preprocess import Pixels, Preprocessing, normalise, pixels_from_image
from van_deploy.model.variants import STAGES, VanConfig
from van_deploy.runners.base import Images

if TYPE_CHECKING:
    from torch import nn

    from van_deploy.model.checkpoint import LoadedVan

GOLDEN_FILE = "golden.npz"
GOLDEN_IMAGES = 16
BACKBONE_BYTES = 6_000_000
ORIGINALS = 2
IMAGE_CHANNELS = (1, 3, 4)  # those that image files have
LONGEST_SIDE = 512  # pixels: large enough to be resized by the pipeline, small enough to ship
REFERENCE_BATCH = 8  # images PyTorch sees at a time: enough to be fast, few enough to be lean

THEIRS = "the terms of the images given with --images"
SAMPLES = (
    "the terms of scikit-image's and scikit-learn's own photographs (see data/README.txt and "
    "datasets/images/README.txt in these packages); synthetic images and digits are free"
)

SKETCH = 2048
"""Numbers that are kept of one feature map of one image."""

OTHER_IMAGES = 2
"""Images that are compared at each other size."""


@dataclass(frozen=True)
class OutputLayout:
    """How a network's outputs become rows of numbers that can be compared.

    Attributes:
        widths: of a backbone, how many columns each map's sketch has, by its name; empty for a
            classifier, whose logits are taken as they are.
    """

    widths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: VanConfig, size: ImageSize) -> OutputLayout:
        """Return those of a network and images of a size."""
        shapes = config.feature_map_shapes(height_width(size))
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


LOGITS_LAYOUT = OutputLayout()
"""Those of a classifier."""

ReferenceFunction = Callable[[str, Images, OutputLayout], tuple[Array, float]]
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
    outputs: OutputLayout = LOGITS_LAYOUT
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
    return tuple(size for size in sizes.sample_sizes() if size != native) if sizes else ()


def samples_from(
    images: Batch, config: VanConfig, sizes: Sequence[ImageSize], answers: ReferenceFunction
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
    """

    def at(size: ImageSize | None) -> Samples:
        count = len(images) if size is None else min(OTHER_IMAGES, len(images))
        inputs, label = _tiled(images.inputs[:count], size, 2), format_size(size) if size else ""
        pixels = None if images.pixels is None else _tiled(images.pixels[:count], size, 1)
        described = f"{count} images repeated to {label}" if label else images.description
        outputs = OutputLayout.of(config, inputs.shape[2:])
        answered = answers(label, inputs, outputs)
        given = (inputs, pixels, *answered, images.names[:count], described)
        task = Task.of(config.num_classes, config.problem_type)
        return Samples(*given, task, outputs=outputs)

    return replace(at(None), others=tuple(at(size) for size in sizes))


def _tiled(values: npt.NDArray[Any], size: ImageSize | None, axis: int) -> npt.NDArray[Any]:
    """Return images whose height is that axis, and the width behind it, repeated and cut."""
    for place, side in enumerate(height_width(size) if size else (), axis):
        values = values.take(np.arange(side) % values.shape[place], axis=place)
    return values


# --- golden samples --------------------------------------------------------------------------


def golden_count(config: VanConfig, preprocessing: Preprocessing) -> int:
    """Return how many golden samples a network has: fewer for a backbone of large images.

    Its sketches take up to 100 kB an image, and all of it at most :data:`BACKBONE_BYTES`.
    """
    if not config.out_indices:
        return GOLDEN_IMAGES
    height, width = preprocessing.sides
    image = height * width * preprocessing.channels
    image *= 1 if preprocessing.channels in IMAGE_CHANNELS else 4  # inputs are float32
    return max(2, min(GOLDEN_IMAGES, BACKBONE_BYTES // (image + 12 * SKETCH * STAGES)))


def golden_images(
    name: str, preprocessing: Preprocessing, source: Path | None, count: int = GOLDEN_IMAGES
) -> tuple[Batch, tuple[bytes, ...]]:
    """Return the images of the golden samples, and the encoded originals of the first ones (PNG).

    Args:
        name: of the network.
        preprocessing: of the network.
        source: the user's folder or ``.npz``; None for sample photographs.
        count: how many images.

    Raises:
        ImageError: not one image can be read, or they are too few and too small.
    """
    images = image_set(source) if source is not None else sample_set(name, preprocessing)
    chosen = verification_images(name, preprocessing, count, images if source else None)
    originals: list[bytes] = []
    if preprocessing.channels not in IMAGE_CHANNELS or chosen.pixels is None:
        return chosen, ()
    for item in images.items[:: max(1, len(images) // ORIGINALS)][:ORIGINALS]:
        with suppress(ImageError):
            if image := decode_item(item, preprocessing.channels):
                image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                file = io.BytesIO()
                image.save(file, format="PNG", optimize=True)
                originals.append(file.getvalue())
    first = [_pixels(data, preprocessing) for data in originals]
    known = {pixels.tobytes() for pixels in first}
    others = [row for row, p in enumerate(chosen.pixels) if p.tobytes() not in known]
    pixels = np.stack([*first, *chosen.pixels[others]])[:count]
    names = [f"golden/{row}.png" for row in range(len(first))]
    names = [*names, *(chosen.names[row] for row in others)][:count]
    inputs = normalise(pixels, preprocessing)
    return replace(chosen, inputs=inputs, pixels=pixels, names=tuple(names)), tuple(originals)


def _pixels(source: Path | bytes, preprocessing: Preprocessing) -> Pixels:
    return pixels_from_image(open_image(source, channels=preprocessing.channels), preprocessing)


def write_golden(
    draft: Draft, samples: Samples, originals: Sequence[bytes], users: bool
) -> GoldenInfo:
    """Write the golden samples into a bundle's draft, and return what the manifest says of them.

    Args:
        draft: of the bundle.
        samples: the images and the original network's answers.
        originals: encoded images that the first of them were read from.
        users: whether the images are the user's own.
    """
    arrays = {"inputs": samples.inputs} if samples.pixels is None else {"pixels": samples.pixels}
    arrays |= {"logits": samples.logits, "noise_db": np.array(samples.noise_db)}
    arrays |= {f"logits {other.size}": other.logits for other in samples.others}
    np.savez_compressed(draft.file(GOLDEN_FILE), **arrays)
    places = [f"golden/{row}.png" for row in range(len(originals))]
    for place, data in zip(places, originals, strict=True):
        draft.file(place).write_bytes(data)
    return GoldenInfo(
        file=GOLDEN_FILE,
        count=len(samples),
        images=samples.description,
        originals=tuple(places),
        licence=THEIRS if users else SAMPLES,
    )


def golden_samples(bundle: Bundle) -> Samples:
    """Return the golden samples of a bundle.

    Raises:
        BundleError: it has none, or they were changed or are not of its network.
    """
    golden, manifest = bundle.manifest.golden, bundle.manifest
    if golden is None or golden.file not in bundle.digests:
        raise BundleError(
            f"The bundle '{bundle.path}' has no golden samples.",
            "Use the original network (--against weights), or export again without --golden none.",
        )
    path, preprocessing = bundle.path / golden.file, manifest.preprocessing
    verify(path, bundle.digests[golden.file])
    sizes = other_sizes(manifest.sizes, preprocessing.image_size)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["pixels"] if "pixels" in arrays.files else None
            inputs = arrays["inputs"] if pixels is None else normalise(pixels, preprocessing)
            first = golden.originals[: len(inputs)]
            names = (*first, *(f"golden {row}" for row in range(len(first), len(inputs))))
            described = f"{len(inputs)} golden samples: {golden.images}"
            images = Batch((), inputs, pixels, (), names, described)

            def answers(size: str, of: Images, outputs: OutputLayout) -> tuple[Array, float]:
                logits = arrays[f"logits {size}".rstrip()].astype(np.float64)
                return logits, float(arrays["noise_db"])

            return replace(samples_from(images, manifest.architecture, sizes, answers), golden=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"The golden samples '{path}' are damaged: {error}.",
            "Export the model again; nothing made it from here.",
        ) from error


def check_originals(bundle: Bundle, samples: Samples) -> list[Finding]:
    """Return whether this machine reads the encoded originals as the exporting one did.

    Raises:
        BundleError: one is missing or was changed.
        ImageError: one cannot be read here.
    """
    findings, golden = [], bundle.manifest.golden
    for row, place in enumerate(golden.originals if golden else ()):
        path = bundle.path / place
        verify(path, bundle.digests[place])
        found = _pixels(path, bundle.manifest.preprocessing).astype(int)
        change = float(np.abs(found - np.asarray(samples.pixels)[row]).max())
        fault = (
            f"'{path.name}', read and resized here, differs by {change:g} of 255 from the "
            f"golden sample {row}: another decoder, or other preprocessing"
        ) * (change > RESIZE_LIMIT.value)
        findings.append(pass_or_fail(f"preprocessing/{path.name}", fault, change, RESIZE_LIMIT))
    return findings


# --- samples of the original network ---------------------------------------------------------


def reference_samples(loaded: LoadedVan, images: Batch, sizes: Sequence[ImageSize]) -> Samples:
    """Return images with the original network's answers in float64 and float32.

    Args:
        loaded: the original network.
        images: at its own size.
        sizes: others, at which the first images are repeated and answered, too.
    """
    import torch

    double, names = copy.deepcopy(loaded.model).double().eval(), loaded.config.output_names

    def rows(model: nn.Module, given: torch.Tensor, outputs: OutputLayout) -> Array:
        pieces = []
        for images in given.split(REFERENCE_BATCH):
            found = model(images)
            found = found if isinstance(found, tuple) else (found,)
            pieces.append(outputs.rows({n: y.numpy() for n, y in zip(names, found, strict=True)}))
        return np.concatenate(pieces)

    def answers(_: str, inputs: Images, outputs: OutputLayout) -> tuple[Array, float]:
        given = torch.from_numpy(inputs)
        with torch.inference_mode():
            exact = rows(double, given.double(), outputs)
            single = rows(loaded.model, given, outputs).astype(np.float32)
        return exact, outputs.sqnr_db(exact, single)

    return samples_from(images, loaded.config, sizes, answers)


def samples_for(
    bundle: Bundle, loaded: LoadedVan | None, images: Path | None, count: int = GOLDEN_IMAGES
) -> Samples:
    """Return what a bundle is judged on.

    Args:
        bundle: the bundle.
        loaded: its original network; None takes the golden samples as they are.
        images: the user's folder or ``.npz``; None for the golden samples, or sample
            photographs where the bundle has none.
        count: how many of the images, where there is a network.

    Raises:
        BundleError: there is no network and there are no golden samples, or they were changed.
        ImageError: the images cannot be read.
    """
    if loaded is None:
        return golden_samples(bundle)
    sizes = other_sizes(bundle.manifest.sizes, loaded.preprocessing.image_size)
    if images is not None or bundle.manifest.golden is None:
        chosen = verification_images(loaded.name, loaded.preprocessing, count, images)
        return reference_samples(loaded, chosen, sizes)
    golden = golden_samples(bundle).first(count)
    same = Batch((), golden.inputs, golden.pixels, (), golden.names, golden.description)
    return replace(reference_samples(loaded, same, sizes), golden=True)
