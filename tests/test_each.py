"""``@each`` tries every case, names those that failed, and gives each a folder of its own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from tests.each import each


def run(test: Any, **fixtures: Path) -> None:
    """Run a test as pytest would: its cases are no arguments any more."""
    test(**fixtures)


def test_every_case_is_tried_and_every_failure_named() -> None:
    tried = []

    @each("text", ["x", "1", "y"])
    def refused(text: str) -> None:
        tried.append(text)
        with pytest.raises(ValueError, match="invalid literal"):
            int(text)

    with pytest.raises(AssertionError) as caught:
        run(refused)
    assert tried == ["x", "1", "y"]
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 of 3 cases failed"
    assert lines[1].startswith("('1',): ")
    assert caught.value.__cause__ is not None

    @each("reason", ["no GPU"])
    def skipped(reason: str) -> None:
        pytest.skip(reason)

    with pytest.raises(pytest.skip.Exception, match="no GPU"):
        run(skipped)


def test_folders_are_new_for_each_case(tmp_path: Path) -> None:
    seen = []

    @each("name", ["a", "b"], fresh="lent")
    def written(tmp_path: Path, lent: Path, name: str) -> None:
        seen.append((sorted(p.name for p in lent.iterdir()), list(tmp_path.iterdir())))
        (tmp_path / name).touch()
        (lent / name).touch()

    assert list(inspect.signature(written).parameters) == ["tmp_path", "lent"]
    lent = tmp_path / "lent"
    lent.mkdir()
    (lent / "there").touch()
    run(written, tmp_path=tmp_path, lent=lent)
    assert seen == [(["there"], []), (["there"], [])]
    assert [p.name for p in lent.iterdir()] == ["there"]
