"""The preprocessing contract: values, overrides, and how they are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.each import each
from van_deploy.errors import UsageError
from van_deploy.model.preprocess import OFFICIAL, Preprocessing


def test_official_values_are_those_of_the_weights_and_survive_json() -> None:
    assert str(OFFICIAL) == "224x224 bicubic, crop 0.9, mean 0.5/0.5/0.5, std 0.5/0.5/0.5"
    assert OFFICIAL.resize_size == 248
    changed = OFFICIAL.override(std=(0.2, 0.3, 0.4), image_size=(64, 96))
    assert Preprocessing.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed


def test_override_says_what_was_asked_for() -> None:
    changed = OFFICIAL.override(image_size=256, mean=(0.4,), std=None)
    assert changed.mean == (0.4, 0.4, 0.4)
    assert changed.source.endswith("weights, except image_size, mean as asked for")
    assert OFFICIAL.override(crop_pct=None) is OFFICIAL


@each(
    ("given", "message"),
    [
        ({"image_size": 31}, "image_size 31: should be greater than or equal to 32"),
        ({"image_size": 5000}, "image_size 5000: should be less than or equal to 4096"),
        ({"image_size": "224"}, "image_size '224': Input should be a valid integer"),
        ({"image_size": True}, "image_size True: Input should be a valid integer"),
        ({"mean": (0.5, 0.5)}, "The mean has 2 values for 3 channels."),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean nan: Input should be"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean 123.7: Input should be less than or equal to 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std 0.0: Input should be greater than 0"),
        ({"interpolation": "random"}, "interpolation 'random': Input should be 'nearest'"),
        ({"crop_pct": 0}, "crop_pct 0: Input should be greater than 0"),
        ({"crop_pct": 1.5}, "crop_pct 1.5: Input should be less than or equal to 1"),
        ({"resize_size": 200}, "cuts 224 pixels out of an image resized to 200"),
        ({"crop": 1.0}, "crop 1.0: Unexpected keyword argument"),
    ],
)
def test_impossible_values_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        OFFICIAL.override(**given)
    assert message in error.value.message
    assert error.value.remedy


def test_incomplete_or_contradictory_descriptions_are_refused() -> None:
    for values, told in (({"std": None}, "std None"), ({"std": [0.5]}, "3 means and 1 deviations")):
        with pytest.raises(UsageError, match=told):
            Preprocessing.from_dict({**OFFICIAL.as_dict(), **values})


def test_sides_are_pixels_and_a_new_ratio_is_timms() -> None:
    exact = Preprocessing(224, (0.5,), (0.5,), "bilinear", 224 / 232, "test", resize_size=232)
    assert (exact.resize_size, str(exact).split(",")[1]) == (232, " crop 0.965517")
    assert Preprocessing.from_dict(exact.as_dict()).resize_size == 232
    assert exact.override(interpolation="bicubic").resize_size == 232
    assert OFFICIAL.override(image_size=288).resize_size == 320
    assert exact.override(crop_pct=0.9).resize_size == 248
    rounded = Preprocessing(224, (0.5,), (0.5,), "bilinear", 0.9, "test", resize_size=250)
    assert "bilinear, resize 250, mean" in str(rounded)
    assert "bicubic, crop 0.9, squash, mean" in str(OFFICIAL.override(crop_mode="squash"))
