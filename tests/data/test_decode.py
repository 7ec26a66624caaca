"""Image files of every kind become the same pixels for every command, or one clear error."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.each import each
from van_deploy.data.decode import Batch, decoded_batches, open_image
from van_deploy.data.items import ImageItem, image_set
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing

ORIENTATION = 0x0112
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Return a small colourful RGB image."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def for_channels(channels: int) -> Preprocessing:
    """Return the preprocessing of a network for 32 x 32 pixels."""
    return Preprocessing(32, (0.5,) * channels, (0.25,) * channels, "bilinear", 1.0, "a test")


# --- opening ---------------------------------------------------------------------------------


@each("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_lossless_picture_comes_back_as_it_was(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(encoded(gradient(), kind))
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(gradient()))


@each("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
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


@each("kind", ["PNG", "TIFF"])
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


@each(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pixels_without_an_agreed_range_are_refused(dtype: type, mode: str) -> None:
    data = encoded(Image.fromarray(np.ones((2, 2), dtype)), "TIFF")
    with pytest.raises(ImageError) as refused:
        open_image(data, name="'deep.tif'")
    assert refused.value.message == (
        f"'deep.tif' cannot be read as an image: 32-bit pixels (mode {mode}) have no agreed range."
    )


def test_the_camera_s_orientation_is_applied() -> None:
    sideways = gradient().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise by 90 degrees
    opened = open_image(encoded(sideways, "PNG", exif=exif))
    assert opened.size == gradient().size
    assert np.array_equal(np.asarray(opened), np.asarray(gradient()))


@each("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getcolors() == [(64, RED)]


@each("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
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


@each(
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


@each("side", [9_500, 20_000, 2_000_000])
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


# --- channels --------------------------------------------------------------------------------


def test_four_channels_keep_the_transparency_and_the_others_drop_it() -> None:
    picture = gradient().convert("RGBA")
    alpha = Image.linear_gradient("L").resize(picture.size)
    picture.putalpha(alpha)
    data = encoded(picture, "PNG")
    assert np.array_equal(np.asarray(open_image(data, channels=4)), np.asarray(picture))
    assert np.array_equal(np.asarray(open_image(data, channels=3)), np.asarray(gradient()))
    grey = np.asarray(open_image(data, channels=1))
    assert np.array_equal(grey, np.asarray(gradient().convert("L")))


@each("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "I;16"])
def test_an_image_without_transparency_is_opaque_in_four_channels(mode: str) -> None:
    picture = (
        gradient().convert("L").convert("I;16") if mode == "I;16" else gradient().convert(mode)
    )
    data = encoded(picture, "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG")
    opened = np.asarray(open_image(data, channels=4))
    assert (opened[..., 3] == 255).all()
    assert np.array_equal(opened[..., :3], np.asarray(open_image(data)))


def test_transparency_is_found_wherever_a_file_keeps_it() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, *BLUE])
    data = encoded(palette, "PNG", transparency=b"\x00\x80")
    assert open_image(data, channels=4).getcolors() == [(16, (*BLUE, 128))]
    grey = encoded(Image.new("LA", (4, 4), (9, 7)), "PNG")
    assert open_image(grey, channels=4).getcolors() == [(16, (9, 9, 9, 7))]
    keyed = encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)
    assert open_image(keyed, channels=4).getcolors() == [(16, (*RED, 0))]


def test_a_fourth_band_that_is_no_transparency_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "nir.tif"  # its ExtraSamples are "unspecified", such as near infrared
    gradient().convert("RGBX").save(path)
    assert open_image(path).mode == "RGB"
    with pytest.raises(ImageError) as refused:
        open_image(path, channels=4)
    assert refused.value.message == (
        f"'{path}' cannot be read as an image: it has more than 3 channels, and none is marked "
        "as transparency."
    )


@each("channels", [2, 5, 13])
def test_no_image_file_has_other_channels(channels: int) -> None:
    with pytest.raises(UsageError) as refused:
        open_image(encoded(gradient(), "PNG"), channels=channels)
    assert refused.value.message == (
        f"The network takes {channels} channels, and image files have 1, 3 or 4."
    )
    assert f"uint8 (N, H, W, {channels})" in refused.value.remedy


# --- batches ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five readable images, told apart by their brightness, and two damaged ones."""
    for index in range(7):
        data = encoded(Image.new("RGB", (40, 36), (10 * index,) * 3), "PNG")
        (tmp_path / f"{index}.png").write_bytes(data[:20] if index in {1, 6} else data)
    return tmp_path


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_in_order_and_name_what_could_not_be_read(folder: Path, workers: int) -> None:
    items = image_set(folder).items
    batches = list(decoded_batches(items, for_channels(3), 2, workers=workers))
    assert [batch.indices for batch in batches] == [(0,), (2, 3), (4, 5), ()]
    assert [batch.inputs.shape for batch in batches] == [
        *((1, 3, 32, 32), (2, 3, 32, 32), (2, 3, 32, 32), (0, 3, 32, 32)),
    ]
    assert [int(p.max()) for b in batches if b.pixels is not None for p in b.pixels] == [
        *(0, 20, 30, 40, 50)
    ]
    bad = [pair for batch in batches for pair in batch.unreadable]
    assert [index for index, _ in bad] == [1, 6]
    assert bad[0][1].startswith(f"'{folder}/1.png' cannot be read as an image: ")
    chosen = list(decoded_batches(items, for_channels(3), 2, indices=[5, 0, 3]))
    assert [batch.indices for batch in chosen] == [(5, 0), (3,)]


def test_inputs_are_the_pixels_normalised(folder: Path) -> None:
    preprocessing = for_channels(1)
    item = image_set(folder).items[3]
    (batch,) = decoded_batches([item], preprocessing, 4)
    assert batch.pixels is not None
    assert batch.values is batch.pixels
    image = open_image(folder / "3.png", channels=1)
    assert np.array_equal(batch.pixels[0], pixels_from_image(image, preprocessing))
    assert np.array_equal(batch.inputs, normalised(batch.pixels, preprocessing))


def test_more_unreadable_images_than_allowed_stop_the_run(folder: Path) -> None:
    items = image_set(folder).items
    assert len(list(decoded_batches(items, for_channels(3), 7, most_unreadable=0.3))) == 1
    with pytest.raises(ImageError) as refused:
        list(decoded_batches(items, for_channels(3), 7, most_unreadable=0.2))
    assert refused.value.message.startswith(
        f"2 of 7 images could not be read, more than 20 %; the first: '{folder}/1.png' cannot be "
    )


def test_arrays_of_images_become_what_their_files_become(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / "4.png"))
    files = [ImageItem("file", folder / "4.png")]
    for channels in (1, 3, 4):
        (from_file,) = decoded_batches(files, for_channels(channels), 1)
        for values in (pixels, pixels[..., 0], pixels[..., :1]):  # colour and two ways of grey
            (batch,) = decoded_batches([ImageItem("array", values)], for_channels(channels), 1)
            assert np.array_equal(batch.inputs, from_file.inputs)


def test_arrays_of_other_channels_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 13), dtype=np.uint8)
    values = rng.standard_normal((13, 32, 32)).astype(np.float32)
    items = [ImageItem("pixels", pixels), ImageItem("input", values)]
    first, second = decoded_batches(items, for_channels(13), 1)
    assert first.pixels is not None
    assert np.array_equal(first.pixels[0], pixels)
    assert np.array_equal(first.inputs, normalised(pixels[None], for_channels(13)))
    assert second.pixels is None
    assert second.values is second.inputs
    assert np.array_equal(second.inputs[0], values)


@each(
    ("values", "wanted"),
    [
        (np.zeros((3, 16, 16), np.float32), "(3, 16, 16); the network takes (3, 32, 32)"),
        (np.zeros((32, 32, 5), np.uint8), "(32, 32, 5); the network takes (32, 32, 3)"),
    ],
)
def test_an_array_of_another_shape_is_refused(values: Any, wanted: str) -> None:
    with pytest.raises(UsageError) as refused:
        list(decoded_batches([ImageItem("image 0 of 'x.npz'", values)], for_channels(3), 1))
    assert refused.value.message == f"The image 0 of 'x.npz' is an array of shape {wanted}."


def test_a_network_of_other_channels_cannot_read_files(folder: Path) -> None:
    with pytest.raises(UsageError, match="The network takes 2 channels"):
        list(decoded_batches(image_set(folder).items, for_channels(2), 1))


def test_an_empty_batch_has_the_shape_of_one() -> None:
    batch = Batch.of([(0, "gone")], for_channels(3))
    assert batch.inputs.shape == (0, 3, 32, 32)
    assert batch.unreadable == ((0, "gone"),)
