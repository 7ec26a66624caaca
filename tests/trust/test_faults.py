"""A seeded share of `make faults`: killed commands, full disks, writers side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from reliability.faults import full_disk
from reliability.steps import killed_at_every_step
from reliability.trials import Trials, bundle_is_whole, finished, van_deploy

pytestmark = pytest.mark.slow


def judged(found: list[Trials]) -> None:
    assert [sentence for trials in found for sentence in trials.broken] == []
    if all(trials.skipped for trials in found):
        pytest.skip("; ".join(trials.skipped for trials in found))
    assert any(trials.outcomes for trials in found)


def test_a_killed_command(tmp_path: Path) -> None:
    judged(killed_at_every_step(tmp_path, ["report"]))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reliability.faults.SIZES_KIB", (256, 900))
    judged(full_disk(tmp_path, ["build"]))


def test_a_mixture_would_be_seen(tmp_path: Path) -> None:
    folder = tmp_path / "van_digits"
    assert bundle_is_whole(folder) == ""
    assert finished(van_deploy("export", "van_digits", "--output", folder))[0] == 0
    assert bundle_is_whole(folder) == ""
    (folder / "model.onnx").write_bytes(b"half")
    assert "model.onnx" in bundle_is_whole(folder)
    (folder / "manifest.json").unlink()
    assert "has no manifest and holds" in bundle_is_whole(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".staging-x").mkdir()
    assert bundle_is_whole(folder) == "", "the next writer sweeps that up"
