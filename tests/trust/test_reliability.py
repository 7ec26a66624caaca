"""A seeded share of `make fuzz` and `make faults`, and what they must be able to see."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reliability.faults import (
    COMMANDS,
    Trials,
    bundle_is_whole,
    full_disk,
    stopped_at_every_step,
    van_deploy,
)
from reliability.fuzz import fuzz, outcome
from reliability.kinds import KINDS
from reliability.spoiled import Draw, first_fault, spoiled_document
from van_deploy.environment.hardware import peak_memory_bytes

CASES = 11  # of each kind


@pytest.mark.slow
def test_spoiled_files(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed, so there is no engine to spoil")
    codes = Counter[int]()
    for kind in KINDS:
        found, _, fault = fuzz(kind, 1, CASES, tmp_path / "sound")  # not the seed of `make fuzz`
        assert fault == ""
        codes.update(found)
    assert set(codes) <= set(range(6))
    assert codes.total() - codes[0] > codes.total() / 3, "few are refused"


def test_what_must_not_be_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer sees a traceback, another exit code, much memory, and code that runs."""
    executed: list[str] = []
    more = peak_memory_bytes() + 2**30  # this process has run other tests before

    def fails() -> object:
        raise KeyError("x")

    where: Any = {"sound": tmp_path, "folder": tmp_path, "executed": executed}
    every: tuple[tuple[Callable[[], object], int, str], ...] = (
        (lambda: 0, more, ""),
        (lambda: 0, 1, "exit code 0, "),
        (fails, more, "KeyError: 'x'"),
        (lambda: 9, more, "exit code 9"),
        (lambda: executed.append("os.system"), more, "it ran something: ['os.system']"),
        ((tmp_path / "executed").touch, more, "it ran something: the payload"),
    )
    for read, most, expected in every:
        monkeypatch.setitem(KINDS, "image", (1, "", lambda *_, read=read: read))
        seen = first_fault(partial(outcome, kind="image", most_bytes=most, **where), 0, 1)
        assert seen.startswith(expected)
        assert bool(seen) == bool(expected)


def test_much_is_spoiled_and_stays_bytes() -> None:
    document, found = b'{"a": [1, 2, {"b": "c"}], "d": null}', list[bool]()

    def spoil(draw: Draw) -> None:
        for sound, suffix in ((document, ".json"), (b"[model]\nname = 'x'\n", ".toml")):
            spoiled = spoiled_document(draw, sound, suffix)
            assert isinstance(spoiled, bytes)
            found.append(spoiled != sound)

    assert first_fault(spoil, 0, 50) == ""
    assert sum(found) > len(found) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "how"),
    [(stopped_at_every_step, (["report"], ["kill"])), (full_disk, (["build"], (256, 900)))],
)
def test_bad_days(tmp_path: Path, fault: Callable[..., Iterable[Trials]], how: Any) -> None:
    every = list(fault(tmp_path, *how))
    assert [sentence for trials in every for sentence in trials.broken] == []
    if all(trials.skipped for trials in every):
        pytest.skip("; ".join(trials.skipped for trials in every))
    assert any(trials.outcomes for trials in every)


@pytest.mark.slow
def test_a_mixture_would_be_seen(tmp_path: Path) -> None:
    folder = tmp_path / "van_digits"
    assert bundle_is_whole(folder) == ""
    assert van_deploy(COMMANDS["export"], folder)[0] == 0
    assert bundle_is_whole(folder) == ""
    (folder / "model.onnx").write_bytes(b"half")
    assert "model.onnx" in bundle_is_whole(folder)
    (folder / "manifest.json").unlink()
    assert "has no manifest and holds" in bundle_is_whole(folder)
    shutil.rmtree(folder)
    (folder / ".staging-x").mkdir(parents=True)
    assert bundle_is_whole(folder) == "", "the next writer sweeps that up"
