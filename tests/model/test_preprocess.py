"""The preprocessing contract: values, overrides, and the transform itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.each import each
from van_deploy.errors import UsageError
from van_deploy.model.preprocess import OFFICIAL, Preprocessing


def _picture(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_official_values_are_those_of_the_weights() -> None:
    assert str(OFFICIAL) == "224x224 bicubic, crop 0.9, mean 0.5/0.5/0.5, std 0.5/0.5/0.5"
    assert OFFICIAL.resize_size == 248


def test_transform_is_resize_crop_scale_normalise() -> None:
    preprocessing = OFFICIAL.override(
        image_size=64, mean=(0.485, 0.456, 0.406), std=(0.2, 0.3, 0.4), crop_pct=0.8
    )
    picture = _picture(150, 100)
    tensor = preprocessing.transform()(picture)
    assert tensor.shape == (3, 64, 64)
    assert tensor.dtype == torch.float32
    resized = picture.resize((120, 80), Image.Resampling.BICUBIC)
    cropped = resized.crop((28, 8, 92, 72))
    by_hand = (np.asarray(cropped, np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.2, 0.3, 0.4]
    assert np.abs(tensor.numpy() - by_hand.transpose(2, 0, 1)).max() < 1e-6


@each("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_become_rgb(mode: str) -> None:
    picture = Image.new(mode, (50, 40)) if mode == "I;16" else _picture(50, 40).convert(mode)
    assert OFFICIAL.override(image_size=32).transform()(picture).shape == (3, 32, 32)


def test_one_channel_network_gets_grey() -> None:
    grey = Preprocessing(32, (0.5,), (0.25,), "bilinear", 1.0, "a test")
    tensor = grey.transform()(_picture(32, 32))
    expected = (np.asarray(_picture(32, 32).convert("L"), np.float64) / 255 - 0.5) / 0.25
    assert np.abs(tensor.numpy()[0] - expected).max() < 1e-6


def test_no_picture_has_five_channels() -> None:
    with pytest.raises(UsageError, match="The network takes 5 channels"):
        Preprocessing(32, (0.5,) * 5, (0.5,) * 5, "bicubic", 1.0, "a test").transform()


def test_override_says_what_was_asked_for() -> None:
    changed = OFFICIAL.override(mean=(0.4,), image_size=256)
    assert changed.mean == (0.4, 0.4, 0.4)
    assert changed.source == (
        "the training of the official VAN weights, except image_size, mean as asked for"
    )
    assert OFFICIAL.override() is OFFICIAL


@each(
    ("given", "message"),
    [
        (
            {"image_size": 31},
            "The image_size 31 should be greater than or equal to 32: the network takes any size "
            "from there on.",
        ),
        ({"image_size": 5000}, "The image_size 5000 should be less than or equal to 4096."),
        ({"image_size": "224"}, "The image_size '224' should be a valid integer."),
        ({"image_size": 224.5}, "The image_size 224.5 should be a valid integer."),
        ({"image_size": True}, "The image_size True should be a valid integer."),
        ({"mean": (0.5, 0.5)}, "The mean has 2 values, but the network takes 3 channels."),
        ({"mean": (0.5, float("nan"), 0.5)}, "The mean nan should be a finite number."),
        (
            {"mean": (123.7, 116.3, 103.5)},
            "The mean 123.7 is not of values in 0..1: divide those of 0..255 images by 255.",
        ),
        (
            {"std": (0.2, 0.0, 0.2)},
            "The std (0.2, 0.0, 0.2) is not positive: images are divided by it.",
        ),
        ({"std": ("a",)}, "The std 'a' should be a valid number."),
        (
            {"interpolation": "random"},
            "The interpolation 'random' should be 'nearest', 'bilinear', 'bicubic', 'box', "
            "'hamming' or 'lanczos'.",
        ),
        ({"crop_pct": 0}, "The crop_pct 0 should be greater than 0."),
        ({"crop_pct": 1.5}, "The crop_pct 1.5 should be less than or equal to 1."),
        ({"crop_pct": "0.9"}, "The crop_pct '0.9' should be a valid number."),
        ({"crop_mode": "fit"}, "The crop_mode 'fit' should be 'center', 'squash' or 'border'."),
    ],
)
def test_impossible_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        OFFICIAL.override(**given)
    assert error.value.message == message
    assert error.value.remedy == "Correct it, or leave it out to take the weights' own." or (
        error.value.remedy == "Give one value, or 3."
    )


def test_sides_are_pixels_and_a_new_ratio_is_timms() -> None:
    exact = Preprocessing(224, (0.5,), (0.5,), "bilinear", 224 / 232, "test", resize_size=232)
    assert (exact.resize_size, str(exact).split(",")[1]) == (232, " crop 0.965517")
    assert Preprocessing.from_dict(exact.as_dict()).resize_size == 232
    assert exact.override(interpolation="bicubic").resize_size == 232
    assert OFFICIAL.override(image_size=288).resize_size == 320
    assert exact.override(crop_pct=0.9).resize_size == 248
    rounded = Preprocessing(224, (0.5,), (0.5,), "bilinear", 0.9, "test", resize_size=250)
    assert rounded.geometry == "resize 250"
    assert OFFICIAL.override(crop_mode="squash").geometry == "crop 0.9, squash"


@each(
    ("changes", "message"),
    [
        ({"resize_size": 200}, "cuts 224 pixels out of an image resized to 200"),
        ({"std": [0.5]}, "has 3 means and 1 deviations"),
    ],
)
def test_values_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Preprocessing.from_dict({**OFFICIAL.as_dict(), **changes})


def test_what_older_versions_wrote_means_the_same() -> None:
    fields = ("image_size", "mean", "std", "interpolation", "crop_pct", "source")
    old = {key: value for key, value in OFFICIAL.as_dict().items() if key in fields}
    assert Preprocessing.from_dict(old) == OFFICIAL


def test_survives_json() -> None:
    changed = OFFICIAL.override(std=(0.2, 0.3, 0.4))
    assert Preprocessing.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed


def test_incomplete_description_is_refused() -> None:
    with pytest.raises(UsageError, match="The preprocessing lacks std"):
        Preprocessing.from_dict({"image_size": 64, "mean": [0.5], "interpolation": "bicubic"})
