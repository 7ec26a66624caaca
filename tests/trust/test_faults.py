"""A seeded share of `make faults`: killed commands, full disks, writers side by side."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from reliability.faults import Trials, bundle_is_whole, full_disk, stopped_at_every_step, van_deploy

pytestmark = pytest.mark.slow


def judged(found: Iterable[Trials]) -> None:
    every = list(found)
    assert [sentence for trials in every for sentence in trials.broken] == []
    if all(trials.skipped for trials in every):
        pytest.skip("; ".join(trials.skipped for trials in every))
    assert any(trials.outcomes for trials in every)


def test_a_killed_command(tmp_path: Path) -> None:
    judged(stopped_at_every_step(tmp_path, ["report"], ["kill"]))


def test_a_full_disk(tmp_path: Path) -> None:
    judged(full_disk(tmp_path, ["build"], (256, 900)))


def test_a_mixture_would_be_seen(tmp_path: Path) -> None:
    folder = tmp_path / "van_digits"
    assert bundle_is_whole(folder) == ""
    assert van_deploy("export", "van_digits", "--output", folder)[0] == 0
    assert bundle_is_whole(folder) == ""
    (folder / "model.onnx").write_bytes(b"half")
    assert "model.onnx" in bundle_is_whole(folder)
    (folder / "manifest.json").unlink()
    assert "has no manifest and holds" in bundle_is_whole(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".staging-x").mkdir()
    assert bundle_is_whole(folder) == "", "the next writer sweeps that up"
