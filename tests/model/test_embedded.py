"""The embedded network: what ships, that it is trained, and the images it was trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_WEIGHTS, digits_images, write_digits_folder
from van_deploy.model.variants import VanConfig, listed_variants


def test_the_files_are_the_ones_the_card_describes() -> None:
    card = json.loads(EMBEDDED_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert EMBEDDED_WEIGHTS.stat().st_size <= 1_000_000
    for name, digest in card["sha256"].items():
        content = (EMBEDDED_WEIGHTS.parent / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    with safe_open(EMBEDDED_WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    for name in ("preprocessing", "classes", "training"):
        assert json.loads(metadata[name]) == card[name]
    assert metadata["licence"] == card["data"]["licence"] == "CC BY 4.0"
    assert "Alpaydin" in metadata["attribution"]
    loaded = load_van("van_digits")
    assert loaded.class_names == tuple(card["classes"])
    assert loaded.config.parameter_count() == card["parameters"]
    stated: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()
    }
    assert loaded.config == VanConfig(**stated)
    listed = listed_variants()[-1]
    assert (listed.parameters, listed.image_size) == (card["parameters"], 64)
    assert listed.here == str(EMBEDDED_WEIGHTS)


def test_every_part_that_a_rewrite_touches_has_learnt_something() -> None:
    for name, value in load_van("van_digits").model.state_dict().items():
        if "layer_scale" in name:
            assert (value - 0.01).abs().mean() > 0.05, name
        elif name.endswith("running_var"):
            assert value.max() / value.min() > 1.2, name
        elif "norm" in name and name.endswith(("weight", "bias", "running_mean")):
            assert value.std() > 0.005, name


def test_both_parts_are_scikit_learn_s_digits_and_share_no_image() -> None:
    train, heldout = digits_images("train"), digits_images("heldout")
    assert (len(train[0]), len(heldout[0])) == (1437, 360)
    assert not {i.tobytes() for i in train[0]} & {i.tobytes() for i in heldout[0]}
    assert np.bincount(heldout[1], minlength=10).min() >= 30
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.rint(data.images * 255 / 16)
    assert np.array_equal(np.concatenate([train[0], heldout[0]]), images)
    assert np.array_equal(np.concatenate([train[1], heldout[1]]), data.target)


def test_the_folder_holds_the_images_by_class(tmp_path: Path) -> None:
    images, labels = digits_images("heldout")
    paths = list(write_digits_folder(tmp_path / "heldout", "heldout").rglob("*.png"))
    assert len(paths) == 360
    for path in paths:
        index = int(path.stem.removeprefix("heldout_"))
        assert path.parent.name == str(labels[index])
        with Image.open(path) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), images[index])
    folder = write_digits_folder(tmp_path / "deep" / "few", "train", limit=25)
    counts = [len(list((folder / str(digit)).iterdir())) for digit in range(10)]
    assert counts == [3] * 5 + [2] * 5
