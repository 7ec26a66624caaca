"""Finding, opening and batching images, and the sample pictures."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from van_deploy.images import (
    Samples,
    UnreadableImages,
    dead_leaves_picture,
    file_digest,
    find_images,
    load_batches,
    open_image,
    sample_batch,
    sample_pictures,
)

from van_deploy.errors import ImageError, UsageError

ORIENTATION = 0x0112
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Return a small colourful RGB picture."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def planes(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a picture as ``(3, H, W)`` float32: the simplest transform."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)


def small(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a picture resized to ``(3, 32, 32)`` float32."""
    return planes(image.resize((32, 32)))


def has_no_package(_name: str) -> None:
    """Answer as ``importlib.util.find_spec`` where nothing is installed."""


# --- finding ---------------------------------------------------------------------------------


def test_images_are_found_at_any_depth_in_order_and_by_suffix(tmp_path: Path) -> None:
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "a.webp",
        ".hidden.png",
        ".git/x.png",
        "notes.txt",
        "b/c/3.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)]
    assert found == ["a.webp", "b/1.jpeg", "b/2.PNG", "b/c/3.tif"]
    assert find_images(str(tmp_path)) == find_images(tmp_path)


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert find_images(tmp_path) == (tmp_path / "a" / "x.png",)


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    store.mkdir()
    view.mkdir()
    (store / "x.png").touch()
    (view / "linked").symlink_to(store)
    (view / "y.png").symlink_to(store / "x.png")
    (view / "gone.png").symlink_to(store / "nothing.png")
    assert find_images(view) == (view / "linked" / "x.png", view / "y.png")


def test_missing_empty_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as missing:
        find_images(tmp_path / "nowhere")
    assert str(missing.value) == (
        f"The image folder '{tmp_path}/nowhere' does not exist.\nCheck the path."
    )
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError) as empty:
        find_images(tmp_path)
    assert empty.value.message == f"There is no image in '{tmp_path}' or the folders below it."
    assert ".jpg" in empty.value.remedy
    with pytest.raises(ImageError, match="is a file, not a folder"):
        find_images(tmp_path / "notes.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ImageError, match="closed' cannot be read: Permission denied"):
        find_images(tmp_path)


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_picture_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encoded(gradient(), kind))
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(gradient()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb_as_pillow_converts_it(mode: str) -> None:
    picture = gradient().convert(mode)
    opened = open_image(encoded(picture, "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(picture.convert("RGB")))


def test_transparency_is_dropped_as_timm_drops_it() -> None:
    picture = gradient().convert("RGBA")
    picture.putalpha(7)
    assert np.array_equal(np.asarray(open_image(encoded(picture, "PNG"))), np.asarray(gradient()))


def test_a_transparent_palette_keeps_its_colours_and_warns_of_nothing() -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([*RED, *BLUE])
    data = encoded(picture, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).getcolors() == [(16, BLUE)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257, 1000], [32896, 65278, 65535]], dtype=np.uint16)
    opened = np.asarray(open_image(encoded(Image.fromarray(values), kind)))
    assert opened[..., 0].tolist() == [[0, 1, 4], [128, 254, 255]]
    assert np.array_equal(opened[..., 0], opened[..., 2])


def test_big_endian_sixteen_bit_grey_reads_the_same() -> None:
    values = np.array([[0, 257], [32896, 65535]], dtype=">u2")
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"MM")
    picture = Image.frombytes("I;16B", (2, 2), values.tobytes())
    opened = open_image(encoded(picture, "TIFF", tiffinfo=tags))
    assert np.asarray(opened)[..., 0].tolist() == [[0, 1], [128, 255]]


def test_twelve_bit_grey_is_scaled_by_its_own_range() -> None:
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    values = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048, packed
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    data = b"II*\0" + struct.pack("<I", 12) + values + b"\0" + directory
    assert np.asarray(open_image(data))[..., 0].tolist() == [[255, 128]]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_without_an_agreed_range_are_refused(dtype: type, mode: str) -> None:
    data = encoded(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
    with pytest.raises(ImageError) as refused:
        open_image(data, name="'deep.tif'")
    assert str(refused.value) == (
        f"'deep.tif' holds 32-bit pixels (mode {mode}), which have no agreed range.\n"
        "Convert it to 8 or 16 bits a channel."
    )


def test_the_camera_s_orientation_is_applied() -> None:
    sideways = gradient().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by 90 degrees
    opened = open_image(encoded(sideways, "PNG", exif=exif))
    assert opened.size == gradient().size
    assert np.array_equal(np.asarray(opened), np.asarray(gradient()))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getcolors() == [(64, RED)]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_truncated_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as refused:
        open_image(path)
    assert refused.value.message.startswith(f"'{path}' cannot be read as an image: ")
    assert refused.value.remedy == "Replace the file or leave it out."
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is in no known image format"),
        (b"<html>404</html>", "it is in no known image format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "it is in no known image format"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(ImageError) as refused:
        open_image(path)
    assert refused.value.message == f"'{path}' cannot be read as an image: {reason}."


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"read as an image: No such file or directory\."):
        open_image(tmp_path / "gone.png")


def test_damage_anywhere_in_a_file_is_an_image_error_or_a_picture() -> None:
    rng = np.random.default_rng(1)
    refused = 0
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        data = np.frombuffer(encoded(gradient(), kind), dtype=np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow comments on damaged metadata
                try:
                    assert open_image(damaged.tobytes()).mode == "RGB"
                except ImageError:
                    refused += 1
    assert 20 < refused < 240


def bomb(side: int) -> bytes:
    """Return a tiny PNG that claims to be ``side`` x ``side``."""
    data = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes(data[24:29])
    data[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("side", [9_500, 20_000, 2_000_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(ImageError) as refused:
        open_image(bomb(side), name="'bomb.png'")
    assert refused.value.message.startswith("'bomb.png' is too large to open safely: ")
    assert refused.value.remedy.startswith("Make it smaller first")


def test_a_bomb_is_refused_where_pillow_s_warnings_are_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError) as refused:
            open_image(bomb(9_500), name="'bomb.png'")
    assert refused.value.message == (
        "'bomb.png' is too large to open safely: 9500 x 9500 pixels, more than 89,478,485."
    )


def test_the_limit_on_pixels_can_be_set() -> None:
    data = encoded(gradient(24, 16), "PNG")
    assert open_image(data, max_pixels=384).size == (24, 16)
    with pytest.raises(ImageError) as refused:
        open_image(data, max_pixels=383)
    assert refused.value.message == (
        "The image is too large to open safely: 24 x 16 pixels, more than 383."
    )


def test_digest_of_a_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "x").write_bytes(content)
    assert file_digest(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    with pytest.raises(ImageError, match="gone' cannot be read: No such file"):
        file_digest(tmp_path / "gone")


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five readable pictures, told apart by their brightness, and two damaged ones."""
    for index in range(7):
        picture = Image.new("RGB", (8, 6), (10 * index,) * 3)
        data = encoded(picture, "PNG")
        (tmp_path / f"{index}.png").write_bytes(data[:20] if index in {1, 6} else data)
    return tmp_path


def test_batches_are_full_and_in_order_around_unreadable_images(folder: Path) -> None:
    bad = UnreadableImages()
    batches = list(load_batches(find_images(folder), planes, 2, bad))
    assert [images.shape for images, _ in batches] == [(2, 3, 6, 8), (2, 3, 6, 8), (1, 3, 6, 8)]
    assert all(images.dtype == np.float32 for images, _ in batches)
    values = [image.max() for images, _ in batches for image in images]
    assert values == [0, 20, 30, 40, 50]
    assert [path.name for _, paths in batches for path in paths] == [
        "0.png", "2.png", "3.png", "4.png", "5.png",
    ]  # fmt: skip
    assert [path.name for path, _ in bad.found] == ["1.png", "6.png"]


def test_the_first_unreadable_image_is_an_error_without_a_collector(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"1\.png' cannot be read as an image"):
        list(load_batches(find_images(folder), planes, 2))


def test_images_are_opened_one_batch_at_a_time(folder: Path) -> None:
    opened: list[int] = []

    def counting(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        opened.append(1)
        return planes(image)

    batches = load_batches(find_images(folder), counting, 2, UnreadableImages())
    assert opened == []
    next(batches)
    assert len(opened) == 2


def test_tensors_from_a_transform_are_taken() -> None:
    torch = pytest.importorskip("torch")
    batch = sample_batch(2, lambda image: torch.from_numpy(small(image)))
    assert isinstance(batch, np.ndarray)
    assert batch.shape == (2, 3, 32, 32)


def test_an_empty_batch_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="A batch of 0 images makes no sense"):
        load_batches([], planes, 0)


def test_unreadable_images_are_counted_and_named(folder: Path) -> None:
    bad = UnreadableImages()
    assert bad.describe() == ""
    list(load_batches(find_images(folder), planes, 4, bad))
    one = f"  '{folder}/1.png' cannot be read as an image: "
    lines = bad.describe(limit=1).splitlines()
    assert lines[0] == "2 images could not be read:"
    assert lines[1].startswith(one)
    assert lines[2] == "  and 1 more"
    bad.refuse_above(0.5, 7)
    with pytest.raises(ImageError) as refused:
        bad.refuse_above(0.01, 7)
    assert refused.value.message.startswith(
        "2 of 7 images could not be read, more than the 1 % allowed.\n"
    )
    with pytest.raises(ImageError, match="2 of 2 images"):
        bad.refuse_above(1.0, 2)
    UnreadableImages().refuse_above(0.0, 0)


# --- sample pictures -------------------------------------------------------------------------


def spectral_slope(image: Any) -> float:
    """Return the exponent of a picture's power spectrum over spatial frequency."""
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


def test_photographs_of_installed_packages_are_used() -> None:
    if not any(map(importlib.util.find_spec, ("skimage", "sklearn"))):
        pytest.skip("neither scikit-image nor scikit-learn is installed")
    samples = sample_pictures()
    assert not samples.synthetic
    assert samples.description.startswith("natural photographs: ")
    assert all(image.mode == "RGB" and min(image.size) > 256 for image in samples.images)
    assert all(spectral_slope(image) < -1.5 for image in samples.images)


def test_without_those_packages_the_pictures_are_synthetic_and_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", has_no_package)
    samples = sample_pictures()
    assert samples.synthetic
    assert samples.description == (
        "8 synthetic dead-leaves pictures (not photographs: "
        "neither scikit-image nor scikit-learn is installed)"
    )
    assert len({image.tobytes() for image in samples.images}) == 8


def test_dead_leaves_have_the_spectrum_of_photographs_and_noise_has_not() -> None:
    slopes = [spectral_slope(dead_leaves_picture(seed)) for seed in (1, 2)]
    assert all(-2.7 < slope < -1.5 for slope in slopes)
    noise = np.random.default_rng(0).integers(0, 256, (320, 320, 3))
    assert abs(spectral_slope(noise)) < 0.3


def test_dead_leaves_follow_their_seed() -> None:
    once = dead_leaves_picture(3, size=96, leaves=200)
    assert once.shape == (96, 96, 3)
    assert once.dtype == np.uint8
    assert np.array_equal(once, dead_leaves_picture(3, size=96, leaves=200))
    assert not np.array_equal(once, dead_leaves_picture(4, size=96, leaves=200))


@pytest.fixture(scope="module")
def two_pictures() -> Samples:
    images = tuple(Image.fromarray(dead_leaves_picture(s, 160, 800)) for s in (0, 1))
    return Samples(images, "two", synthetic=True)


def test_a_sample_batch_is_distinct_and_repeatable(two_pictures: Samples) -> None:
    batch = sample_batch(33, small, two_pictures)
    assert batch.shape == (33, 3, 32, 32)
    assert batch.dtype == np.float32
    assert len({image.tobytes() for image in batch}) == 33
    assert np.array_equal(batch, sample_batch(33, small, two_pictures))
    assert np.array_equal(batch[:5], sample_batch(5, small, two_pictures))
    assert np.array_equal(batch[0], small(two_pictures.images[0]))
    assert not np.array_equal(batch, sample_batch(33, small, two_pictures, seed=1))


def test_crops_differ_in_size_and_half_are_mirrored() -> None:
    crops: list[Image.Image] = []

    def keep(image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        crops.append(image)
        return small(image)

    sample_batch(41, keep, Samples((gradient(240, 160),), "red grows to the right", True))
    assert all(64 <= crop.width == crop.height <= 160 for crop in crops[1:])
    assert len({crop.size for crop in crops[1:]}) > 10
    red = [np.asarray(crop)[0, :, 0].astype(int) for crop in crops[1:]]
    assert 10 <= sum(row[0] > row[-1] for row in red) <= 30


def same_for_all(_image: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return one value whatever the picture is."""
    return np.zeros((3, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("count", "transform", "error", "text"),
    [
        (0, small, UsageError, "0 sample images make no sense"),
        (4, same_for_all, ImageError, "Only 1 of 4 distinct inputs could be made"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(
    count: int,
    transform: Callable[[Image.Image], Any],
    error: type[Exception],
    text: str,
    two_pictures: Samples,
) -> None:
    with pytest.raises(error, match=text):
        sample_batch(count, transform, two_pictures)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps"])
def test_postscript_is_not_given_to_ghostscript(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow runs ``gs`` on an EPS, whatever its file is called."""

    def ran(*arguments: object, **_: object) -> None:
        raise AssertionError(arguments)

    monkeypatch.setattr("subprocess.Popen", ran)
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="it is in no known image format"):
            open_image(source)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match="it is no regular file"):
        open_image(tmp_path / "x.png")
