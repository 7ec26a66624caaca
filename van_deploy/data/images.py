"""Read images from a folder or an ``.npz`` and convert them to network input.

``quantize``, ``evaluate``, ``predict``, ``serve`` and the checks all use this module, so that they
have the same pixels: EXIF orientation applied, 8 bits per channel, the network's number of
channels, then resized and cropped by its preprocessing.
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

# The only formats that Pillow may detect (MPO is read as JPEG): for others it would start
# programs, such as Ghostscript for EPS, whatever the suffix.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# An .npz may unpack to this multiple of its size (recorded ranges have 5), or at least these bytes.
MAX_UNPACK_RATIO, MIN_UNPACK_LIMIT_BYTES = 100, 256 * 2**20
# Batches decoded in advance: enough to hide one slow file, with bounded memory.
PREFETCH_BATCHES = 3

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageItem:
    """One image that is not loaded yet.

    Attributes:
        name: in reports; of a file, its path relative to the image folder, with slashes.
        data: a file, or an array: ``(H, W)`` or ``(H, W, C)`` uint8, or normalised network
            input ``(C, S, S)`` float32.
        group: name of its class folder; "" if there is none.
        label: index of its class, or None if unknown.
    """

    name: str
    data: Path | Values
    group: str = ""
    label: int | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its file, or of an array's shape and values.

        Raises:
            ImageError: the file cannot be read.
        """
        if not isinstance(self.data, Path):
            return hashlib.sha256(f"{self.data.shape}".encode() + self.data.tobytes()).hexdigest()
        try:
            return file_sha256(self.data)
        except OSError as error:
            _raise_read_error(error)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        items: the images.
        description: of the images and the source of their labels, for reports and manifests.
        root: their folder; None for arrays.
        folders: the direct subfolders of ``root``, including those without images.
        noise: whether they are random noise instead of images.
    """

    items: tuple[ImageItem, ...]
    description: str
    root: Path | None = None
    folders: tuple[str, ...] = ()
    noise: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """The class indices ``(N,)``, or None if an image has no label."""
        labels = [item.label for item in self.items]
        return None if None in labels else np.array(labels, np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 of the images' contents, in order."""
        return content_key({"images": [item.digest for item in self.items]})

    def take(self, indices: Sequence[int], description: str = "") -> ImageSet:
        """Return the images at ``indices``, in that order."""
        items = tuple(self.items[int(index)] for index in indices)
        return replace(self, items=items, description=description or self.description)

    def subsample(self, limit: int) -> ImageSet:
        """Return at most ``limit`` images, spread evenly."""
        if limit >= len(self):
            return self
        description = f"{self.description}; {limit} of {len(self)}, evenly spread"
        return self.take(np.linspace(0, len(self) - 1, limit).astype(int).tolist(), description)

    def with_labels(self, labels: Sequence[int], source: str) -> ImageSet:
        """Return the images with labels, whose ``source`` is added to the description."""
        pairs = zip(self.items, labels, strict=True)
        items = tuple(replace(item, label=int(label)) for item, label in pairs)
        return replace(self, items=items, description=f"{self.description}, {source}")


# --- listing ---------------------------------------------------------------------------------


def image_set(path: Path | str | ImageSet) -> ImageSet:
    """Return the images of a folder, at any depth and sorted by path, or of an ``.npz``.

    An ``ImageSet`` is returned unchanged. An ``.npz`` has an array ``images``, or only one array:
    uint8 ``(N, H, W)`` or ``(N, H, W, C)``, or normalised float32 ``(N, C, S, S)``.

    Raises:
        ImageError: there is no image, or the path cannot be read.
    """
    if isinstance(path, ImageSet):
        return path
    path = Path(path)
    if path.suffix == ".npz":
        items = _load_npz_items(path)
        return ImageSet(items, f"{len(items)} images of '{path}'")
    pairs = [(file, file.relative_to(path)) for file in find_images(path)]
    items = tuple(ImageItem(n.as_posix(), file, "".join(n.parts[:-1][:1])) for file, n in pairs)
    folders = sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    return ImageSet(items, f"{len(items)} images of '{path}'", path, tuple(folders))


def find_images(folder: Path | str) -> tuple[Path, ...]:
    """Return the image files under ``folder``, at any depth, sorted by their path.

    Files are selected by suffix (:data:`SUFFIXES`, in either case). Hidden files and folders are
    ignored. Symbolic links are followed, except to a folder that contains them.

    Raises:
        ImageError: the folder does not exist, is not a folder, cannot be read, or has no image.
    """
    images, root = list[Path](), Path(folder)
    chains: dict[str, tuple[str, ...]] = {}  # the real paths of each folder and those above it
    for parent, folders, files in os.walk(root, onerror=_raise_read_error, followlinks=True):
        above, real_path = chains.get(os.path.dirname(parent), ()), os.path.realpath(parent)
        chains[parent], is_cycle = (*above, real_path), real_path in above
        folders[:] = [] if is_cycle else [name for name in folders if name[0] != "."]
        paths = [Path(parent, name) for name in files if name[0] != "." and not is_cycle]
        images += [p for p in paths if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not images:
        message = f"There is no image in '{folder}' or its subfolders."
        raise ImageError(message, f"Pass a folder with files ending in {', '.join(SUFFIXES)}.")
    return tuple(sorted(images))


def _raise_read_error(error: OSError) -> NoReturn:
    message = f"'{error.filename}' cannot be read: {error.strerror}."
    is_file = isinstance(error, NotADirectoryError)
    remedy = "Give a folder or an .npz file." if is_file else "Check the path and its permissions."
    raise ImageError(message, remedy) from error


def _load_npz_items(path: Path) -> tuple[ImageItem, ...]:
    try:
        values = _load_npz_array(path)
    except Exception as error:  # damaged files make NumPy and zipfile raise many types
        raise ImageError(
            f"'{path}' cannot be read as an .npz of images: {error}.",
            "Save it with np.savez(path, images=array): uint8 (N, H, W) or (N, H, W, C), or "
            "normalised float32 (N, C, S, S).",
        ) from error
    return tuple(ImageItem(f"image {n} of '{path}'", value) for n, value in enumerate(values))


def _load_npz_array(path: Path) -> Values:
    """Return the array ``images`` of an ``.npz``, or its only array.

    Raises:
        ValueError: the array is not of images, is pickled, or the file is a decompression bomb.
        KeyError: there are several arrays, and none is named ``images``.
    """
    require_regular_file(path)
    size = path.stat().st_size
    with np.load(path, allow_pickle=False) as stored:
        unpacked = sum(entry.file_size for entry in stored.zip.infolist())
        if unpacked > max(MIN_UNPACK_LIMIT_BYTES, MAX_UNPACK_RATIO * size):
            raise ValueError(f"it has {size:,} bytes and would unpack to {unpacked:,}")
        values: Values = stored[stored.files[0] if len(stored.files) == 1 else "images"]
    is_images = values.dtype == np.uint8 and values.ndim in {3, 4}
    is_input = values.dtype == np.float32 and values.ndim == 4 and np.isfinite(values).all()
    if not (values.size and (is_images or is_input)):
        raise ValueError(f"the array is {values.dtype} of shape {values.shape}, or not finite")
    return values


# --- decoding --------------------------------------------------------------------------------


def open_image(
    source: Path | str | bytes, *, channels: int = 3, name: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the first frame of an image, decoded, with the mode of ``channels``.

    Every mode is converted to grey (1 channel), RGB (3) or RGBA (4) with Pillow's ``convert``, as
    in timm: grey is repeated, CMYK converted, a palette looked up. Transparency is kept with
    4 channels (opaque if the image has none) and dropped with 1 or 3. Before the conversion, the
    EXIF orientation is applied and 16-bit grey is scaled to 8 bits (Pillow would clip it).

    Args:
        source: a path, or the bytes of an image file.
        channels: 1, 3 or 4.
        name: of the image at the beginning of error messages; by default its path.
        max_pixels: images with more pixels are refused before decoding.

    Raises:
        UsageError: ``channels`` is not 1, 3 or 4.
        ImageError: not an image, damaged, truncated, too large, or of a pixel
            type without a defined range (32-bit integers, floats).
    """
    mode = preprocess.image_mode(channels)
    name = name or ("The image" if isinstance(source, bytes) else f"'{source}'")
    try:
        if not isinstance(source, bytes):
            require_regular_file(Path(source))
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(stream, formats=FORMATS) as image:
            return _convert(image, mode, max_pixels)
    except Exception as error:  # damaged files make Pillow raise many types
        reason = getattr(error, "strerror", "") or " ".join(str(error).split()).rstrip(".")
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no known image format"
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            reason = f"it is too large to open safely, {reason}"
        message = f"{name} cannot be read as an image: {reason or type(error).__name__}."
        raise ImageError(message, "Replace the file, make it smaller, or remove it.") from error


def _convert(image: Image.Image, mode: str, max_pixels: int) -> Image.Image:
    """Return an image with its EXIF orientation applied, converted to ``mode``.

    Raises:
        DecompressionBombError: it has more than ``max_pixels``.
        ValueError: the range of its pixels is undefined, or Pillow would drop a channel.
    """
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height} pixels"
        raise Image.DecompressionBombError(f"{size}, more than {max_pixels:,}")
    image.seek(0)
    tags = getattr(image, "tag_v2", {})
    if mode == "RGBA" and image.mode == "RGB" and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 3) > 3:
        raise ValueError("its 4th channel is not marked as transparency")
    ImageOps.exif_transpose(image, in_place=True)  # makes no copy if there is nothing to do
    upright: Image.Image = image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        bits = np.ravel(tags.get(TiffImagePlugin.BITSPERSAMPLE, 16))[0]
        white = (1 << int(bits)) - 1  # 4095 for 12 bits
        values = np.asarray(image).astype(np.float64) * (255 / white)
        if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white
            values = 255 - values
        upright = Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise ValueError(f"the range of 32-bit pixels (mode {image.mode}) is undefined")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # Pillow warns on a direct conversion to RGB
    if upright.mode not in {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}:
        upright = upright.convert("RGB")  # other modes have no direct conversion to RGBA
    return upright.convert(mode)


def decode_item(item: ImageItem, channels: int = 3) -> Image.Image | None:
    """Return an item as an image with the mode of ``channels``; None for other arrays.

    Raises:
        UsageError: ``channels`` is not 1, 3 or 4.
        ImageError: it cannot be read.
    """
    if isinstance(item.data, Path):
        return open_image(item.data, channels=channels)
    values = item.data if item.data.ndim == 3 else item.data[:, :, None]
    if values.dtype != np.uint8 or values.shape[2] not in {1, 3, 4}:
        return None
    values = values[:, :, 0] if values.shape[2] == 1 else values
    return Image.fromarray(np.ascontiguousarray(values)).convert(preprocess.image_mode(channels))


def load_item(item: ImageItem, preprocessing: Preprocessing) -> Values:
    """Return an item's pixels ``(H, W, C)`` uint8, or its network input ``(C, H, W)`` float32.

    Raises:
        UsageError: an image file cannot have the network's number of channels, or an array has
            another shape than the network's input.
        ImageError: it cannot be read.
    """
    image = decode_item(item, preprocessing.channels)
    if image is not None:
        return preprocess.pixels_from_image(image, preprocessing)
    values, (height, width) = np.asarray(item.data), preprocessing.sides
    shape = (preprocessing.channels, height, width)
    shape = (height, width, preprocessing.channels) if values.dtype == np.uint8 else shape
    if values.shape != shape:
        message = f"The {item.name} is an array of shape {values.shape}; the network takes {shape}."
        remedy = "Save it in the network's size; uint8 images of 1, 3 or 4 channels are resized."
        raise UsageError(message, remedy)
    return values


# --- batches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch of network input.

    Attributes:
        indices: of its items.
        inputs: ``(n, C, H, W)`` float32, normalised; n may be 0.
        pixels: the same ``(n, H, W, C)`` uint8 before normalisation; None if the items are
            normalised arrays.
        unreadable: index and reason of each item that could not be read.
        names: of the images in reports, for :func:`~van_deploy.data.samples.verification_images`.
        description: of all images in one phrase.
    """

    indices: tuple[int, ...]
    inputs: npt.NDArray[np.float32]
    pixels: preprocess.Pixels | None
    unreadable: tuple[tuple[int, str], ...] = ()
    names: tuple[str, ...] = ()
    description: str = ""

    @classmethod
    def stack(cls, values: Mapping[int, Values | str], preprocessing: Preprocessing) -> Batch:
        """Return a batch of values of :func:`load_item` by index; a ``str`` is a read error."""
        arrays = {index: value for index, value in values.items() if not isinstance(value, str)}
        errors = tuple((index, value) for index, value in values.items() if isinstance(value, str))
        empty = np.empty((*preprocessing.sides, preprocessing.channels), np.uint8)
        stacked = np.stack([*arrays.values()] or [empty])[: len(arrays)]
        if stacked.dtype == np.uint8:
            normalised = preprocess.normalise(stacked, preprocessing)
            return cls(tuple(arrays), normalised, stacked, errors)
        return cls(tuple(arrays), stacked, None, errors)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.inputs)

    @property
    def values(self) -> Values:
        """The pixels, or the inputs if there are no pixels."""
        return self.inputs if self.pixels is None else self.pixels


def decoded_batches(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    batch: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 1,
) -> Iterator[Batch]:
    """Yield the items in order as network input, in batches of ``batch`` items.

    Threads are enough, since Pillow releases the GIL to decode and resize. At most
    :data:`PREFETCH_BATCHES` batches are decoded in advance. Unreadable items are omitted from
    their batch.

    Args:
        items: the images.
        preprocessing: of the network.
        batch: items per batch, 1 or more.
        indices: of the items to use; by default all.
        workers: number of threads.

    Raises:
        UsageError: an item does not match the network's channels or input shape.
    """
    every = range(len(items)) if indices is None else indices
    groups = [every[start : start + batch] for start in range(0, len(every), batch)]

    def load(index: int) -> Values | str:
        try:
            return load_item(items[index], preprocessing)
        except ImageError as error:
            return error.message

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="decode") as pool:
        waiting: deque[Any] = deque()
        for group in (*groups, *[()] * PREFETCH_BATCHES):
            waiting.append({index: pool.submit(load, index) for index in group})
            if len(waiting) > PREFETCH_BATCHES:
                values = {index: future.result() for index, future in waiting.popleft().items()}
                yield Batch.stack(values, preprocessing)
