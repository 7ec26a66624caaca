"""Embedded graphs are proved against the plain ones before they are written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from van_deploy.bundle import Bundle
from van_deploy.errors import GateFailed, UsageError
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.serve import embedded
from van_deploy.serve.embedded import embed_artefacts


@pytest.fixture
def copy(digits: Bundle, tmp_path: Path) -> Bundle:
    shutil.copytree(digits.path, tmp_path / "digits")
    return Bundle.open(tmp_path / "digits")


def pixels(bundle: Bundle) -> Any:
    preprocessing = bundle.manifest.preprocessing
    shape = (3, *preprocessing.sides, preprocessing.channels)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_it_is_the_same_network_and_is_reused(copy: Bundle) -> None:
    outputs = ("logits", "probabilities", "top5")
    (made,) = embed_artefacts(copy, pixels(copy), "normalize", outputs)
    assert (made.name, made.base, made.reused) == ("fp32-normalize", "fp32", False)
    assert made.agreement is not None
    assert [row["batch"] for row in made.agreement["batches"]] == [1, 2, 3]
    assert max(row["difference"] for row in made.agreement["batches"]) < 1e-6
    (again,) = embed_artefacts(Bundle.open(copy.path), pixels(copy), "normalize", outputs)
    assert again.reused


def test_another_mean_is_refused_and_nothing_is_written(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, preprocessing: Any, *more: Any) -> Any:
        mean = tuple(value + 0.01 for value in preprocessing.mean)
        return embed_preprocessing(model, replace(preprocessing, mean=mean), *more)

    monkeypatch.setattr(embedded, "embed_preprocessing", wrong)
    before = {path: path.read_bytes() for path in copy.path.rglob("*") if path.is_file()}
    with pytest.raises(GateFailed, match="At batch 1 'fp32-normalize' differs from 'fp32' by"):
        embed_artefacts(copy, pixels(copy), "normalize")
    assert {p: p.read_bytes() for p in copy.path.rglob("*") if p.is_file()} == before


def test_nothing_to_embed(copy: Bundle) -> None:
    with pytest.raises(UsageError, match="There is nothing to embed"):
        embed_artefacts(copy, pixels(copy), "none")
