"""Embedded graphs are proved against the plain ones before they are written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.artifacts import Copy
from van_deploy.bundle import Bundle
from van_deploy.errors import GateFailed, UsageError
from van_deploy.graph.embed import embed_preprocessing
from van_deploy.serve import embedded
from van_deploy.serve.embedded import embed_artefacts

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)


def test_it_is_the_same_network_or_nothing_is_written(
    digits: Bundle, copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, outputs = copy_of(digits), ("logits", "probabilities", "top5")
    with pytest.raises(UsageError, match="There is nothing to embed"):
        embed_artefacts(Bundle.open(copy), PIXELS, "none")
    (made,) = embed_artefacts(Bundle.open(copy), PIXELS, "normalize", outputs)
    assert (made.name, made.base, made.reused) == ("fp32-normalize", "fp32", False)
    assert made.agreement is not None
    assert [row["batch"] for row in made.agreement["batches"]] == [1, 2, 3]
    assert max(row["difference"] for row in made.agreement["batches"]) < 1e-6
    (again,) = embed_artefacts(Bundle.open(copy), PIXELS, "normalize", outputs)
    assert again.reused

    def wrong(model: Any, preprocessing: Any, *more: Any) -> Any:
        mean = tuple(value + 0.01 for value in preprocessing.mean)
        return embed_preprocessing(model, replace(preprocessing, mean=mean), *more)

    monkeypatch.setattr(embedded, "embed_preprocessing", wrong)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(GateFailed, match="At batch 1 'fp32-normalize' differs from 'fp32' by"):
        embed_artefacts(Bundle.open(copy), PIXELS, "normalize")
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
