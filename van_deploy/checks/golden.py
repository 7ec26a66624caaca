"""Golden samples: images with the original network's outputs in float64.

Golden samples are computed once, from the original network, when the bundle is exported. With
them any host can check any artifact without PyTorch and without the weights. ``golden.npz`` has

============  ==============================================================================
``pixels``    ``(N, H, W, C)`` uint8, resized and cropped; or, for images that were given as
              network input, ``inputs``: ``(N, C, H, W)`` float32, normalised
``logits``    ``(N, K)`` float64: the original network in float64
``noise_db``  SQNR of the original network in float32 against ``logits``, from which the limit
              of FP32 artifacts is computed
============  ==============================================================================

With a dynamic height and width, ``logits 192x192`` are those of the first images at each other
size, tiled and cropped. The same folder has the encoded files of the first two rows, so decoding,
resizing and cropping are checked too.

Feature maps are large (van_b0 at 224 x 224 gives 3 MB per image in float64), so a backbone's maps
are stored and compared as *sketches*: the values are multiplied by pseudo-random signs and summed
into :data:`SKETCH` buckets (count sketch: M. Charikar, K. Chen and M. Farach-Colton, "Finding
frequent items in data streams", 2002). A sketch is linear, so the difference of two sketches is
the sketch of the difference, and it preserves sums of squares: to 3 % for one image, 0.14 dB.
``logits`` has the sketches of all maps, concatenated.
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
from van_deploy.checks import gates
from van_deploy.config import GateProfile
from van_deploy.config.sizes import ImageSize, SizeRange, format_size, height_width
from van_deploy.data.images import Batch, decode_item, image_set, open_image
from van_deploy.data.samples import sample_set, verification_images
from van_deploy.errors import BundleError, ImageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.manifest import GoldenInfo
from van_deploy.metrics import Array, Comparison, Task, compare, offset_db, sqnr_db
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
IMAGE_CHANNELS = (1, 3, 4)  # numbers of channels in image files
LONGEST_SIDE = 512  # pixels: large enough to be resized by the pipeline, small enough to ship
REFERENCE_BATCH = 8  # images per call of PyTorch: fast, with little memory

USER_LICENCE = "the terms of the images given with --images"
SAMPLES_LICENCE = (
    "the terms of scikit-image's and scikit-learn's own photographs (see data/README.txt and "
    "datasets/images/README.txt in these packages); synthetic images and digits are free"
)

SKETCH = 2048  # length of the sketch of one feature map of one image
IMAGES_AT_OTHER_SIZES = 2  # images that are compared at each other size


@dataclass(frozen=True)
class OutputLayout:
    """Conversion of a network's outputs to rows that can be compared.

    Attributes:
        widths: for a backbone, the sketch length of each map by output name; empty for a
            classifier, whose rows are the logits.
        task: how logits become labels.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    task: Task = Task.SINGLE_LABEL

    @classmethod
    def of(cls, config: VanConfig, size: ImageSize) -> OutputLayout:
        """Return the layout for a network and an image size."""
        shapes = config.feature_map_shapes(height_width(size))
        widths = {name: min(SKETCH, math.prod(shape)) for name, shape in shapes.items()}
        return cls(widths, Task.of(config.num_classes, config.problem_type))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the network's outputs."""
        return tuple(self.widths) or (OUTPUT_NAME,)

    def rows(self, outputs: Mapping[str, Array]) -> Array:
        """Return the logits ``(N, K)``, or the sketches of all maps, concatenated.

        Raises:
            KeyError: an output is missing.
        """
        if not self.widths:
            return outputs[OUTPUT_NAME]
        return np.concatenate([sketch(outputs[name]) for name in self.widths], axis=1)

    def parts(self, rows: Array) -> dict[str, Array]:
        """Split rows into the columns of each output, by name."""
        ends = np.cumsum(list(self.widths.values()), dtype=np.int64)[:-1]
        return dict(zip(self.names, np.split(rows, ends, axis=1), strict=True))

    def sqnr_db(self, expected: Array, actual: Array) -> float:
        """Return the SQNR of the logits, or of the worst map, in dB."""
        parts = self.parts(actual)
        return min(sqnr_db(part, parts[name]) for name, part in self.parts(expected).items())

    def offset_db(self, expected: Array) -> float:
        """Return :func:`~van_deploy.metrics.offset_db` of a regression's values, else 0."""
        is_regression = self.task is Task.REGRESSION and not self.widths
        return offset_db(expected) if is_regression else 0.0

    def compare(self, expected: Array, actual: Array) -> Comparison:
        """Return the metrics of the logits, or of the worst map."""
        pairs = zip(self.parts(expected).values(), self.parts(actual).values(), strict=True)
        results = [compare(*pair, None if self.widths else self.task) for pair in pairs]
        return min(results, key=lambda result: result.sqnr_db)


LOGITS_LAYOUT = OutputLayout()  # the layout of a classifier

# Maps size, images and output layout to the float64 rows and the noise of float32 in dB.
ReferenceFunction = Callable[[str, Images, OutputLayout], tuple[Array, float]]


@dataclass(frozen=True)
class Samples:
    """Images with the original network's outputs.

    Attributes:
        inputs: ``(N, C, H, W)`` float32, normalised.
        pixels: the same images, ``(N, H, W, C)`` uint8; None if only the inputs are known.
        logits: ``(N, K)`` float64, of the original network in float64; for a backbone, the
            sketches of its maps, concatenated.
        noise_db: SQNR of the same network in float32 against ``logits``; for a backbone, the
            minimum over the maps.
        names: name of each image.
        description: description of the set.
        golden: whether these are the bundle's golden samples, or the first of them.
        outputs: layout of ``logits``.
        others: some of the images at other sizes.
    """

    inputs: Images
    pixels: Pixels | None
    logits: Array
    noise_db: float
    names: tuple[str, ...]
    description: str
    golden: bool = False
    outputs: OutputLayout = LOGITS_LAYOUT
    others: tuple[Samples, ...] = ()

    @property
    def size(self) -> str:
        """Height and width in pixels, such as ``224x320``."""
        return "x".join(map(str, self.inputs.shape[2:]))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.inputs)

    def sqnr_floor(self, numeric: str, profile: GateProfile = gates.DEFAULT_PROFILE) -> gates.Limit:
        """Return the minimum SQNR of an artifact's logits on these images."""
        offset = self.outputs.offset_db(self.logits)
        return gates.sqnr_floor(numeric, self.noise_db, profile, offset)

    def first(self, count: int) -> Samples:
        """Return the first ``count`` images, or all if there are fewer."""
        parts = {n: getattr(self, n)[:count] for n in ("inputs", "logits", "names")}
        pixels = None if self.pixels is None else self.pixels[:count]
        prefix = "" if count >= len(self) else f"the first {count} of "
        return replace(self, **parts, pixels=pixels, description=prefix + self.description)


def sketch(maps: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the sketch ``(N, SKETCH)`` of maps ``(N, C, h, w)``; small maps are only flattened."""
    rows = maps.reshape(len(maps), -1).astype(np.float64)
    if rows.shape[1] <= SKETCH:
        return rows
    signs, buckets = _signs_and_buckets(rows.shape[1])
    return np.stack([np.bincount(buckets, signs * row, SKETCH) for row in rows])


@functools.cache
def _signs_and_buckets(count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return ``count`` pseudo-random signs and buckets, the same on every machine.

    The generator is SplitMix64 (G. Steele, D. Lea and C. Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014).
    """
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    signs = np.where(state >> np.uint64(63), -1.0, 1.0)
    return signs, (state % np.uint64(SKETCH)).astype(np.int64)


def other_sizes(sizes: SizeRange | None, native: ImageSize) -> tuple[ImageSize, ...]:
    """Return the image sizes to compare at, in addition to the native one."""
    return tuple(size for size in sizes.sample_sizes() if size != native) if sizes else ()


def samples_from(
    images: Batch, config: VanConfig, sizes: Sequence[ImageSize], reference: ReferenceFunction
) -> Samples:
    """Return images with the reference's outputs, also at other sizes.

    For other sizes the images are tiled and cropped, not resized, so that all machines use the
    same pixels.

    Args:
        images: images of the native size.
        config: architecture of the network.
        sizes: other sizes.
        reference: returns the network's rows in float64 and the noise of float32 for a size such
            as ``192x192`` ("" for the native one), images, and an output layout.
    """

    def at(size: ImageSize | None) -> Samples:
        count = len(images) if size is None else min(IMAGES_AT_OTHER_SIZES, len(images))
        inputs, label = _tile(images.inputs[:count], size, 2), format_size(size) if size else ""
        pixels = None if images.pixels is None else _tile(images.pixels[:count], size, 1)
        description = f"{count} images tiled to {label}" if label else images.description
        outputs = OutputLayout.of(config, inputs.shape[2:])
        logits, noise_db = reference(label, inputs, outputs)
        names = images.names[:count]
        return Samples(inputs, pixels, logits, noise_db, names, description, outputs=outputs)

    return replace(at(None), others=tuple(at(size) for size in sizes))


def _tile(values: npt.NDArray[Any], size: ImageSize | None, axis: int) -> npt.NDArray[Any]:
    """Tile and crop images to a size; ``axis`` is the height, the next axis the width."""
    for dim, side in enumerate(height_width(size) if size else (), axis):
        values = values.take(np.arange(side) % values.shape[dim], axis=dim)
    return values


# --- golden samples --------------------------------------------------------------------------


def golden_count(config: VanConfig, preprocessing: Preprocessing) -> int:
    """Return the number of golden samples, which is smaller for a backbone with large images.

    The sketches take up to 100 kB per image, and all samples at most :data:`BACKBONE_BYTES`.
    """
    if not config.out_indices:
        return GOLDEN_IMAGES
    image = math.prod(preprocessing.sides) * preprocessing.channels
    image *= 1 if preprocessing.channels in IMAGE_CHANNELS else 4  # inputs are float32
    return max(2, min(GOLDEN_IMAGES, BACKBONE_BYTES // (image + 12 * SKETCH * STAGES)))


def golden_images(
    name: str, preprocessing: Preprocessing, source: Path | None, count: int = GOLDEN_IMAGES
) -> tuple[Batch, tuple[bytes, ...]]:
    """Return the images of the golden samples, and the encoded files (PNG) of the first ones.

    Args:
        name: name of the network.
        preprocessing: preprocessing of the network.
        source: the user's folder or ``.npz``; None for sample photographs.
        count: number of images.

    Raises:
        ImageError: no image can be read, or the images are too few and too small.
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
    first_bytes = {pixels.tobytes() for pixels in first}
    others = [row for row, p in enumerate(chosen.pixels) if p.tobytes() not in first_bytes]
    pixels = np.stack([*first, *chosen.pixels[others]])[:count]
    names = [f"golden/{row}.png" for row in range(len(first))]
    names = [*names, *(chosen.names[row] for row in others)][:count]
    inputs = normalise(pixels, preprocessing)
    return replace(chosen, inputs=inputs, pixels=pixels, names=tuple(names)), tuple(originals)


def _pixels(source: Path | bytes, preprocessing: Preprocessing) -> Pixels:
    return pixels_from_image(open_image(source, channels=preprocessing.channels), preprocessing)


def write_golden(
    draft: Draft, samples: Samples, originals: Sequence[bytes], user_images: bool
) -> GoldenInfo:
    """Write the golden samples into a bundle and return their entry for the manifest.

    Args:
        draft: draft of the bundle.
        samples: images with the original network's outputs.
        originals: encoded files of the first images.
        user_images: whether the images are the user's own.
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
        licence=USER_LICENCE if user_images else SAMPLES_LICENCE,
    )


def golden_samples(bundle: Bundle) -> Samples:
    """Return the golden samples of a bundle.

    Raises:
        BundleError: it has none, or they were changed or belong to another network.
    """
    golden, manifest = bundle.manifest.golden, bundle.manifest
    if golden is None or golden.file not in bundle.digests:
        raise BundleError(
            f"The bundle '{bundle.path}' has no golden samples.",
            "Use the original network (--against weights), or export again without --golden none.",
        )
    path, preprocessing = bundle.path / golden.file, manifest.preprocessing
    bundle.verify(golden.file, bundle.digests[golden.file])
    sizes = other_sizes(manifest.sizes, preprocessing.image_size)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = arrays["pixels"] if "pixels" in arrays.files else None
            inputs = arrays["inputs"] if pixels is None else normalise(pixels, preprocessing)
            first = golden.originals[: len(inputs)]
            names = (*first, *(f"golden {row}" for row in range(len(first), len(inputs))))
            description = f"{len(inputs)} golden samples: {golden.images}"
            images = Batch((), inputs, pixels, (), names, description)

            def reference(size: str, _: Images, outputs: OutputLayout) -> tuple[Array, float]:
                logits = arrays[f"logits {size}".rstrip()].astype(np.float64)
                return logits, float(arrays["noise_db"])

            samples = samples_from(images, manifest.architecture, sizes, reference)
            return replace(samples, golden=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"The golden samples '{path}' are damaged: {error}.",
            "Export the model again with `van-deploy export --force`.",
        ) from error


def check_originals(bundle: Bundle, samples: Samples) -> list[gates.Finding]:
    """Return whether this machine decodes the encoded originals to the same pixels.

    Raises:
        BundleError: an original is missing or was changed.
        ImageError: an original cannot be decoded.
    """
    findings, golden = [], bundle.manifest.golden
    for row, place in enumerate(golden.originals[: len(samples)] if golden else ()):
        path = bundle.path / place
        bundle.verify(place, bundle.digests[place])
        pixels = _pixels(path, bundle.manifest.preprocessing).astype(int)
        change = float(np.abs(pixels - np.asarray(samples.pixels)[row]).max())
        rule, limit = f"{gates.PREPROCESSING}{path.name}", gates.RESIZE_LIMIT
        fault = (
            f"'{path.name}', decoded and resized on this machine, differs by {change:g} of 255 "
            f"from golden sample {row}: the decoder or the preprocessing differs"
        ) * (change > limit.value)
        findings.append(gates.pass_or_fail(rule, fault, change, limit))
    return findings


# --- samples of the original network ---------------------------------------------------------


def reference_samples(loaded: LoadedVan, images: Batch, sizes: Sequence[ImageSize]) -> Samples:
    """Return images with the original network's float64 outputs and float32 noise.

    Args:
        loaded: the original network.
        images: images of the native size.
        sizes: other sizes, to which the first images are tiled.
    """
    import torch

    double, names = copy.deepcopy(loaded.model).double().eval(), loaded.config.output_names

    def rows(model: nn.Module, inputs: torch.Tensor, layout: OutputLayout) -> Array:
        pieces = []
        for batch in inputs.split(REFERENCE_BATCH):
            result = model(batch)
            maps = result if isinstance(result, tuple) else (result,)
            pieces.append(layout.rows({n: y.numpy() for n, y in zip(names, maps, strict=True)}))
        return np.concatenate(pieces)

    def reference(_: str, images: Images, layout: OutputLayout) -> tuple[Array, float]:
        inputs = torch.from_numpy(images)
        with torch.inference_mode():
            exact = rows(double, inputs.double(), layout)
            single = rows(loaded.model, inputs, layout).astype(np.float32)
        return exact, layout.sqnr_db(exact, single)

    return samples_from(images, loaded.config, sizes, reference)


def samples_for(
    bundle: Bundle, loaded: LoadedVan | None, images: Path | None, count: int = GOLDEN_IMAGES
) -> Samples:
    """Return the samples that a bundle's artifacts are compared on.

    Args:
        bundle: the bundle.
        loaded: its original network; with None the golden samples are used.
        images: the user's folder or ``.npz``; with None the images of the golden samples, or
            sample photographs if the bundle has none.
        count: number of images, if the network is given.

    Raises:
        BundleError: the bundle has no golden samples and no network is given, or the samples were
            changed.
        ImageError: the images cannot be read.
    """
    if loaded is None:
        return golden_samples(bundle)
    sizes = other_sizes(bundle.manifest.sizes, loaded.preprocessing.image_size)
    if images is not None or bundle.manifest.golden is None:
        chosen = verification_images(loaded.name, loaded.preprocessing, count, images)
        return reference_samples(loaded, chosen, sizes)
    golden = golden_samples(bundle).first(count)
    batch = Batch((), golden.inputs, golden.pixels, (), golden.names, golden.description)
    return replace(reference_samples(loaded, batch, sizes), golden=True)
