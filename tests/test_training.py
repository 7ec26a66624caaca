"""Training of the packaged network: one short epoch."""

import json
from pathlib import Path

import pytest
import torch

from training.train_digits import Schedule, evaluate, make
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_FOLDER, EMBEDDED_WEIGHTS


@pytest.mark.slow
def test_one_short_epoch(tmp_path: Path) -> None:
    pytest.importorskip("sklearn.datasets")
    make(tmp_path, Schedule(epochs=1, batch=128, image_size=32))
    weights = tmp_path / EMBEDDED_WEIGHTS.name
    card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["heldout"] == evaluate(tmp_path)
    assert card["heldout"]["images"] == 360
    assert card["training"]["epochs"] == 1
    loaded = load_van(str(weights))
    assert str(loaded.preprocessing).startswith("32x32 bicubic, crop 1, mean ")
    assert loaded.preprocessing.source == "the training of van_digits"
    assert loaded.class_names == tuple("0123456789")
    assert loaded.model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_accuracy_of_the_packaged_network() -> None:
    card = json.loads(EMBEDDED_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    measured = evaluate(EMBEDDED_FOLDER)
    assert measured == card["heldout"]
    assert measured["images"] == 360
    assert 97.5 <= measured["top1_percent"] < 100
