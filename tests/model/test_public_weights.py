"""``make public-weights``, against the local hub."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from training import public_weights
from van_deploy.model.van import random_van
from van_deploy.model.variants import NAMES, VARIANTS

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub


@pytest.fixture
def published(hub: FakeHub) -> bytes:
    """Return the file that the local hub publishes as van_b0's."""
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    buffer = io.BytesIO()
    torch.save({"state_dict": random_van(VARIANTS["van_b0"].config, 1).state_dict()}, buffer)
    hub.repos[repo] = {file: buffer.getvalue()}
    return buffer.getvalue()


def test_what_is_not_as_published_is_told(
    published: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"export": (0, ""), "verify": (0, ""), "evaluate": (0, "")}
    monkeypatch.setattr(public_weights, "command", lambda word, *_: answers[word])

    def told(code: int, *words: str) -> str:
        assert public_weights.main(words) == code
        return capsys.readouterr().out

    digest = hashlib.sha256(published).hexdigest()
    first = told(0, "van_b0")
    assert f"sha256    {digest}\n  pinned    (not yet: pin the line above)" in first
    assert "top-1     not measured (no --imagenet)\nvan_b0: as published" in first
    for top1, code in ((0.754, 0), (0.74, 1)):
        answers["evaluate"] = (0, f'{{"accuracy": {{"fp32": {{"top1": {top1}}}}}}}')
        measured = told(code, "van_b0", "--imagenet", "val")
    assert "van_b0: top-1 is 74.00 %, published 75.4 %" in measured
    answers["verify"] = (1, "")
    assert "van_b0: verify ended with exit code 1" in told(1, "van_b0", "--imagenet", "val")
    assert "van_b1: Visual-Attention-Network/VAN-Small-original/" in told(1, "van_b1")
    pinned = replace(VARIANTS["van_b0"], sha256="0" * 64)
    monkeypatch.setitem(NAMES, "van_b0", pinned)
    assert f"its SHA-256 is {digest}, the expected one {'0' * 64}." in told(1, "van_b0")


@pytest.mark.slow
def test_the_whole_of_it(
    published: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert public_weights.main(["van_b0", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "van_b0" / "model.onnx").exists()
    told = capfd.readouterr().out
    assert "export    passed" in told
    assert "verify    passed" in told
