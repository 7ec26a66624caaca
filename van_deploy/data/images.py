"""From a folder or an ``.npz`` to network input: the one way for every command.

Quantize, evaluate, predict, serve and the checks all read images here, so that they see
the same pixels: upright, 8 bits a channel, as many channels as the network takes, then
resized and cropped as its weights want it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from van_deploy.documents import require_regular_file
from van_deploy.errors import ImageError, UsageError
from van_deploy.files import content_key, file_sha256
from van_deploy.model import preprocess
from van_deploy.model.preprocess import MAX_PIXELS, Preprocessing

# What the suffixes stand for; Pillow reads a camera's MPO as JPEG. No others are tried: it gives an
# EPS to Ghostscript, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# An archive may claim to unpack to so many times its size (recorded ranges have 5), or bytes.
MOST_UNPACKED, ALWAYS_TAKEN_BYTES = 100, 256 * 2**20
# Batches decoded before they are asked for: enough to hide a slow file, and a bound on memory.
AHEAD = 3

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageItem:
    """One image, not opened yet.

    Attributes:
        name: what reports call it; a file's path below its set's folder, with slashes.
        data: a file, or values: ``(H, W)`` or ``(H, W, C)`` uint8, or normalised network
            input ``(C, S, S)`` float32.
        group: the class folder it lies in; "" if there is none.
        label: index of its class, once known.
    """

    name: str
    data: Path | Values
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
            _refuse(problem)


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

    def take(self, indices: Sequence[int], description: str = "") -> ImageSet:
        """Return the images ``indices``, in that order."""
        items = tuple(self.items[int(index)] for index in indices)
        return replace(self, items=items, description=description or self.description)

    def subsample(self, limit: int) -> ImageSet:
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


# --- finding ---------------------------------------------------------------------------------


def image_set(path: Path | str | ImageSet) -> ImageSet:
    """Return the images of a folder, at any depth and sorted by path, or of an ``.npz``.

    A set is returned as it is.

    An ``.npz`` holds an array ``images`` (or only one): uint8 ``(N, H, W)`` or
    ``(N, H, W, C)``, or normalised float32 ``(N, C, S, S)``.

    Raises:
        ImageError: there is no image, or the path cannot be read.
    """
    if isinstance(path, ImageSet):
        return path
    path = Path(path)
    if path.suffix == ".npz":
        items = _items_of_npz(path)
        return ImageSet(items, f"{len(items)} images of '{path}'")
    pairs = [(file, file.relative_to(path)) for file in find_images(path)]
    items = tuple(ImageItem(n.as_posix(), file, "".join(n.parts[:-1][:1])) for file, n in pairs)
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    return ImageSet(items, f"{len(items)} images of '{path}'", path, tuple(folders))


def find_images(folder: Path | str) -> tuple[Path, ...]:
    """Return the image files under ``folder``, at any depth, sorted by their path.

    Files are picked by suffix (:data:`SUFFIXES`, either case). Hidden
    files and folders are passed over. Symbolic links are followed, and a folder
    that was seen already is not entered again, so a loop of links ends.

    Raises:
        ImageError: the folder is missing, not a folder, not readable, or holds no image.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = os.path.realpath(parent)
        known, seen = place in seen, seen | {place}
        folders[:] = [] if known else [name for name in folders if name[0] != "."]
        named = [Path(parent, name) for name in files if name[0] != "." and not known]
        found += [p for p in named if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        wrong = f"There is no image in '{folder}' or the folders below it."
        raise ImageError(wrong, f"Pass a folder with files ending in {', '.join(SUFFIXES)}.")
    return tuple(sorted(found))


def _refuse(problem: OSError) -> NoReturn:
    wrong = f"'{problem.filename}' cannot be read: {problem.strerror}."
    raise ImageError(wrong, "Check the path and its permissions.") from problem


def _items_of_npz(path: Path) -> tuple[ImageItem, ...]:
    try:
        values = _array(path)
    except Exception as error:  # NumPy's and zipfile's readers raise almost anything on damage
        raise ImageError(
            f"'{path}' cannot be read as an .npz of images: {error}.",
            "Save it with np.savez(path, images=array): uint8 (N, H, W) or (N, H, W, C), or "
            "normalised float32 (N, C, S, S).",
        ) from error
    return tuple(ImageItem(f"image {n} of '{path}'", value) for n, value in enumerate(values))


def _array(path: Path) -> Values:
    """Return the images of an archive: ``images``, or its only array.

    Raises:
        ValueError: they are no images, are pickled, or the file is a decompression bomb.
        KeyError: there are several arrays, and none is called so.
    """
    require_regular_file(path)
    size = path.stat().st_size
    with np.load(path, allow_pickle=False) as stored:
        unpacked = sum(entry.file_size for entry in stored.zip.infolist())
        if unpacked > max(ALWAYS_TAKEN_BYTES, MOST_UNPACKED * size):
            raise ValueError(f"it has {size:,} bytes and claims to unpack to {unpacked:,}")
        values: Values = stored[stored.files[0] if len(stored.files) == 1 else "images"]
    images = values.dtype == np.uint8 and values.ndim in {3, 4}
    inputs = values.dtype == np.float32 and values.ndim == 4 and np.isfinite(values).all()
    if not (values.size and (images or inputs)):
        raise ValueError(f"the images are {values.dtype} of shape {values.shape}, or not finite")
    return values


# --- decoding --------------------------------------------------------------------------------


def open_image(
    source: Path | str | bytes, *, channels: int = 3, name: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return an image, upright, fully decoded, in the mode of ``channels``; the first of frames.

    Every mode becomes grey (1 channel), RGB (3) or RGBA (4) as Pillow's ``convert`` (and so
    timm) does it: grey is repeated, CMYK converted, a palette looked up. Transparency is kept
    with 4 channels (an image without it is opaque) and dropped with 1 or 3. Two things are done
    before that: the EXIF orientation is applied, and 16-bit grey is scaled to 8 bits (Pillow
    alone would clip it to white).

    Args:
        source: a path, or the bytes of an image file.
        channels: 1, 3 or 4.
        name: what errors call the image, at the beginning of a sentence; by default its path.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        UsageError: no image has so many channels.
        ImageError: not an image, damaged, truncated, too large, or of a pixel
            type without an agreed range (32-bit integers, floats).
    """
    mode = preprocess.image_mode(channels)
    name = name or ("The image" if isinstance(source, bytes) else f"'{source}'")
    try:
        if not isinstance(source, bytes):
            require_regular_file(Path(source))
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=FORMATS) as image:
            return _converted(image, mode, max_pixels)
    except Exception as problem:  # Pillow's decoders raise almost anything on damaged files
        reason = getattr(problem, "strerror", "") or " ".join(str(problem).split()).rstrip(".")
        if isinstance(problem, UnidentifiedImageError):
            reason = "it is in no known image format"
        elif isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = f"it is too large to open safely, {reason}"
        wrong = f"{name} cannot be read as an image: {reason or type(problem).__name__}."
        raise ImageError(wrong, "Replace the file, make it smaller, or leave it out.") from problem


def _converted(image: Image.Image, mode: str, max_pixels: int) -> Image.Image:
    """Return an opened image upright, with 8 bits a channel, in ``mode``.

    Raises:
        DecompressionBombError: it has more than ``max_pixels``.
        ValueError: its pixels have no agreed range, or channels that Pillow drops.
    """
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise Image.DecompressionBombError(f"{size}, more than {max_pixels:,}")
    image.seek(0)
    tags = getattr(image, "tag_v2", {})
    if mode == "RGBA" and image.mode == "RGB" and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 3) > 3:
        raise ValueError("it has more than 3 channels, and none is marked as transparency")
    ImageOps.exif_transpose(image, in_place=True)  # which makes no copy where nothing is turned
    upright: Image.Image = image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        bits = np.ravel(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16))[0]
        largest = (1 << int(bits)) - 1  # what such a file can hold: 4095 for 12 bits
        values = np.asarray(image).astype(np.float64) * (255 / largest)
        upright = Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no agreed range")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
    if upright.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        upright = upright.convert("RGB")  # the others have no way to RGBA
    return upright.convert(mode)


def decode_item(item: ImageItem, channels: int = 3) -> Image.Image | None:
    """Return an item as an image in the mode of ``channels``; None for arrays that are none.

    Raises:
        UsageError: no image has so many channels.
        ImageError: it cannot be read.
    """
    if isinstance(item.data, Path):
        return open_image(item.data, channels=channels)
    values = item.data if item.data.ndim == 3 else item.data[:, :, None]
    if values.dtype != np.uint8 or values.shape[2] not in {1, 3, 4}:
        return None
    values = values[:, :, 0] if values.shape[2] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values)).convert(preprocess.image_mode(channels))


def item_values(item: ImageItem, preprocessing: Preprocessing) -> Values:
    """Return an item's pixels ``(H, W, C)`` uint8, or its network input ``(C, H, W)`` float32.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
        ImageError: it cannot be read.
    """
    image = decode_item(item, preprocessing.channels)
    if image is not None:
        return preprocess.pixels_from_image(image, preprocessing)
    values, channels = np.asarray(item.data), (preprocessing.channels,)
    bytes_ = values.dtype == np.uint8
    wanted = (*preprocessing.sides, *channels) if bytes_ else (*channels, *preprocessing.sides)
    if values.shape != wanted:
        raise UsageError(
            f"The {item.name} is an array of shape {values.shape}; the network takes {wanted}.",
            "Save it in the network's size; only uint8 images of 1, 3 or 4 channels are resized.",
        )
    return values


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Some images, ready for the network.

    Attributes:
        indices: which of the items they are.
        inputs: ``(n, C, H, W)`` float32, normalised; n may be 0.
        pixels: the same ``(n, H, W, C)`` uint8 before normalisation; None where an item is
            network input already.
        unreadable: index and reason of each item that could not be read.
        names: what each is called in a report, where images are to be checked on.
        description: all of them in one phrase.
    """

    indices: tuple[int, ...]
    inputs: npt.NDArray[np.float32]
    pixels: preprocess.Pixels | None
    unreadable: tuple[tuple[int, str], ...] = ()
    names: tuple[str, ...] = ()
    description: str = ""

    @classmethod
    def of(cls, values: Mapping[int, Values | str], preprocessing: Preprocessing) -> Batch:
        """Return the batch of what :func:`item_values` gave, by index, or why it did not."""
        good = {index: value for index, value in values.items() if not isinstance(value, str)}
        bad = tuple((index, value) for index, value in values.items() if isinstance(value, str))
        empty = np.empty((*preprocessing.sides, preprocessing.channels), np.uint8)
        stacked = np.stack([*good.values()] or [empty])[: len(good)]
        if stacked.dtype == np.uint8:
            return cls(tuple(good), preprocess.normalise(stacked, preprocessing), stacked, bad)
        return cls(tuple(good), stacked, None, bad)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.inputs)

    @property
    def values(self) -> Values:
        """The pixels where there are any, else the inputs."""
        return self.inputs if self.pixels is None else self.pixels


def decoded_batches(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    batch: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 1,
) -> Iterator[Batch]:
    """Yield the items in their order as network input, ``batch`` of them at a time.

    Pillow decodes and resizes without Python's lock, so threads are enough. At most
    :data:`AHEAD` batches wait. A batch is smaller by what could not be read.

    Args:
        items: the images.
        preprocessing: of the network.
        batch: items a batch, 1 or more.
        indices: which of the items; all by default.
        workers: threads.

    Raises:
        UsageError: the network's channels are not an image's, or an array is not of its size.
    """
    every = range(len(items)) if indices is None else indices
    groups = [every[start : start + batch] for start in range(0, len(every), batch)]

    def values(index: int) -> Values | str:
        try:
            return item_values(items[index], preprocessing)
        except ImageError as error:
            return error.message

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[Any] = deque()
        for group in (*groups, *[()] * AHEAD):
            waiting.append({index: pool.submit(values, index) for index in group})
            if len(waiting) > AHEAD:
                ready = {index: future.result() for index, future in waiting.popleft().items()}
                yield Batch.of(ready, preprocessing)
