"""The network and the images that ship inside the package.

``van_digits`` is a small VAN trained on scikit-learn's handwritten digits by
``training/train_digits.py``. It needs no download, so it is what the demo and
the tests deploy: drift is measured on a network that has learnt something.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

EMBEDDED_NAME = "van_digits"
EMBEDDED_FOLDER = Path(__file__).parent / "digits"

DigitsSplit = Literal["train", "heldout"]


@dataclass(frozen=True)
class EmbeddedFiles:
    """Where the parts of ``van_digits`` lie.

    Attributes:
        weights: safetensors with official key names, BatchNorm statistics included.
        card: JSON: architecture, preprocessing, classes, accuracy, how it was made, licence.
        images: npz with ``images_train``, ``labels_train``, ``images_heldout``, ``labels_heldout``.
    """

    weights: Path
    card: Path
    images: Path


def embedded_files(folder: Path = EMBEDDED_FOLDER) -> EmbeddedFiles:
    """Return the files of ``van_digits`` in ``folder``, by default the ones in the package."""
    stem = folder / EMBEDDED_NAME
    weights, card = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    return EmbeddedFiles(weights, card, folder / "digits.npz")


def digits_images(
    split: DigitsSplit, folder: Path = EMBEDDED_FOLDER
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return one part of the digits: images ``(N, 8, 8)`` uint8 and labels ``(N,)`` int64.

    Ink is bright (255) on black (0).
    """
    with np.load(embedded_files(folder).images) as parts:
        return parts[f"images_{split}"], parts[f"labels_{split}"].astype(np.int64)


def write_digits_folder(
    dest: Path | str,
    split: DigitsSplit,
    limit: int | None = None,
    *,
    folder: Path = EMBEDDED_FOLDER,
) -> Path:
    """Return ``dest``, with one part of the digits in it as grey 8 x 8 PNGs.

    They are named ``<class>/<part>_<index>.png``.

    Args:
        dest: folder to make; its parents are made too.
        split: which part.
        limit: at most so many images, spread evenly over the classes; by default all.
        folder: where ``digits.npz`` lies.
    """
    from PIL import Image

    images, labels = digits_images(split, folder)
    rank = np.array([(labels[:index] == label).sum() for index, label in enumerate(labels)])
    for index in np.lexsort((labels, rank))[:limit]:
        path = Path(dest) / str(labels[index]) / f"{split}_{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(path)
    return Path(dest)
