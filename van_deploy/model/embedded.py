"""The network and the images that ship inside the package.

``van_digits`` is a small VAN trained on scikit-learn's handwritten digits by
``training/train_digits.py``. It needs no download, so it is what the demo and
the tests deploy: drift is measured on a network that has learnt something.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from van_deploy.errors import UsageError

__all__ = [
    "EMBEDDED_FOLDER",
    "EMBEDDED_NAME",
    "DigitsSplit",
    "EmbeddedFiles",
    "digits_images",
    "embedded_files",
    "write_digits_folder",
]

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
    return EmbeddedFiles(
        weights=folder / f"{EMBEDDED_NAME}.safetensors",
        card=folder / f"{EMBEDDED_NAME}.json",
        images=folder / "digits.npz",
    )


def digits_images(
    split: DigitsSplit, folder: Path = EMBEDDED_FOLDER
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return one part of the digits: images ``(N, 8, 8)`` uint8 and labels ``(N,)`` int64.

    Ink is bright (255) on black (0).

    Raises:
        UsageError: there is no such part.
    """
    if split not in get_args(DigitsSplit):
        raise UsageError(
            f"The digits have no part called '{split}'.",
            f"Known parts: {', '.join(get_args(DigitsSplit))}.",
        )
    with np.load(embedded_files(folder).images) as parts:
        return parts[f"images_{split}"], parts[f"labels_{split}"].astype(np.int64)


def write_digits_folder(
    dest: Path | str,
    split: DigitsSplit,
    limit: int | None = None,
    *,
    folder: Path = EMBEDDED_FOLDER,
) -> Path:
    """Return ``dest``, filled with one part of the digits as an ImageFolder.

    The images are grey 8 x 8 PNGs named ``<class>/<part>_<index>.png``. The
    folder appears whole or not at all; one that already holds exactly these
    files is left as it is.

    Args:
        dest: folder to make; its parents are made too.
        split: which part.
        limit: at most so many images, spread evenly over the classes; by default all.
        folder: where ``digits.npz`` lies.

    Raises:
        UsageError: ``dest`` holds something else, or ``limit`` is below 1.
    """
    dest = Path(dest)
    images, labels = digits_images(split, folder)
    dest.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        made = workshop / "digits"  # mkdtemp's own folder is closed to other users
        for index in _balanced(labels, limit):
            _write_png(made / str(labels[index]) / f"{split}_{index:04d}.png", images[index])
        if not _same_files(made, dest):
            _move(made, dest)
    finally:
        shutil.rmtree(workshop)
    return dest


def _balanced(labels: NDArray[np.int64], limit: int | None) -> list[int]:
    """Return indices of at most ``limit`` images: the first of every class, the second, ..."""
    if limit is not None and limit < 1:
        raise UsageError(f"A limit of {limit} images makes no sense.", "Give 1 or more.")
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        rank[of_class] = np.arange(len(of_class))
    return [int(index) for index in np.lexsort((labels, rank))[:limit]]


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _same_files(made: Path, dest: Path) -> bool:
    """Return whether both folders hold the same files with the same bytes."""
    if not dest.is_dir():
        return False
    ours, theirs = _files_below(made), _files_below(dest)
    return ours == theirs and all(
        (made / name).read_bytes() == (dest / name).read_bytes() for name in ours
    )


def _files_below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _move(made: Path, dest: Path) -> None:
    try:
        os.replace(made, dest)  # replaces an empty folder, nothing else
    except OSError as problem:
        if not dest.exists():
            raise
        raise UsageError(
            f"'{dest}' already exists and holds something else.",
            "Name a new folder, or remove that one.",
        ) from problem
