"""What weights say about themselves is taken where it is plain, and only there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from van_deploy.errors import CheckpointError
from van_deploy.model.checkpoint import load_van
from van_deploy.model.contract import class_names_from, preprocessing_of
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN


def lists_in_lists(levels: int) -> Any:
    """Return 2**levels strings in the memory of a few: what a pickle's memo can spell."""
    value: Any = ("x",)
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize("name", ["img_size", "input_size", "mean", "std", "crop_pct"])
def test_lists_that_take_for_ever_to_look_through_are_passed_over(name: str) -> None:
    for arguments in ({name: lists_in_lists(60)}, {"preprocessing": {name: lists_in_lists(60)}}):
        found, _ = preprocessing_of(3, arguments=arguments, processor=None, repo_id=None)
        assert found.mean == OFFICIAL.mean
    assert class_names_from(None, {"classes": [lists_in_lists(60)] * 3}, 3) is None


def test_class_names_are_text_or_numbers() -> None:
    assert class_names_from(None, {"classes": ["cat", 2]}, 2) == ("cat", "2")
    assert class_names_from(None, {"classes": ["cat", None]}, 2) is None


@pytest.mark.parametrize(
    "processor",
    [
        {"size": 0, "crop_size": 224},
        {"size": 10**400, "crop_size": 224},
        {"size": {"a": 1, "b": 2}},
        {"size": {"a": []}},
        {"resample": "x"},
        {"resample": 77},
        {"image_mean": "x"},
        {"image_std": [0]},
        {"rescale_factor": "x"},
        {"crop_pct": {}},
    ],
)
def test_a_processor_that_makes_no_sense_is_one_message(
    processor: dict[str, Any], tiny: VAN, tmp_path: Path
) -> None:
    sound = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**sound, **processor}))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json beside the weights"):
        load_van(str(tmp_path))
