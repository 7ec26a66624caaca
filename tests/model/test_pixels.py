"""Every bit of timm's and torchvision's evaluation transforms."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from tests.each import each
from van_deploy.config.sizes import ImageSize
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import (
    OFFICIAL,
    Interpolation,
    Preprocessing,
    normalised,
    pixels_from_image,
)
from van_deploy.model.processors import from_arguments

SIZES = ((8, 8), (33, 57), (57, 33), (249, 248), (300, 301), (1, 5), (224, 224), (1000, 247))
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def ours(image: Image.Image, preprocessing: Preprocessing) -> Any:
    return normalised(pixels_from_image(image, preprocessing)[None], preprocessing)[0]


def timms(preprocessing: Preprocessing) -> Any:
    return create_transform(
        (preprocessing.channels, *preprocessing.sides),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )


def assert_same(image: Image.Image, preprocessing: Preprocessing, theirs: Any) -> None:
    expected, found = theirs(image).numpy(), ours(image, preprocessing)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected), (image.size, np.abs(found - expected).max())
    assert np.array_equal(preprocessing.transform()(image).numpy(), expected)


@each("mode", ["center", "squash", "border"])
@each("interpolation", get_args(Interpolation))
@each(("size", "crop"), [(224, 0.9), (65, 0.87), (64, 1.0), ((64, 96), 0.9), ((65, 50), 0.87)])
def test_every_bit_is_timms(interpolation: str, size: ImageSize, crop: float, mode: str) -> None:
    preprocessing = OFFICIAL.override(
        image_size=size, crop_pct=crop, interpolation=interpolation, crop_mode=mode, **IMAGENET
    )
    theirs = timms(preprocessing)
    for image in pictures():
        if mode != "border" or min(image.size) > 1:  # timm resizes a ribbon to a width of 0
            assert_same(image, preprocessing, theirs)


@each(
    ("args", "size", "crop"),
    [
        ({"val_resize_size": 232, "val_crop_size": 224, "interpolation": "bicubic"}, 232, 224),
        ({"val_resize_size": 256, "val_crop_size": 225, "interpolation": "bilinear"}, 256, 225),
    ],
)
def test_every_bit_is_torchvisions(args: dict[str, Any], size: int, crop: int) -> None:
    """Against the steps of references/classification/presets.py's ClassificationPresetEval."""
    preprocessing = Preprocessing.from_dict({"source": "", **from_arguments(args)})
    theirs = transforms.Compose(
        [
            transforms.Resize(
                size, interpolation=transforms.InterpolationMode(args["interpolation"])
            ),
            transforms.CenterCrop(crop),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(mean=IMAGENET["mean"], std=IMAGENET["std"]),
        ]
    )
    for image in pictures():
        assert_same(image, preprocessing, theirs)


@each(("channels", "mode"), list(itertools.product((1, 3, 4), ("RGB", "L", "RGBA", "P", "CMYK"))))
def test_channels_and_modes(channels: int, mode: str) -> None:
    preprocessing = Preprocessing(64, (0.4,) * channels, (0.2,) * channels, "bicubic", 0.9, "test")
    converted = pictures()[1].convert(mode)
    assert pixels_from_image(converted, preprocessing).shape == (64, 64, channels)
    image = converted.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    for crop_mode in ("center", "squash", "border"):
        changed = preprocessing.override(crop_mode=crop_mode)
        assert np.array_equal(ours(converted, changed), timms(changed)(image).numpy())


def test_what_is_no_picture_for_the_network() -> None:
    ribbon = Image.new("RGB", (60_000, 1))
    with pytest.raises(ImageError, match=r"60000 x 1 pixels would be 14880000 pixels"):
        pixels_from_image(ribbon, OFFICIAL)
    preprocessing = Preprocessing(64, (0.5,) * 5, (0.5,) * 5, "bicubic", 0.9, "test")
    with pytest.raises(UsageError, match="The network takes 5 channels"):
        preprocessing.transform()(pictures()[0])
    assert pixels_from_image(Image.new("I;16", (50, 40)), OFFICIAL).shape == (224, 224, 3)
