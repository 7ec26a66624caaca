"""The light pipeline gives timm's bits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from van_deploy.data import find_images, open_image
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.model.preprocess import INTERPOLATIONS, OFFICIAL, Preprocessing

SIZES = ((8, 8), (33, 57), (57, 33), (249, 248), (300, 301), (1, 5), (224, 224), (1000, 247))


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def same_as_timm(image: Image.Image, preprocessing: Preprocessing, timm: Any) -> None:
    expected = timm(image).numpy()
    found = normalised(pixels_from_image(image, preprocessing)[None], preprocessing)[0]
    assert found.dtype == np.float32
    assert np.array_equal(found, expected), (image.size, np.abs(found - expected).max())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("size", "crop"), [(224, 0.9), (65, 0.87), (64, 1.0)])
def test_every_bit_is_timms(interpolation: str, size: int, crop: float) -> None:
    preprocessing = OFFICIAL.override(
        image_size=size,
        crop_pct=crop,
        interpolation=interpolation,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    timm = preprocessing.transform()
    for image in pictures():
        same_as_timm(image, preprocessing, timm)


@pytest.mark.parametrize(
    ("channels", "mode"), list(itertools.product((1, 3, 4), ("RGB", "L", "RGBA")))
)
def test_channels_and_modes(channels: int, mode: str) -> None:
    preprocessing = Preprocessing(64, (0.4,) * channels, (0.2,) * channels, "bicubic", 0.9, "test")
    image = pictures()[1].convert(mode)
    assert pixels_from_image(image, preprocessing).shape == (64, 64, channels)
    same_as_timm(image, preprocessing, preprocessing.transform())


def test_every_bit_is_timms_on_photographs(shared: Path) -> None:
    timm = OFFICIAL.transform()
    for path in find_images(shared / "data/imagenet")[::8]:
        same_as_timm(open_image(path), OFFICIAL, timm)


def test_a_ribbon_is_refused_before_it_fills_the_memory() -> None:
    ribbon = Image.new("RGB", (60_000, 1))
    with pytest.raises(ImageError, match="60000 x 1 pixels is too narrow") as caught:
        pixels_from_image(ribbon, OFFICIAL)
    assert "14880000 pixels long" in caught.value.message


def test_five_channels_are_no_picture() -> None:
    preprocessing = Preprocessing(64, (0.5,) * 5, (0.5,) * 5, "bicubic", 0.9, "test")
    with pytest.raises(UsageError, match="No picture has 5 channels"):
        pixels_from_image(pictures()[0], preprocessing)
