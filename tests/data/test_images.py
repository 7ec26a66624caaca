"""Listing and decoding of image files and arrays."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.each import each
from van_deploy.data.images import (
    Batch,
    ImageItem,
    ImageSet,
    decoded_batches,
    find_images,
    image_set,
    open_image,
)
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import Preprocessing, normalise, pixels_from_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    """Return a small colourful image."""
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 16))
    image = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    return image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)


def is_equal(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode and np.array_equal(np.asarray(first), np.asarray(second))


def for_channels(channels: int) -> Preprocessing:
    """Return the preprocessing of a network for 32 x 32 pixels."""
    return Preprocessing(32, (0.5,) * channels, (0.25,) * channels, "bilinear", 1.0, "a test")


# --- finding ---------------------------------------------------------------------------------


def test_find_images_recursively(tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    hidden = (".hidden.png", ".git/x.png", "notes.txt")
    for name in ("b/2.PNG", "b/1.jpeg", "a.webp", "b/c/3.tif", *hidden):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    (store / "folder.png").mkdir()
    found = [str(path.relative_to(store)) for path in find_images(str(store))]
    assert found == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/3.tif"]
    view.mkdir()
    links = {"linked": store / "b", "y.png": store / "a.webp", "gone.png": store / "nothing"}
    for name, target in {**links, "up": view, "self": view / "self"}.items():
        (view / name).symlink_to(target)
    names = ("linked/1.jpeg", "linked/2.PNG", "linked/c/3.tif", "y.png")
    assert find_images(view) == tuple(view / name for name in names)


@each(
    ("name", "message"),
    [
        ("nowhere", "'{}/nowhere' cannot be read: No such file or directory."),
        ("notes.txt", "'{}/notes.txt' cannot be read: Not a directory."),
        (".", "There is no image in '{}' or its subfolders."),
    ],
)
def test_invalid_folders(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError) as error:
        find_images(tmp_path / name)
    assert error.value.message == message.format(tmp_path)


def test_class_folders_and_subsample(tmp_path: Path) -> None:
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/x/a.png", "dog/c.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(tmp_path / name)
    for folder in ("emu", ".hidden"):
        (tmp_path / folder).mkdir()
    images = image_set(str(tmp_path))
    assert [(i.name, i.group) for i in images.items] == [
        *(("cat/a.png", "cat"), ("cat/b.png", "cat")),
        *(("dog/c.png", "dog"), ("dog/x/a.png", "dog")),
    ]
    assert (images.folders, images.labels) == (("cat", "dog", "emu"), None)
    part = images.with_labels([3, 1, 0, 2], "by hand").subsample(2)
    assert [item.label for item in part.items] == [3, 2]
    assert part.description == f"4 images of '{tmp_path}', by hand; 2 of 4, evenly spread"
    content = (tmp_path / "cat" / "a.png").read_bytes()
    assert images.items[0].digest == hashlib.sha256(content).hexdigest()
    assert len({images.digest, part.digest, images.take([1, 0, 2, 3]).digest}) == 3
    with pytest.raises(ImageError, match="gone' cannot be read: No such file"):
        _ = ImageItem("gone", tmp_path / "gone").digest


# --- arrays ----------------------------------------------------------------------------------


def save_npz(path: Path, **arrays: Any) -> ImageSet:
    np.savez(path / "x.npz", **arrays)
    return image_set(path / "x.npz")


THREE = np.zeros((3, 4, 4), np.uint8)


@each("values", [THREE, np.zeros((3, 5, 7, 13), np.uint8), np.zeros((3, 2, 32, 32), np.float32)])
def test_npz_arrays(values: Any, tmp_path: Path) -> None:
    images = save_npz(tmp_path, images=values, others=np.zeros(3))
    assert images.items[1].name == f"image 1 of '{tmp_path}/x.npz'"
    assert (images.root, images.description) == (None, f"3 images of '{tmp_path}/x.npz'")
    assert len(save_npz(tmp_path, anything=values)) == 3


@each(
    ("arrays", "message"),
    [
        ({"images": np.zeros((4, 5))}, "float64 of shape (4, 5)"),
        ({"a": THREE, "b": THREE}, "images"),
        ({"images": THREE[:0]}, "shape (0, 4, 4)"),
        ({"images": np.full((1, 3, 4, 4), np.nan, np.float32)}, "not finite"),
        ({"images": np.array([None])}, "Object arrays cannot be loaded"),
    ],
)
def test_invalid_npz_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"x\.npz' cannot be read as an \.npz of images") as error:
        save_npz(tmp_path, **arrays)
    assert message in error.value.message


def test_damaged_npz_and_decompression_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("no zip")
    with pytest.raises(ImageError, match=r"cannot be read as an \.npz of images"):
        image_set(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(257 * 2**20))
    with pytest.raises(ImageError, match="bytes and would unpack to 269,484,032"):
        image_set(path)


# --- decoding --------------------------------------------------------------------------------


@each("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encode(gradient(), kind))
    for source in (path, str(path), path.read_bytes()):
        assert is_equal(open_image(source), gradient())


@each("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_modes_are_converted_as_in_pillow(mode: str) -> None:
    image = gradient(mode)
    data = encode(image, "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG")
    opened, four = open_image(data), np.asarray(open_image(data, channels=4))
    assert opened.mode == "RGB"
    if mode != "I;16":  # which Pillow clips
        assert is_equal(opened, image.convert("RGB"))
    assert (four[..., 3] == 255).all()
    assert np.array_equal(four[..., :3], np.asarray(opened))


def palette() -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([*RED, *BLUE])
    return encode(image, transparency=b"\x00\x80")


@each(
    ("data", "colour"),
    [
        (palette(), (*BLUE, 128)),
        (encode(Image.new("LA", (4, 4), (9, 7))), (9, 9, 9, 7)),
        (encode(Image.new("RGB", (4, 4), RED), transparency=RED), (*RED, 0)),
        (encode(Image.new("RGBA", (4, 4), (*RED, 9))), (*RED, 9)),
    ],
)
def test_transparency(data: bytes, colour: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data, channels=4).getcolors() == [(16, colour)]
        assert open_image(data).getcolors() == [(16, colour[:3])]
        assert open_image(data, channels=1).mode == "L"


def test_fourth_channel_without_transparency_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nir.tif"  # its ExtraSamples are "unspecified", such as near infrared
    gradient("RGBX").save(path)
    assert open_image(path).mode == "RGB"
    with pytest.raises(ImageError, match="its 4th channel is not marked as transp"):
        open_image(path, channels=4)


def twelve_bits() -> bytes:
    """Return a TIFF of 4095 and 2048, packed."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 12) + bytes([0xFF, 0xF8, 0x00]) + b"\0" + directory


SIXTEEN = np.array([[0, 257, 1000], [32896, 65407, 65535]], np.uint16)
BIG = Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes())
BIG_TAGS = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")


@each(
    ("data", "values"),
    [
        (encode(Image.fromarray(SIXTEEN)), [[0, 1, 4], [128, 255, 255]]),
        (encode(Image.fromarray(SIXTEEN), "TIFF"), [[0, 1, 4], [128, 255, 255]]),
        (encode(BIG, "TIFF", tiffinfo=BIG_TAGS), [[0, 1, 4], [128, 255, 255]]),
        (twelve_bits(), [[255, 128]]),
    ],
)
def test_16_bit_grey_is_scaled(data: bytes, values: Any) -> None:
    opened = np.asarray(open_image(data))
    assert opened[..., 0].tolist() == values
    assert np.array_equal(opened[..., 0], opened[..., 2])


def test_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise by 90 degrees
    sideways = gradient().transpose(Image.Transpose.ROTATE_90)
    assert is_equal(open_image(encode(sideways, exif=exif)), gradient())


@each("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getcolors() == [(64, RED)]


# --- refusals --------------------------------------------------------------------------------


@each("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_images(kind: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / f"cut.{kind.lower()}"
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as error:
        open_image(path)
    assert error.value.message.startswith(f"'{path}' cannot be read as an image: ")
    assert "\n" not in error.value.message
    small = np.frombuffer(encode(gradient(), kind), np.uint8)
    for _ in range(40):
        damaged = small.copy()
        damaged[rng.integers(0, len(small), 6)] = rng.integers(0, 256, 6)
        with warnings.catch_warnings(), contextlib.suppress(ImageError):
            warnings.simplefilter("ignore")  # Pillow warns of damaged metadata
            assert open_image(damaged.tobytes()).mode == "RGB"


UNKNOWN = "it is in no known image format"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
DEEP = [encode(Image.fromarray(np.ones((2, 2), kind)), "TIFF") for kind in (np.int32, np.float32)]


@each(
    ("content", "reason"),
    [
        *((content, UNKNOWN) for content in (b"", b"<html>", b"\x89PNG\r\n\x1a\n" + bytes(40))),
        (EPS, UNKNOWN),  # Pillow would run Ghostscript on it, whatever the file is called
        *((None, reason) for reason in ("No such file or directory", "it is not a regular file")),
        *((content, "is undefined") for content in DEEP),
    ],
)
def test_invalid_files(content: Any, reason: str, tmp_path: Path, monkeypatch: Any) -> None:
    def ran(*arguments: object, **_: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("subprocess.Popen", ran)
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    elif "regular" in reason:
        os.mkfifo(path)  # must not block
    with pytest.raises(ImageError, match=rf"cannot be read as an image: .*{reason}"):
        open_image(path)


def bomb(side: int) -> bytes:
    """Return a tiny PNG that claims to be ``side`` x ``side``."""
    data = bytearray(encode(Image.new("1", (1, 1))))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


@each("filtered", ["error", "ignore"])  # Pillow's own limit is a warning
@each("side", [9_500, 20_000, 2_000_000])
def test_decompression_bomb(side: int, filtered: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(filtered)
        with pytest.raises(ImageError, match=r"'bomb.png' cannot .* too large to open safely"):
            open_image(bomb(side), name="'bomb.png'")
    data = encode(gradient())
    assert open_image(data, max_pixels=384).size == (24, 16)
    with pytest.raises(ImageError, match=r"The image .* 24 x 16 pixels, more than 383"):
        open_image(data, max_pixels=383)


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of five readable images with different brightness and two damaged ones."""
    for index in range(7):
        data = encode(Image.new("RGB", (40, 36), (10 * index,) * 3))
        (tmp_path / f"{index}.png").write_bytes(data[:20] if index in {1, 6} else data)
    return tmp_path


@each("workers", [1, 3])
def test_batches_and_unreadable_images(folder: Path, workers: int) -> None:
    items = image_set(folder).items
    batches = list(decoded_batches(items, for_channels(3), 2, workers=workers))
    assert [batch.indices for batch in batches] == [(0,), (2, 3), (4, 5), ()]
    assert [batch.inputs.shape for batch in batches] == [(n, 3, 32, 32) for n in (1, 2, 2, 0)]
    shades = [int(p.max()) for b in batches if b.pixels is not None for p in b.pixels]
    assert shades == [0, 20, 30, 40, 50]
    bad = [pair for batch in batches for pair in batch.unreadable]
    assert [index for index, _ in bad] == [1, 6]
    assert bad[0][1].startswith(f"'{folder}/1.png' cannot be read as an image: ")
    chosen = list(decoded_batches(items, for_channels(3), 2, indices=[5, 0, 3]))
    assert [batch.indices for batch in chosen] == [(5, 0), (3,)]


def test_files_and_arrays_give_equal_input(folder: Path) -> None:
    path = folder / "4.png"
    pixels = np.asarray(Image.open(path))
    for channels in (1, 3, 4):
        preprocessing = for_channels(channels)
        (batch,) = decoded_batches([ImageItem("file", path)], preprocessing, 1)
        assert batch.pixels is not None
        assert batch.values is batch.pixels
        image = open_image(path, channels=channels)
        assert np.array_equal(batch.pixels[0], pixels_from_image(image, preprocessing))
        assert np.array_equal(batch.inputs, normalise(batch.pixels, preprocessing))
        for values in (pixels, pixels[..., 0], pixels[..., :1]):  # colour and two ways of grey
            (other,) = decoded_batches([ImageItem("array", values)], preprocessing, 1)
            assert np.array_equal(other.inputs, batch.inputs)


def test_arrays_of_other_channels_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 13), dtype=np.uint8)
    values = rng.standard_normal((13, 32, 32)).astype(np.float32)
    items = [ImageItem("pixels", pixels), ImageItem("input", values)]
    first, second = decoded_batches(items, for_channels(13), 1)
    assert np.array_equal(first.values[0], pixels)
    assert np.array_equal(first.inputs, normalise(pixels[None], for_channels(13)))
    assert second.pixels is None
    assert np.array_equal(second.values[0], values)
    for wrong in (np.zeros((3, 16, 16), np.float32), np.zeros((32, 32, 5), np.uint8)):
        with pytest.raises(UsageError, match=r"The x is an array of shape .*; the network takes"):
            list(decoded_batches([ImageItem("x", wrong)], for_channels(13), 1))
    empty = Batch.stack({0: "gone"}, for_channels(3))
    assert (empty.inputs.shape, empty.unreadable) == ((0, 3, 32, 32), ((0, "gone"),))
