"""Preprocessing values, and bit-identical results to timm's and torchvision's transforms."""

import itertools
import json
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms

from tests.each import each
from tests.errors import error_of
from tests.model.conftest import sample_images
from van_deploy.config.sizes import ImageSize
from van_deploy.errors import ImageError, UsageError
from van_deploy.model.preprocess import (
    OFFICIAL,
    Interpolation,
    Preprocessing,
    normalise,
    pixels_from_image,
)
from van_deploy.model.processors import from_arguments

# --- values ------------------------------------------------------------------------------------


def test_values() -> None:
    assert str(OFFICIAL) == "224x224 bicubic, crop 0.9, mean 0.5/0.5/0.5, std 0.5/0.5/0.5"
    assert OFFICIAL.resize_size == 248
    changed = OFFICIAL.override(std=(0.2, 0.3, 0.4), image_size=(64, 96), mean=0.4)
    assert changed.mean == (0.4, 0.4, 0.4)
    assert changed.source.endswith("weights, except std, image_size, mean as requested")
    assert Preprocessing.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed
    assert OFFICIAL.override(crop_pct=None) is OFFICIAL
    grey = Preprocessing(64, (0.4,), (0.2,), "bicubic", 0.9, "test")
    assert grey.override(mean=(0.5, 0.5, 0.5)).mean == (0.5,)  # timm's of an RGB network


@each(
    ("values", "message"),
    [
        ({"image_size": 31}, "image_size 31: should be greater than or equal to 32"),
        ({"image_size": 5000}, "image_size 5000: should be less than or equal to 4096"),
        ({"image_size": "224"}, "image_size '224': Input should be a valid integer"),
        ({"image_size": True}, "image_size True: Input should be a valid integer"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean nan: Input should be"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean 123.7: Input should be less than or equal to 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std 0.0: Input should be greater than 0"),
        ({"std": (0.5,)}, "3 means and 1 deviations"),
        ({"std": None}, "std None"),
        ({"interpolation": "random"}, "interpolation 'random': Input should be 'nearest'"),
        ({"crop_pct": 0}, "crop_pct 0: Input should be greater than 0"),
        ({"crop_pct": 1.5}, "crop_pct 1.5: Input should be less than or equal to 1"),
        ({"resize_size": 200}, "it has image_size 224 > resize_size 200"),
        ({"crop": 1.0}, "crop 1.0: Unexpected keyword argument"),
    ],
)
def test_invalid_values(values: dict[str, Any], message: str) -> None:
    error = error_of(UsageError, Preprocessing.from_dict, {**OFFICIAL.as_dict(), **values})
    assert message in error.message


def test_resize_size() -> None:
    exact = Preprocessing(224, (0.5,), (0.5,), "bilinear", 224 / 232, "test", resize_size=232)
    assert (exact.resize_size, str(exact).split(",")[1]) == (232, " crop 0.965517")
    assert Preprocessing.from_dict(exact.as_dict()).resize_size == 232
    assert exact.override(interpolation="bicubic").resize_size == 232
    assert OFFICIAL.override(image_size=288).resize_size == 320
    assert exact.override(crop_pct=0.9).resize_size == 248
    rounded = Preprocessing(224, (0.5,), (0.5,), "bilinear", 0.9, "test", resize_size=250)
    assert "bilinear, resize 250, mean" in str(rounded)
    assert "bicubic, crop 0.9, squash, mean" in str(OFFICIAL.override(crop_mode="squash"))


# --- pixels ------------------------------------------------------------------------------------

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def timm_transform(preprocessing: Preprocessing) -> Any:
    names = ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {name: getattr(preprocessing, name) for name in names}
    return create_transform((preprocessing.channels, *preprocessing.sides), **options)


def assert_same(image: Image.Image, preprocessing: Preprocessing, expected: Any) -> None:
    actual = normalise(pixels_from_image(image, preprocessing)[None], preprocessing)[0]
    assert actual.dtype == np.float32
    assert np.array_equal(actual, expected.numpy()), (image.size, preprocessing)
    assert torch.equal(preprocessing.transform()(image), expected)


@each("mode", ["center", "squash", "border"])
@each("interpolation", get_args(Interpolation))
@each(("size", "crop"), [(224, 0.9), (65, 0.87), (64, 1.0), ((64, 96), 0.9), ((65, 50), 0.87)])
def test_bit_identical_to_timm(interpolation: str, size: ImageSize, crop: float, mode: str) -> None:
    sizes = {"image_size": size, "crop_pct": crop, "crop_mode": mode}
    preprocessing = OFFICIAL.override(interpolation=interpolation, **sizes, **IMAGENET)
    reference = timm_transform(preprocessing)
    for image in sample_images():
        if mode != "border" or min(image.size) > 1:  # there timm resizes to a width of 0
            assert_same(image, preprocessing, reference(image))


def test_bit_identical_to_torchvision() -> None:
    """Against the steps of references/classification/presets.py's ClassificationPresetEval."""
    values = from_arguments({"val_crop_size": 225, "interpolation": "bilinear"})
    preprocessing = Preprocessing.from_dict({"source": "", **values})
    steps = (transforms.Resize(256), transforms.CenterCrop(225), transforms.PILToTensor())
    scale = (transforms.ConvertImageDtype(torch.float), transforms.Normalize(**IMAGENET))
    for image in sample_images():
        assert_same(image, preprocessing, transforms.Compose([*steps, *scale])(image))


@each(("channels", "mode"), list(itertools.product((1, 3, 4), ("RGB", "L", "RGBA", "P", "CMYK"))))
def test_channels_and_modes(channels: int, mode: str) -> None:
    preprocessing = Preprocessing(64, (0.4,) * channels, (0.2,) * channels, "bicubic", 0.9, "test")
    source = sample_images()[1].convert(mode)
    image = source.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    for crop_mode in ("center", "squash", "border"):
        changed = preprocessing.override(crop_mode=crop_mode)
        assert_same(source, changed, timm_transform(changed)(image))


def test_crop_rounding() -> None:
    image = sample_images()[3].resize((75, 75))
    for rounding, first in (("floor", 5), ("even", 6)):
        chosen = OFFICIAL.override(image_size=64, resize_size=75, crop_rounding=rounding)
        cut = slice(first, first + 64)
        assert np.array_equal(pixels_from_image(image, chosen), np.asarray(image)[cut, cut])


def test_unsupported_images_and_channels() -> None:
    error = error_of(ImageError, pixels_from_image, Image.new("RGB", (60_000, 1)), OFFICIAL)
    assert "60000 x 1 pixels resizes to 14880000 pixels" in error.message
    preprocessing = Preprocessing(64, (0.5,) * 5, (0.5,) * 5, "bicubic", 0.9, "test")
    error = error_of(UsageError, preprocessing.transform(), sample_images()[0])
    assert "The network takes 5 channels" in error.message
    assert pixels_from_image(Image.new("I;16", (50, 40)), OFFICIAL).shape == (224, 224, 3)
