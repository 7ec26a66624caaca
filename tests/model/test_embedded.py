"""The embedded network: what ships, that it is trained, and its stated accuracy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from van_deploy.data import find_images
from van_deploy.errors import UsageError
from van_deploy.model.embedded import (
    DigitsSplit,
    digits_images,
    embedded_files,
    write_digits_folder,
)
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig

MAX_WEIGHTS_BYTES = 1_000_000


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(embedded_files().card.read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def model(card: dict[str, Any]) -> VAN:
    config: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in card["config"].items()
    }
    network = VAN(VanConfig(**config)).eval()
    network.load_state_dict(load_file(embedded_files().weights))
    return network


@pytest.fixture(scope="module")
def heldout_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits_folder(tmp_path_factory.mktemp("digits") / "heldout", "heldout")


# --- the network -----------------------------------------------------------------------------


def test_the_weights_are_small_and_the_ones_the_card_describes(card: dict[str, Any]) -> None:
    files = embedded_files()
    assert files.weights.stat().st_size <= MAX_WEIGHTS_BYTES
    for file in (files.weights, files.images):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == card["sha256"][file.name]


def test_the_weights_carry_what_the_card_says(card: dict[str, Any]) -> None:
    with safe_open(embedded_files().weights, framework="pt") as file:
        metadata = file.metadata()
    for name in ("preprocessing", "classes", "training"):
        assert json.loads(metadata[name]) == card[name]
    assert metadata["licence"] == card["data"]["licence"] == "CC BY 4.0"
    assert "Alpaydin" in metadata["attribution"]
    assert card["classes"] == [str(digit) for digit in range(10)]


def test_the_card_counts_the_parameters(card: dict[str, Any], model: VAN) -> None:
    assert sum(value.numel() for value in model.parameters()) == card["parameters"]


def test_every_part_that_a_rewrite_touches_has_learnt_something(model: VAN) -> None:
    state = model.state_dict()
    for name, value in state.items():
        if "layer_scale" in name:
            assert (value - 0.01).abs().mean() > 0.05, name
        elif "norm" in name and name.endswith("weight"):
            assert value.std() > 0.01, name
        elif name.endswith("running_var"):
            assert value.max() / value.min() > 1.2, name
        elif "norm" in name and name.endswith(("bias", "running_mean")):
            assert value.std() > 0.005, name


# --- the images ------------------------------------------------------------------------------


def test_both_parts_are_whole_and_share_no_image() -> None:
    parts: dict[DigitsSplit, tuple[int, int]] = {"train": (1437, 100), "heldout": (360, 30)}
    seen: set[bytes] = set()
    for split, (count, per_class) in parts.items():
        images, labels = digits_images(split)
        assert images.shape == (count, 8, 8)
        assert images.dtype == np.uint8
        assert labels.shape == (count,)
        assert labels.dtype == np.int64
        assert (images.min(), images.max()) == (0, 255)
        assert np.bincount(labels, minlength=10).min() >= per_class
        own = {image.tobytes() for image in images}
        assert not own & seen
        seen |= own


def test_they_are_scikit_learn_s_digits() -> None:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.concatenate([digits_images("train")[0], digits_images("heldout")[0]])
    labels = np.concatenate([digits_images("train")[1], digits_images("heldout")[1]])
    assert np.array_equal(images, np.rint(data.images * 255 / 16))
    assert np.array_equal(labels, data.target)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UsageError) as refused:
        digits_images("test")  # type: ignore[arg-type]
    assert str(refused.value) == (
        "The digits have no part called 'test'.\nKnown parts: train, heldout."
    )


def test_the_folder_holds_the_images_by_class(heldout_folder: Path) -> None:
    images, labels = digits_images("heldout")
    paths = find_images(heldout_folder)
    assert len(paths) == 360
    for path in paths:
        index = int(path.stem.removeprefix("heldout_"))
        assert path.parent.name == str(labels[index])
        with Image.open(path) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), images[index])


def test_a_limit_spreads_over_the_classes(tmp_path: Path) -> None:
    folder = write_digits_folder(tmp_path / "deep" / "few", "train", limit=25)
    counts = [len(list((folder / str(digit)).iterdir())) for digit in range(10)]
    assert counts == [3] * 5 + [2] * 5
