"""Sample images, and distinct network inputs from the user's images or from samples."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import Make, for_channels
from tests.each import each
from tests.errors import error_of
from van_deploy.data.images import ImageItem, ImageSet, decode_item, open_image
from van_deploy.data.samples import (
    dead_leaves_image,
    digits_set,
    noise_set,
    sample_set,
    verification_images,
)
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import normalise, pixels_from_image


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


# --- what a network is batch on ------------------------------------------------------------


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
    assert batch.pixels is not None
    assert np.array_equal(batch.inputs, normalise(batch.pixels, for_channels()))
    first = pixels_from_image(open_image(tmp_path / "0.png"), for_channels())
    assert np.array_equal(batch.pixels[0], first)
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
    assert batch.pixels is not None
    assert batch.pixels.shape == (12, 32, 32, 13)
    assert len({batch.pixels[0, ..., channel].tobytes() for channel in range(13)}) == 13
    assert "(no photographs with 13 channels installed)" in batch.description


@each("kind", [np.uint8, np.float32])
def test_shifts_are_added_to_few_arrays(kind: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (2, 32, 32, 5) if kind is np.uint8 else (2, 5, 32, 32))
    values = values.astype(kind)
    np.savez(tmp_path / "x.npz", values)
    batch = verification_images("", for_channels(5), 6, tmp_path / "x.npz")
    assert np.array_equal(batch.values[:2], values)
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
