"""What artifacts are judged on: the golden samples of a bundle, or other images.

Either comes with the *original* network's answers in float64. Golden samples
are made once, from the original network, when the bundle is exported. From then on any
host judges any artifact without PyTorch and without the weights. ``golden.npz`` holds

============  ==============================================================================
``pixels``    ``(N, H, W, C)`` uint8, resized and cropped; or, for a network that was given
              network input, ``inputs``: ``(N, C, H, W)`` float32, normalised
``logits``    ``(N, K)`` float64: the original network in float64
``noise_db``  SQNR of the original network in float32 against that, which FP32 artifacts are
              judged by
============  ==============================================================================

Of a backbone ``logits`` holds the sketches of its maps side by side
(:mod:`van_deploy.checks.samples`). Where height and width are dynamic there are
``logits 192x192`` of the first images at each other size, repeated side by side and cut.
Beside it lie two encoded originals, of which the first two rows were read: decoding, resizing
and cropping are checked too.
"""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from van_deploy.bundle import Bundle, Draft
from van_deploy.bundle.reading import verify
from van_deploy.checks.gates import Finding, held
from van_deploy.checks.samples import SKETCH, Outputs, Samples, other_sizes, samples_from
from van_deploy.config.sizes import ImageSize
from van_deploy.data.images import Batch, image_set, open_image, opened
from van_deploy.data.samples import check_images, sample_set
from van_deploy.errors import BundleError, ImageError
from van_deploy.manifest import Golden
from van_deploy.metrics import Array
from van_deploy.model.preprocess import Pixels, Preprocessing, normalised, pixels_from_image
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
RESIZED_WITHIN = 1
"""Levels of 255 by which another build of Pillow may resize otherwise."""

THEIRS = "the terms of the images given with --images"
SAMPLES = (
    "the terms of scikit-image's and scikit-learn's own photographs (see data/README.txt and "
    "datasets/images/README.txt in these packages); synthetic images and digits are free"
)


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


def images_for_golden(
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
    chosen = check_images(name, preprocessing, count, images if source else None)
    originals: list[bytes] = []
    if preprocessing.channels not in IMAGE_CHANNELS or chosen.pixels is None:
        return chosen, ()
    for item in images.items[:: max(1, len(images) // ORIGINALS)][:ORIGINALS]:
        with suppress(ImageError):
            if image := opened(item, preprocessing.channels):
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
    inputs = normalised(pixels, preprocessing)
    return replace(chosen, inputs=inputs, pixels=pixels, names=tuple(names)), tuple(originals)


def _pixels(source: Path | bytes, preprocessing: Preprocessing) -> Pixels:
    return pixels_from_image(open_image(source, channels=preprocessing.channels), preprocessing)


def write_golden(draft: Draft, samples: Samples, originals: Sequence[bytes], users: bool) -> Golden:
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
    return Golden(
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
            inputs = arrays["inputs"] if pixels is None else normalised(pixels, preprocessing)
            first = golden.originals[: len(inputs)]
            names = (*first, *(f"golden {row}" for row in range(len(first), len(inputs))))
            described = f"{len(inputs)} golden samples: {golden.images}"
            images = Batch((), inputs, pixels, (), names, described)

            def answers(size: str, of: Images, outputs: Outputs) -> tuple[Array, float]:
                logits = arrays[f"logits {size}".rstrip()].astype(np.float64)
                return logits, float(arrays["noise_db"])

            return samples_from(images, manifest.architecture, sizes, answers, True)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"The golden samples '{path}' are damaged: {error}.",
            "Export the model again; nothing made it from here.",
        ) from error


def judge_originals(bundle: Bundle, samples: Samples) -> list[Finding]:
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
        ) * (change > RESIZED_WITHIN)
        findings.append(held("preprocessing", fault, change))
    return findings


# --- samples of the original network ---------------------------------------------------------


def reference_samples(
    loaded: LoadedVan, images: Batch, sizes: Sequence[ImageSize] = (), golden: bool = False
) -> Samples:
    """Return images with the original network's answers in float64 and float32.

    Args:
        loaded: the original network.
        images: at its own size.
        sizes: others, at which the first images are repeated and answered, too.
        golden: whether they are those of the bundle.
    """
    import torch

    double, names = copy.deepcopy(loaded.model).double().eval(), loaded.config.output_names

    def rows(model: nn.Module, given: torch.Tensor, outputs: Outputs) -> Array:
        pieces = []
        for images in given.split(REFERENCE_BATCH):
            found = model(images)
            found = found if isinstance(found, tuple) else (found,)
            pieces.append(outputs.rows({n: y.numpy() for n, y in zip(names, found, strict=True)}))
        return np.concatenate(pieces)

    def answers(_: str, inputs: Images, outputs: Outputs) -> tuple[Array, float]:
        given = torch.from_numpy(inputs)
        with torch.inference_mode():
            exact = rows(double, given.double(), outputs)
            single = rows(loaded.model, given, outputs).astype(np.float32)
        return exact, outputs.sqnr_db(exact, single)

    return samples_from(images, loaded.config, sizes, answers, golden)


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
        chosen = check_images(loaded.name, loaded.preprocessing, count, images)
        return reference_samples(loaded, chosen, sizes)
    golden = golden_samples(bundle).first(count)
    same = Batch((), golden.inputs, golden.pixels, (), golden.names, golden.description)
    return reference_samples(loaded, same, sizes, golden=True)
