"""Golden samples: images in the bundle with PyTorch's own answers to them.

They are made once, from the original network, when the bundle is exported. From then on any
host judges any artifact without PyTorch and without the weights. ``golden.npz`` holds

===========  ==============================================================================
``pixels``   ``(N, H, W, C)`` uint8, resized and cropped; or, for a network that was given
             network input, ``inputs``: ``(N, C, H, W)`` float32, normalised
``logits``   ``(N, K)`` float64: the original network in float64
``float32``  ``(N, K)`` float32: the original network in float32, whose distance from
             ``logits`` is the noise that FP32 artifacts are judged by
===========  ==============================================================================

Of a backbone both hold the sketches of its maps side by side (:mod:`van_deploy.checks.samples`).
Where height and width are dynamic there are ``logits 192x192`` and ``float32 192x192`` of the
first images at each other size, repeated side by side and cut. Beside it lie two encoded
originals, of which the first two rows were read: decoding, resizing and cropping are checked too.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.bundle import Bundle, Draft
from van_deploy.bundle.reading import verify
from van_deploy.checks.gates import Finding, held
from van_deploy.checks.samples import SKETCH, Outputs, Samples, other_sizes, samples_from
from van_deploy.data import (
    CheckImages,
    ImageSet,
    check_images,
    image_set,
    open_image,
    opened,
    sample_set,
)
from van_deploy.errors import BundleError, ImageError
from van_deploy.manifest import Golden
from van_deploy.model.pixels import Pixels, normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.variants import STAGES, VanConfig
from van_deploy.runners.base import Images

GOLDEN_FILE = "golden.npz"
GOLDEN_IMAGES = 16
BACKBONE_BYTES = 6_000_000
ORIGINALS = 2
IMAGE_CHANNELS = (1, 3, 4)  # those that image files have
LONGEST_SIDE = 512  # pixels: large enough to be resized by the pipeline, small enough to ship
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
) -> tuple[CheckImages, tuple[bytes, ...]]:
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
    originals = _originals(images, preprocessing)
    if not originals or chosen.pixels is None:
        return chosen, ()
    first = [_pixels(data, preprocessing) for data in originals]
    known = {pixels.tobytes() for pixels in first}
    others = [row for row, p in enumerate(chosen.pixels) if p.tobytes() not in known]
    pixels = np.stack([*first, *chosen.pixels[others]])[: len(chosen)]
    names = (
        *(f"golden/{row}.png" for row in range(len(first))),
        *(chosen.names[r] for r in others),
    )
    inputs = normalised(pixels, preprocessing)
    return replace(chosen, inputs=inputs, pixels=pixels, names=names[: len(chosen)]), originals


def _originals(images: ImageSet, preprocessing: Preprocessing) -> tuple[bytes, ...]:
    """Return some of the images as PNG, small enough to ship."""
    encoded: list[bytes] = []
    if preprocessing.channels not in IMAGE_CHANNELS:
        return ()
    for item in images.items[:: max(1, len(images) // ORIGINALS)]:
        try:
            image = opened(item, preprocessing.channels)
        except ImageError:
            continue
        if image is None or len(encoded) == ORIGINALS:
            break
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        file = io.BytesIO()
        image.save(file, format="PNG", optimize=True)
        encoded.append(file.getvalue())
    return tuple(encoded)


def _pixels(source: Path | bytes, preprocessing: Preprocessing) -> Pixels:
    image = open_image(source, channels=preprocessing.channels)
    return pixels_from_image(image, preprocessing)


def write_golden(
    draft: Draft, samples: Samples, originals: Sequence[bytes], *, users: bool
) -> Golden:
    """Write the golden samples into a bundle's draft, and return what the manifest says of them.

    Args:
        draft: of the bundle.
        samples: the images and the original network's answers.
        originals: encoded images that the first of them were read from.
        users: whether the images are the user's own.
    """
    arrays = {"inputs": samples.inputs} if samples.pixels is None else {"pixels": samples.pixels}
    arrays |= {"logits": samples.logits, "float32": samples.single}
    for other in samples.others:
        arrays |= {f"logits {other.size}": other.logits, f"float32 {other.size}": other.single}
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
    golden, manifest = _golden_of(bundle), bundle.manifest
    path, preprocessing = bundle.path / golden.file, manifest.preprocessing
    verify(path, bundle.digests[golden.file])
    sides, channels = preprocessing.sides, preprocessing.channels
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels = None
            if "pixels" in arrays.files:
                pixels = _array(arrays, "pixels", np.uint8, (*sides, channels))
                inputs = normalised(pixels, preprocessing)
            else:
                inputs = _array(arrays, "inputs", np.float32, (channels, *sides))
            first = golden.originals[: len(inputs)]
            names = (*first, *(f"golden {row}" for row in range(len(first), len(inputs))))
            described = f"{len(inputs)} golden samples: {golden.images}"
            images = CheckImages((), inputs, pixels, (), names, described)
            classes = manifest.architecture.num_classes

            def answers(size: str, of: Images, outputs: Outputs) -> tuple[Any, Any]:
                row, count = (sum(outputs.widths.values()) or classes,), len(of)
                logits = _array(arrays, f"logits {size}".rstrip(), np.float64, row, count)
                return logits, _array(arrays, f"float32 {size}".rstrip(), np.float32, row, count)

            sizes = other_sizes(manifest.sizes, preprocessing.image_size)
            return samples_from(images, manifest.architecture, sizes, answers, golden=True)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"The golden samples '{path}' are damaged: {error}.",
            "Export the model again; nothing made it from here.",
        ) from error


def _array(
    arrays: Any, name: str, kind: type[np.generic], row: tuple[int, ...], count: int | None = None
) -> npt.NDArray[Any]:
    """Return an array of the golden samples.

    Raises:
        ValueError: it is not that of this network: of ``count`` finite rows of shape ``row``.
    """
    values: npt.NDArray[Any] = arrays[name]
    wanted = (count or max(1, len(values)), *row)
    if values.dtype != kind or values.shape != wanted:
        raise ValueError(
            f"'{name}' is {values.dtype} {values.shape}, not {np.dtype(kind)} of rows {row}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"'{name}' holds what is no number")
    return values


def _golden_of(bundle: Bundle) -> Golden:
    golden = bundle.manifest.golden
    if golden is None or golden.file not in bundle.digests:
        raise BundleError(
            f"The bundle '{bundle.path}' has no golden samples.",
            "Compare with the original network (--against weights), or export the model again "
            "without --golden none.",
        )
    return golden


def judge_originals(bundle: Bundle, samples: Samples) -> list[Finding]:
    """Return whether this machine reads the encoded originals as the exporting one did.

    Raises:
        BundleError: one is missing or was changed.
    """
    findings = []
    for row, place in enumerate(_golden_of(bundle).originals):
        path, change = bundle.path / place, None
        verify(path, bundle.digests[place])
        try:
            found = _pixels(path, bundle.manifest.preprocessing).astype(int)
            change = float(np.abs(found - np.asarray(samples.pixels)[row]).max())
            fault = (
                f"'{path.name}', read and resized here, differs by {change:g} of 255 from the "
                f"golden sample {row}: another decoder, or other preprocessing"
            ) * (change > RESIZED_WITHIN)
        except ImageError as error:
            fault = error.message.rstrip(".")
        findings.append(held("preprocessing", fault, change))
    return findings
