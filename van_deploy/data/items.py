"""Sets of images, not opened yet: a folder of files or an ``.npz`` of arrays."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.documents import require_regular_file
from van_deploy.errors import ImageError
from van_deploy.files import content_key, file_sha256

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

MOST_UNPACKED = 100
"""An archive may claim to unpack to so many times its size; recorded ranges have 5."""

ALWAYS_TAKEN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ImageItem:
    """One image, not opened yet.

    Attributes:
        name: what errors and reports call it; a file's path.
        data: a file, or values: ``(H, W)`` or ``(H, W, C)`` uint8, or normalised network
            input ``(C, S, S)`` float32.
        group: the class folder it lies in; "" if there is none.
        label: index of its class, once known.
    """

    name: str
    data: Path | npt.NDArray[Any]
    group: str = ""
    label: int | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its file, or of its values.

        Raises:
            ImageError: the file cannot be read.
        """
        if not isinstance(self.data, Path):
            return hashlib.sha256(np.ascontiguousarray(self.data).tobytes()).hexdigest()
        try:
            return file_sha256(self.data)
        except OSError as problem:
            raise _unreadable(problem) from problem


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        items: the images.
        description: what they are, and how labels were found; for reports and manifests.
        root: the folder they lie in; None for arrays.
        folders: the first folders below ``root``, those without images too.
        noise: whether they are no images at all.
    """

    items: tuple[ImageItem, ...]
    description: str
    root: Path | None = None
    folders: tuple[str, ...] = ()
    noise: bool = False

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.items)

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """The classes ``(N,)``, or None unless every image has one."""
        labels = [item.label for item in self.items]
        return None if None in labels else np.array(labels, np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 over the images' contents, in their order."""
        return content_key({"images": [item.digest for item in self.items]})

    def relative(self, item: ImageItem) -> str:
        """Return an item's path below the root, with slashes; its name where there is none."""
        if self.root is None or not isinstance(item.data, Path):
            return item.name
        return item.data.relative_to(self.root).as_posix()

    def take(self, indices: Sequence[int], description: str = "") -> ImageSet:
        """Return the images ``indices``, in that order."""
        items = tuple(self.items[int(index)] for index in indices)
        return replace(self, items=items, description=description or self.description)

    def first(self, limit: int) -> ImageSet:
        """Return at most ``limit`` images, spread evenly."""
        if limit >= len(self):
            return self
        described = f"{self.description}; {limit} of {len(self)}, evenly spread"
        return self.take(np.linspace(0, len(self) - 1, limit).astype(int).tolist(), described)

    def labelled(self, labels: Sequence[int], how: str) -> ImageSet:
        """Return the images with their labels; ``how`` says where these came from."""
        pairs = zip(self.items, labels, strict=True)
        items = tuple(replace(item, label=int(label)) for item, label in pairs)
        return replace(self, items=items, description=f"{self.description}, {how}")


def dataset_digest(images: ImageSet) -> str:
    """Return the SHA-256 over names below the root, contents and labels, in any order."""
    rows = sorted([images.relative(i), i.digest, str(i.label)] for i in images.items)
    return content_key({"dataset": rows})


def image_set(path: Path | str | ImageSet) -> ImageSet:
    """Return the images of a folder, at any depth and sorted by path, or of an ``.npz``.

    A set is returned as it is.

    An ``.npz`` holds an array ``images`` (or only one): uint8 ``(N, H, W)`` or
    ``(N, H, W, C)``, or normalised float32 ``(N, C, S, S)``; and, if known, ``labels``
    ``(N,)``, whole numbers that index the network's classes.

    Raises:
        ImageError: there is no image, or the path cannot be read.
    """
    if isinstance(path, ImageSet):
        return path
    path = Path(path)
    if path.suffix == ".npz":
        items = _items_of_npz(path)
        return ImageSet(items, f"{len(items)} images of '{path}'")
    files = find_images(path)
    parts = [file.relative_to(path).parts for file in files]
    items = tuple(
        ImageItem(str(file), file, part[0] if len(part) > 1 else "")
        for file, part in zip(files, parts, strict=True)
    )
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    return ImageSet(items, f"{len(items)} images of '{path}'", path, tuple(folders))


def find_images(folder: Path | str) -> tuple[Path, ...]:
    """Return the image files under ``folder``, at any depth, sorted by their path.

    Files are picked by suffix (:data:`IMAGE_SUFFIXES`, either case). Hidden
    files and folders are passed over. Symbolic links are followed, and a folder
    that was seen already is not entered again, so a loop of links ends.

    Raises:
        ImageError: the folder is missing, not a folder, not readable, or holds no image.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if _is_image(Path(parent, name))]
    if not found:
        raise ImageError(
            f"There is no image in '{folder}' or the folders below it.",
            f"Pass a folder with files ending in {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return tuple(sorted(found))


def _is_image(path: Path) -> bool:
    shown = not path.name.startswith(".")
    return shown and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def _refuse(problem: OSError) -> None:
    raise _unreadable(problem) from problem


def _unreadable(problem: OSError) -> ImageError:
    return ImageError(
        f"'{problem.filename}' cannot be read: {problem.strerror}.",
        "Check the path and its permissions.",
    )


def _items_of_npz(path: Path) -> tuple[ImageItem, ...]:
    try:
        values, labels = _arrays(path)
    except Exception as error:  # NumPy's and zipfile's readers raise almost anything on damage
        raise ImageError(
            f"'{path}' cannot be read as an .npz of images: {error}.",
            "Save it with np.savez(path, images=array, labels=indices): uint8 (N, H, W) or "
            "(N, H, W, C), or normalised float32 (N, C, S, S); labels may be left out.",
        ) from error
    known = [None] * len(values) if labels is None else labels.tolist()
    return tuple(
        ImageItem(f"image {n} of '{path}'", value, "" if label is None else str(label), label)
        for n, (value, label) in enumerate(zip(values, known, strict=True))
    )


def _arrays(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return the images of an archive (``images``, or its only array), and their labels or None.

    Raises:
        ValueError: they are no such things, are pickled, or the file is a decompression bomb.
    """
    require_regular_file(path)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > max(ALWAYS_TAKEN_BYTES, MOST_UNPACKED * size):
        raise ValueError(f"it has {size:,} bytes and claims to unpack to {unpacked:,}")
    with np.load(path, allow_pickle=False) as stored:
        names = stored.files
        key = "images" if "images" in names or len(names) != 1 else names[0]
        if key not in names:
            raise ValueError(f"it has no array called 'images' (it has: {', '.join(names)})")
        values, labels = stored[key], stored["labels"] if "labels" in names else None
    images = values.dtype == np.uint8 and values.ndim in {3, 4} and values.size
    inputs = values.dtype == np.float32 and values.ndim == 4 and values.size
    if not images and not (inputs and np.isfinite(values).all()):
        finite = ", not all finite" if inputs else ""
        raise ValueError(f"the images are {values.dtype} of shape {values.shape}{finite}")
    if labels is not None and not (
        labels.shape == values.shape[:1] and labels.dtype.kind in "iu" and labels.min() >= 0
    ):
        raise ValueError(
            f"the labels are {labels.dtype} of shape {labels.shape}, not {len(values)} whole "
            "numbers from 0"
        )
    return values, labels
