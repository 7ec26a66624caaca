"""Listing and decoding of images, sample images, and images to verify a network with."""

import contextlib
import hashlib
import importlib.util
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
from PIL import Image, ImageOps, TiffImagePlugin

from tests.data.conftest import Make, for_channels
from tests.each import each
from tests.errors import error_of
from van_deploy.data.images import (
    Batch,
    ImageItem,
    ImageSet,
    decode_item,
    decoded_batches,
    find_images,
    image_set,
    open_image,
)
from van_deploy.data.samples import (
    dead_leaves_image,
    digits_set,
    noise_set,
    sample_set,
    verification_images,
)
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import normalise, pixels_from_image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    """Return a small colourful image."""
    x, y = np.meshgrid(np.linspace(0, 255, 24), np.linspace(0, 255, 16))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)).convert(mode)


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
    links |= {"again": store / "b/c", "up": view, "self": view / "self"}
    for name, target in links.items():
        (view / name).symlink_to(target)
    (store / "b" / "back").symlink_to(view)  # a cycle of two folders
    names = ("again/3.tif", "linked/1.jpeg", "linked/2.PNG", "linked/c/3.tif", "y.png")
    assert find_images(view) == tuple(view / name for name in names)


def test_invalid_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for name, reason in (("gone", "No such file or directory"), ("notes.txt", "Not a directory")):
        message = error_of(ImageError, find_images, tmp_path / name).message
        assert message == f"'{tmp_path}/{name}' cannot be read: {reason}."
    message = error_of(ImageError, find_images, tmp_path).message
    assert message == f"There is no image in '{tmp_path}' or its subfolders."


def test_class_folders_and_subsample(make: Make) -> None:
    names = ("cat/a.png", "cat/b.png", "dog/c.png", "dog/x/a.png")
    root = make(*names, empty=("emu", ".hidden"))
    images = image_set(str(root))
    assert [(i.name, i.group) for i in images.items] == [(name, name[:3]) for name in names]
    assert (images.folders, images.labels) == (("cat", "dog", "emu"), None)
    part = images.with_labels([3, 1, 0, 2], "by hand").subsample(2)
    assert [item.label for item in part.items] == [3, 2]
    assert part.description == f"4 images of '{root}', by hand; 2 of 4, evenly spread"
    content = (root / "cat" / "a.png").read_bytes()
    assert images.items[0].digest == hashlib.sha256(content).hexdigest()
    assert len({ImageItem("", THREE[0].reshape(shape)).digest for shape in ((4, 4), (2, 8))}) == 2
    assert len({images.digest, part.digest, images.take([1, 0, 2, 3]).digest}) == 3
    with pytest.raises(ImageError, match="gone' cannot be read: No such file"):
        _ = ImageItem("gone", root / "gone").digest


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
    error = error_of(ImageError, save_npz, tmp_path, **arrays)
    assert "x.npz' cannot be read as an .npz of images" in error.message
    assert message in error.message


def test_damaged_npz_and_decompression_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("no zip")
    assert "as an .npz of images" in error_of(ImageError, image_set, path).message
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", bytes(257 * 2**20))
    error = error_of(ImageError, image_set, path)
    assert "bytes and would unpack to 269,484,032" in error.message


# --- decoding --------------------------------------------------------------------------------


def twelve_bits() -> bytes:
    """Return a TIFF of 4095 and 2048, packed."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 12) + bytes([0xFF, 0xF8, 0x00]) + b"\0" + directory


SIXTEEN = np.array([[0, 257, 1000], [32896, 65407, 65535]], np.uint16)
BIG = Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes())
BIG_TAGS = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
# the tag PhotometricInterpretation of a TIFF: 0 is black, or white
BLACK, WHITE = (struct.pack("<HHIH", 262, 3, 1, value) for value in (1, 0))
SCALED = Image.fromarray(np.array([[0, 1, 4], [128, 255, 255]], np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotate clockwise by 90 degrees
FIRST, SECOND = (Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE))
ANIMATION: dict[str, Any] = {"save_all": True, "append_images": [SECOND]}


@each(
    ("data", "expected"),
    [
        *((encode(gradient(), kind), gradient()) for kind in ("PNG", "BMP", "TIFF", "PPM")),
        *((encode(gradient(mode)), gradient(mode)) for mode in ("1", "L", "LA", "P", "RGBA")),
        *((encode(gradient(mode), "TIFF"), gradient(mode)) for mode in ("CMYK", "YCbCr")),
        (encode(gradient().transpose(Image.Transpose.ROTATE_90), exif=EXIF), gradient()),
        *((encode(FIRST, kind, **ANIMATION), FIRST) for kind in ("GIF", "PNG", "TIFF")),
        (encode(FIRST, "WEBP", lossless=True, **ANIMATION), FIRST),
        (encode(Image.fromarray(SIXTEEN)), SCALED),
        (encode(Image.fromarray(SIXTEEN), "TIFF"), SCALED),
        (encode(BIG, "TIFF", tiffinfo=BIG_TAGS), SCALED),
        (encode(Image.fromarray(SIXTEEN), "TIFF").replace(BLACK, WHITE), ImageOps.invert(SCALED)),
        (b"P5 3 2 65535\n" + SIXTEEN.astype(">u2").tobytes(), SCALED),
        (twelve_bits(), Image.fromarray(np.array([[255, 128]], np.uint8))),
    ],
)
def test_decoded_pixels(data: bytes, expected: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    for source in (path, str(path), data):
        opened, four = open_image(source), np.asarray(open_image(source, channels=4))
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), np.asarray(expected.convert("RGB")))
        assert np.array_equal(four[..., :3], np.asarray(opened))
        assert (four[..., 3] == 255).all()


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
    assert open_image(data, channels=4).getcolors() == [(16, colour)]
    assert open_image(data).getcolors() == [(16, colour[:3])]
    assert open_image(data, channels=1).mode == "L"


def test_fourth_channel_without_transparency_is_refused() -> None:
    data = encode(gradient("RGBX"), "TIFF")  # its ExtraSamples are "unspecified": near infrared
    assert open_image(data).mode == "RGB"
    message = error_of(ImageError, open_image, data, channels=4).message
    assert "its 4th channel is not marked as transp" in message


# --- refusals --------------------------------------------------------------------------------


@each("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_images(kind: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(1), tmp_path / f"cut.{kind.lower()}"
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    path.write_bytes(data[: len(data) // 2])
    message = error_of(ImageError, open_image, path).message
    assert message.startswith(f"'{path}' cannot be read as an image: ")
    assert "\n" not in message
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
        *((content, "is undefined") for content in DEEP),
        ("gone.png", "No such file or directory"),
        ("fifo.png", "it is not a regular file"),  # and must not block
    ],
)
def test_invalid_files(content: Any, reason: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    os.mkfifo(tmp_path / "fifo.png")
    path = tmp_path / (content if isinstance(content, str) else "x.png")
    if isinstance(content, bytes):
        path.write_bytes(content)
    message = error_of(ImageError, open_image, path).message
    assert f"{path}' cannot be read as an image: " in message
    assert reason in message


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


@each("workers", [1, 3])
def test_batches_and_unreadable_images(workers: int, tmp_path: Path) -> None:
    for index in range(7):
        data = encode(Image.new("RGB", (40, 36), (10 * index,) * 3))
        (tmp_path / f"{index}.png").write_bytes(data[:20] if index in {1, 6} else data)
    items = image_set(tmp_path).items
    batches = list(decoded_batches(items, for_channels(), 2, workers=workers))
    assert [batch.indices for batch in batches] == [(0,), (2, 3), (4, 5), ()]
    assert [batch.inputs.shape for batch in batches] == [(n, 3, 32, 32) for n in (1, 2, 2, 0)]
    shades = [int(pixels.max()) for batch in batches for pixels in batch.values]
    assert shades == [0, 20, 30, 40, 50]
    bad = [pair for batch in batches for pair in batch.unreadable]
    assert [index for index, _ in bad] == [1, 6]
    assert bad[0][1].startswith(f"'{tmp_path}/1.png' cannot be read as an image: ")
    chosen = list(decoded_batches(items, for_channels(), 2, indices=[5, 0, 3]))
    assert [batch.indices for batch in chosen] == [(5, 0), (3,)]


@each("channels", [1, 3, 4])
def test_files_and_arrays_give_equal_input(channels: int, tmp_path: Path) -> None:
    path, preprocessing = tmp_path / "x.png", for_channels(channels)
    grey = gradient("L")
    grey.convert("RGB").save(path)
    (batch,) = decoded_batches([ImageItem("file", path)], preprocessing, 1)
    assert batch.values is batch.pixels
    image = open_image(path, channels=channels)
    assert np.array_equal(batch.values[0], pixels_from_image(image, preprocessing))
    assert np.array_equal(batch.inputs, normalise(batch.values, preprocessing))
    for mode, shape in (("RGB", (16, 24, 3)), ("L", (16, 24)), ("L", (16, 24, 1))):
        values = np.asarray(grey.convert(mode)).reshape(shape)
        (other,) = decoded_batches([ImageItem("array", values)], preprocessing, 1)
        assert np.array_equal(other.inputs, batch.inputs)


def test_arrays_of_other_shapes_are_refused() -> None:
    for wrong in (np.zeros((13, 16, 16), np.float32), np.zeros((32, 32, 5), np.uint8)):
        with pytest.raises(UsageError, match=r"The x is an array of shape .*; the network takes"):
            list(decoded_batches([ImageItem("x", wrong)], for_channels(13), 1))
    empty = Batch.stack({0: "gone"}, for_channels())
    assert (empty.inputs.shape, empty.unreadable) == ((0, 3, 32, 32), ((0, "gone"),))


# --- sample images ---------------------------------------------------------------------------


def spectral_slope(image: Any) -> float:
    """Return the exponent of an image's power spectrum over spatial frequency."""
    grey = np.asarray(image, dtype=np.float64).mean(axis=2)
    side = min(grey.shape)
    window = np.outer(np.hanning(side), np.hanning(side))
    grey = (grey[:side, :side] - grey[:side, :side].mean()) * window
    power = np.abs(np.fft.fft2(grey)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    edges = np.geomspace(4 / side, 0.4, 20)
    ring = np.digitize(frequency.ravel(), edges)
    mean = [power.ravel()[ring == i].mean() for i in range(1, len(edges))]
    return float(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0])


def test_sample_photographs() -> None:
    if not any(map(importlib.util.find_spec, ("skimage", "sklearn"))):
        pytest.skip("neither scikit-image nor scikit-learn is installed")
    samples = sample_set()
    names = [item.name for item in samples.items]
    assert samples.description == f"{len(names)} natural photographs: {', '.join(names)}"
    images = [decode_item(item) for item in samples.items]
    assert all(image is not None and min(image.size) > 256 for image in images)
    assert all(spectral_slope(image) < -1.5 for image in images)


def test_synthetic_samples(monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    samples = sample_set()
    assert samples.description.startswith("8 synthetic dead-leaves images (no photographs")
    assert len({item.digest for item in samples.items}) == 8
    assert samples.digest == sample_set().digest
    for item in samples.items[:2]:
        pixels = np.asarray(item.data)
        assert (pixels.shape, str(pixels.dtype)) == ((320, 320, 3), "uint8")
        assert -2.7 < spectral_slope(pixels) < -1.5


def test_digits_and_noise() -> None:
    train, heldout = digits_set("train"), sample_set("van_digits")
    assert heldout.description == "360 held-out images of handwritten digits"
    assert (len(train), len(heldout)) == (1437, 360)
    assert [str(item.label) for item in train.items] == [item.group for item in train.items]
    assert not {i.digest for i in train.items} & {i.digest for i in heldout.items}
    noise = noise_set(4, for_channels(5))
    assert (noise.noise, noise.description) == (True, "4 samples of NOISE, no images")
    assert all(np.asarray(item.data).shape == (5, 32, 32) for item in noise.items)
    same, other = (noise_set(4, for_channels(5), seed).digest for seed in (0, 1))
    assert noise.digest == same != other


# --- images to verify a network with ----------------------------------------------------------


def test_shifts_are_added_to_few_images(tmp_path: Path) -> None:
    for seed in (0, 1):
        Image.fromarray(dead_leaves_image(seed, (160, 200))).save(tmp_path / f"{seed}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    batch = verification_images("", for_channels(), 33, tmp_path)
    assert (len(batch), batch.inputs.shape) == (33, (33, 3, 32, 32))
    assert len({values.tobytes() for values in batch.inputs}) == 33
    assert batch.names[:3] == ("0.png", "1.png", "shifted 0.png")
    assert batch.description.startswith(f"33 images and shifts of 3 images of '{tmp_path}'; 1 co")
    assert "broken.png' cannot be read as an image" in batch.description
    assert np.array_equal(batch.inputs, normalise(batch.values, for_channels()))
    first = pixels_from_image(open_image(tmp_path / "0.png"), for_channels())
    assert np.array_equal(batch.values[0], first)
    few = verification_images("", for_channels(), 5, tmp_path)
    assert np.array_equal(batch.inputs[:5], few.inputs)


def test_images_are_spread_evenly_and_distinct(make: Make) -> None:
    root = make(*(f"{number // 10}/{number:02d}.png" for number in range(40)))
    batch = verification_images("", for_channels(), 4, root)
    assert batch.names == ("0/00.png", "1/13.png", "2/26.png", "3/39.png")
    assert batch.description == f"4 of 40 images of '{root}'"
    values = [np.full((32, 32), shade, np.uint8) for shade in (9, 77, 9, 9)]
    items = tuple(ImageItem(str(number), value) for number, value in enumerate(values))
    distinct = verification_images("", for_channels(1), 2, ImageSet(items, "4 images"))
    assert distinct.names == ("0", "1")


def test_synthetic_samples_with_other_channels() -> None:
    batch = verification_images("", for_channels(13), 12)
    assert batch.inputs.shape == (12, 13, 32, 32)
    assert len({values.tobytes() for values in batch.inputs}) == 12
    assert batch.values.shape == (12, 32, 32, 13)
    assert len({batch.values[0, ..., channel].tobytes() for channel in range(13)}) == 13
    assert "(no photographs with 13 channels installed)" in batch.description


@each("kind", [np.uint8, np.float32])
def test_shifts_are_added_to_few_arrays(kind: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (2, 32, 32, 5) if kind is np.uint8 else (2, 5, 32, 32))
    values = values.astype(kind)
    np.savez(tmp_path / "x.npz", values)
    batch = verification_images("", for_channels(5), 6, tmp_path / "x.npz")
    assert np.array_equal(batch.values[:2], values)
    inputs = normalise(batch.values, for_channels(5)) if kind is np.uint8 else batch.values
    assert np.array_equal(batch.inputs, inputs)
    assert len({one.tobytes() for one in batch.values}) == 6
    assert np.array_equal(np.sort(batch.values[2], None), np.sort(values[0], None))
    assert (batch.pixels is None) == (kind is np.float32)


def test_unusable_images(tmp_path: Path) -> None:
    Image.new("L", (64, 64), 7).save(tmp_path / "flat.png")
    grey = ImageSet((ImageItem("image 0", np.zeros((3, 48, 48), np.float32)),), "1 images")
    for error, channels, source, message in (
        (ImageError, 3, tmp_path, "Only 1 of 4 distinct inputs could be made from the 1 images"),
        (UsageError, 2, tmp_path, "takes 2 channels"),
        (UsageError, 3, grey, "an array of shape (3, 48, 48); the network takes"),  # not resized
    ):
        refusal = error_of(error, verification_images, "", for_channels(channels), 4, source)
        assert message in refusal.message
    (tmp_path / "flat.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"Only 0 of 4 .* 1 could not be read, the first: '"):
        verification_images("", for_channels(), 4, tmp_path)
