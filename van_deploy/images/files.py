"""Image files: finding them, opening them as RGB, and their digests."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from van_deploy.documents import require_regular_file
from van_deploy.errors import ImageError
from van_deploy.files import file_sha256

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "file_digest", "find_images", "open_image"]

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# What the suffixes stand for; Pillow reads a camera's MPO as JPEG. No others are tried: it gives an
# EPS to Ghostscript, whatever the file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; Pillow's own warning limit
BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8


def find_images(folder: Path | str) -> tuple[Path, ...]:
    """Return the image files under ``folder``, at any depth, sorted by their path.

    Files are picked by suffix (:data:`IMAGE_SUFFIXES`, either case). Hidden
    files and folders are passed over. Symbolic links are followed, and a folder
    that was seen already is not entered again, so a loop of links ends.

    Raises:
        ImageError: the folder is missing, not a folder, not readable, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ImageError(f"The image folder '{folder}' does not exist.", "Check the path.")
    if not folder.is_dir():
        raise ImageError(f"'{folder}' is a file, not a folder.", "Pass the folder it lies in.")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
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


def _refuse_folder(problem: OSError) -> None:
    raise ImageError(
        f"The folder '{problem.filename}' cannot be read: {problem.strerror}.",
        "Check its permissions.",
    ) from problem


def open_image(
    source: Path | str | bytes, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return a picture as RGB, upright, fully decoded; the first frame of several.

    Every mode becomes RGB as Pillow's ``convert("RGB")`` (and so timm) does it:
    grey is repeated, CMYK converted, transparency dropped, a palette looked up.
    Two things are done before that: the EXIF orientation is applied, and 16-bit
    grey is scaled to 8 bits (Pillow alone would clip it to white).

    Args:
        source: a path, or the bytes of an image file.
        name: what errors call the picture; by default its path.
        max_pixels: more pixels than this are refused before they are decoded.

    Raises:
        ImageError: not an image, damaged, truncated, too large, or of a pixel
            type without an agreed range (32-bit integers, floats).
    """
    from PIL import Image

    name = name or ("the image" if isinstance(source, bytes) else f"'{source}'")
    try:
        if not isinstance(source, bytes):
            require_regular_file(Path(source))
        opened = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(opened, formats=FORMATS) as image:
            _refuse_large(image, name, max_pixels)
            return _rgb_from_image(image, name)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise _too_large(name, str(problem)) from problem
    except Exception as problem:  # Pillow's decoders raise almost anything on damaged files
        raise ImageError(
            f"{_capitalised(name)} cannot be read as an image: {_reason(problem)}.",
            "Replace the file or leave it out.",
        ) from problem


def _refuse_large(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise _too_large(name, f"{width} x {height} pixels, more than {max_pixels:,}")


def _too_large(name: str, reason: str) -> ImageError:
    return ImageError(
        f"{_capitalised(name)} is too large to open safely: {reason.rstrip('.')}.",
        "Make it smaller first: the network sees a few hundred pixels a side.",
    )


def _rgb_from_image(image: Image.Image, name: str) -> Image.Image:
    """Return an opened image as upright 8-bit RGB."""
    from PIL import ImageOps

    image.seek(0)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        upright = _eight_bits(ImageOps.exif_transpose(image), _largest_value(image))
    elif image.mode in {"I", "F"}:
        raise ImageError(
            f"{_capitalised(name)} holds 32-bit pixels (mode {image.mode}), "
            "which have no agreed range.",
            "Convert it to 8 or 16 bits a channel.",
        )
    else:
        upright = ImageOps.exif_transpose(image)
        if image.mode == "P" and "transparency" in image.info:
            upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
    return upright.convert("RGB")


def _eight_bits(image: Image.Image, largest: int) -> Image.Image:
    """Return integer grey ``0..largest`` as 8-bit grey, scaled and rounded."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64) * (255 / largest)
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


def _largest_value(image: Image.Image) -> int:
    """Return the largest value a 16-bit image's file can hold (12-bit TIFF: 4095)."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS_PER_SAMPLE, (16,))
    return (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1


def _reason(problem: Exception) -> str:
    """Return the problem in words, on one line and without the file's name."""
    from PIL import UnidentifiedImageError

    if isinstance(problem, UnidentifiedImageError):
        return "it is in no known image format"
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split()).rstrip(".")
    return text or type(problem).__name__


def _capitalised(name: str) -> str:
    return name[:1].upper() + name[1:]


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it a piece at a time.

    Raises:
        ImageError: the file cannot be read.
    """
    try:
        return file_sha256(Path(path))
    except OSError as problem:
        raise ImageError(
            f"'{path}' cannot be read: {problem.strerror}.", "Check the path and its permissions."
        ) from problem
