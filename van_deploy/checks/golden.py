"""Golden samples: images in the bundle with PyTorch's own answers to them.

They are made once, from the original network, when the bundle is exported. From then on any
host judges any artifact without PyTorch and without the weights. ``golden.npz`` holds

===========  ==============================================================================
``pixels``   ``(N, S, S, C)`` uint8, resized and cropped; or, for a network that was given
             network input, ``inputs``: ``(N, C, S, S)`` float32, normalised
``logits``   ``(N, K)`` float64: the original network in float64
``float32``  ``(N, K)`` float32: the original network in float32, whose distance from
             ``logits`` is the noise that FP32 artifacts are judged by
===========  ==============================================================================

and beside it lie two encoded originals, of which the first two rows were read: decoding,
resizing and cropping are checked too.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle, Draft
from van_deploy.bundle.reading import verify
from van_deploy.checks.gates import Finding, Outcome, failed
from van_deploy.data import (
    CheckImages,
    ImageSet,
    check_images,
    image_set,
    open_image,
    opened,
    sample_set,
)
from van_deploy.errors import BundleError, ImageError, UsageError
from van_deploy.manifest import Golden
from van_deploy.metrics import Array, Task, sqnr_db
from van_deploy.model.pixels import Pixels, normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.runners.base import Images
from van_deploy.runners.network import task_of

__all__ = [
    "GOLDEN_FILE",
    "GOLDEN_IMAGES",
    "Samples",
    "golden_samples",
    "images_for_golden",
    "judge_originals",
    "write_golden",
]

GOLDEN_FILE = "golden.npz"
GOLDEN_IMAGES = 16
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


@dataclass(frozen=True)
class Samples:
    """Images with the original network's answers.

    Attributes:
        inputs: ``(N, C, S, S)`` float32, normalised.
        pixels: the same ``(N, S, S, C)`` uint8; None where there are only inputs.
        logits: ``(N, K)`` float64, of the original network in float64.
        single: ``(N, K)`` float32, of the original network in float32.
        names: what each image is called.
        description: all of them in one phrase.
        task: how logits become labels.
        golden: whether they are those of the bundle.
    """

    inputs: Images
    pixels: Pixels | None
    logits: Array
    single: Array
    names: tuple[str, ...]
    description: str
    task: Task = Task.SINGLE_LABEL
    golden: bool = False

    @property
    def noise_db(self) -> float:
        """SQNR of float32 against float64."""
        return sqnr_db(self.logits, self.single)

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.inputs)

    def first(self, count: int) -> Samples:
        """Return at most ``count`` of them."""
        return replace(
            self,
            inputs=self.inputs[:count],
            pixels=None if self.pixels is None else self.pixels[:count],
            logits=self.logits[:count],
            single=self.single[:count],
            names=self.names[:count],
            description=self.description
            if count >= len(self)
            else f"the first {count} of {self.description}",
        )


def images_for_golden(
    name: str, preprocessing: Preprocessing, source: Path | None
) -> tuple[CheckImages, tuple[bytes, ...]]:
    """Return the images of the golden samples, and the encoded originals of the first ones (PNG).

    Args:
        name: of the network.
        preprocessing: of the network.
        source: the user's folder or ``.npz``; None for sample photographs.

    Raises:
        ImageError: not one image can be read, or they are too few and too small.
    """
    images = image_set(source) if source is not None else sample_set(name, preprocessing)
    chosen = check_images(name, preprocessing, GOLDEN_IMAGES, images if source else None)
    originals = _originals(images, preprocessing)
    if not originals or chosen.pixels is None:
        return chosen, ()
    first = [_pixels(data, preprocessing) for data in originals]
    others = [row for row, p in enumerate(chosen.pixels) if not _among(p, first)]
    pixels = np.stack([*first, *chosen.pixels[others]])[: len(chosen)]
    names = (*_original_names(len(originals)), *(chosen.names[row] for row in others))
    names = names[: len(chosen)]
    inputs = normalised(pixels, preprocessing)
    return replace(chosen, inputs=inputs, pixels=pixels, names=names), originals


def _among(pixels: Pixels, others: Sequence[Pixels]) -> bool:
    return any(np.array_equal(pixels, other) for other in others)


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


def _original_names(count: int) -> list[str]:
    return [f"golden/{row}.png" for row in range(count)]


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
    images = {"inputs": samples.inputs} if samples.pixels is None else {"pixels": samples.pixels}
    np.savez_compressed(
        draft.file(GOLDEN_FILE), logits=samples.logits, float32=samples.single, **images
    )
    places = _original_names(len(originals))
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
    golden = _golden_of(bundle)
    path = bundle.path / golden.file
    verify(path, bundle.digests[golden.file])
    preprocessing = bundle.manifest.preprocessing
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        pixels = found.get("pixels")
        inputs = found["inputs"] if pixels is None else normalised(pixels, preprocessing)
        _require_shapes(bundle, inputs, pixels, found)
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise BundleError(f"The golden samples '{path}' are damaged: {error}.", _ANEW) from error
    first = golden.originals[: len(inputs)]
    names = [*first, *(f"golden {row}" for row in range(len(first), len(inputs)))]
    return Samples(
        inputs,
        pixels,
        found["logits"],
        found["float32"],
        tuple(names),
        f"{len(inputs)} golden samples: {golden.images}",
        task_of(bundle),
        golden=True,
    )


_ANEW = "Export the model again; nothing made it from here."


def _golden_of(bundle: Bundle) -> Golden:
    golden = bundle.manifest.golden
    if golden is None or golden.file not in bundle.digests:
        raise BundleError(
            f"The bundle '{bundle.path}' has no golden samples.",
            "Compare with the original network (--against weights), or export the model again "
            "without --golden none.",
        )
    return golden


def _require_shapes(
    bundle: Bundle, inputs: Images, pixels: Pixels | None, found: dict[str, Any]
) -> None:
    """Return if the arrays are those of the bundle's network.

    Raises:
        ValueError: they are not.
    """
    preprocessing, classes = bundle.manifest.preprocessing, bundle.manifest.architecture.num_classes
    size = preprocessing.image_size
    wanted = {
        "inputs": ((preprocessing.channels, size, size), np.float32, inputs),
        "logits": ((classes,), np.float64, found["logits"]),
        "float32": ((classes,), np.float32, found["float32"]),
    }
    if pixels is not None and pixels.dtype != np.uint8:
        raise ValueError(f"'pixels' is {pixels.dtype}, not uint8")
    for name, (row, kind, values) in wanted.items():
        if values.shape != (len(inputs), *row) or values.dtype != kind or not len(inputs):
            raise ValueError(
                f"'{name}' is {values.dtype} {values.shape}, not {np.dtype(kind)} of rows {row}"
            )
        if not np.isfinite(values).all():
            raise ValueError(f"'{name}' holds what is no number")


def judge_originals(bundle: Bundle, samples: Samples) -> list[Finding]:
    """Return whether this machine reads the encoded originals as the exporting one did.

    Raises:
        BundleError: one is missing or was changed.
    """
    findings = []
    golden = _golden_of(bundle)
    for row, place in enumerate(golden.originals):
        path = bundle.path / place
        verify(path, bundle.digests[place])
        findings.append(_judge_original(path, row, samples, bundle.manifest.preprocessing))
    return findings


def _judge_original(
    path: Path, row: int, samples: Samples, preprocessing: Preprocessing
) -> Finding:
    if samples.pixels is None:
        raise UsageError(f"There are no pixels to compare '{path}' with.", _ANEW)
    try:
        found = _pixels(path, preprocessing)
    except ImageError as error:
        return failed("preprocessing", error.message.rstrip("."))
    change = int(np.abs(found.astype(int) - samples.pixels[row].astype(int)).max())
    if change > RESIZED_WITHIN:
        message = (
            f"'{path.name}', read and resized here, differs by {change} of 255 from the golden "
            f"sample {row}: another decoder, or other preprocessing"
        )
        return Finding("preprocessing", Outcome.FAIL, message, float(change))
    return Finding("preprocessing", Outcome.PASS, value=float(change))
