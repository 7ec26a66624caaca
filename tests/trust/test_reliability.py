"""A seeded share of `make fuzz` and `make faults`, and tests of their failure detection."""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from reliability.corruption import Draw, corrupt_document, find_failure
from reliability.faults import (
    COMMANDS,
    FaultResult,
    bundle_problem,
    full_disk,
    interrupt_every_step,
    run_command,
)
from reliability.fuzz import fuzz, run_case
from reliability.kinds import KINDS
from van_deploy.environment.hardware import peak_memory_bytes

CASES = 11  # of each kind


@pytest.mark.slow
def test_corrupt_files_are_accepted_or_rejected_with_a_documented_exit_code(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed, so there is no engine to corrupt")
    total = Counter[int]()
    for kind in KINDS:
        codes, _, failure = fuzz(kind, 1, CASES, tmp_path / "valid")  # `make fuzz` uses seed 0
        assert failure == ""
        assert set(codes) <= set(range(6))
        total.update(codes)
        if kind in {"manifest", "calibration", "recipe"}:
            assert 0 < codes[0] < codes.total(), f"all files of {kind} have the same outcome"
    assert total.total() - total[0] > total.total() / 3, "few are rejected"


def test_fuzzer_detects_crashes_and_bad_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also high memory use and executed code."""
    executed: list[str] = []
    limit = peak_memory_bytes() + 2**30  # this process has run other tests before

    def fails() -> object:
        raise KeyError("x")

    options: Any = {"valid": tmp_path, "folder": tmp_path, "executed": executed}
    cases: tuple[tuple[Callable[[], object], int, str], ...] = (
        (lambda: 0, limit, ""),
        (lambda: 0, 1, "exit code 0, "),
        (fails, limit, "KeyError: 'x'"),
        (lambda: 9, limit, "exit code 9"),
        (lambda: executed.append("os.system"), limit, "executed ['os.system']"),
        ((tmp_path / "executed").touch, limit, "executed the payload"),
    )
    for read, most, expected in cases:
        monkeypatch.setitem(KINDS, "image", (1, "", lambda *_, read=read: read))
        case = partial(run_case, kind="image", memory_limit_bytes=most, **options)
        failure = find_failure(case, 0, 1)
        assert failure.startswith(expected)
        assert bool(failure) == bool(expected)


def test_corrupt_documents_differ_from_the_original() -> None:
    document, changed = b'{"a": [1, 2, {"b": "c"}], "d": null}', list[bool]()

    def corrupt(draw: Draw) -> None:
        for data, suffix in ((document, ".json"), (b'[model]\nname = "x"\n', ".toml")):
            corrupted = corrupt_document(draw, data, suffix)
            assert isinstance(corrupted, bytes)
            changed.append(corrupted != data)

    assert find_failure(corrupt, 0, 50) == ""
    assert sum(changed) > len(changed) / 2


def test_find_failure_reports_one_of_several_failures() -> None:
    def fails(draw: Draw) -> None:
        if draw(st.booleans()):
            raise AssertionError("first")
        assert not draw(st.booleans()), "second"

    assert find_failure(fails, 0, 50).startswith(("first", "second"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "args"),
    [(interrupt_every_step, (["report"], ["kill"])), (full_disk, (["build"], (256, 900)))],
)
def test_bundle_survives_faults(
    tmp_path: Path, inject: Callable[..., Iterable[FaultResult]], args: Any
) -> None:
    results = list(inject(tmp_path, *args))
    assert [message for result in results for message in result.failures] == []
    if all(result.skipped for result in results):
        pytest.skip("; ".join(result.skipped for result in results))
    assert any(result.outcomes for result in results)


@pytest.mark.slow
def test_fault_injection_detects_a_damaged_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "van_digits"
    assert bundle_problem(folder) == ""
    assert run_command(COMMANDS["export"], folder)[0] == 0
    assert bundle_problem(folder) == ""
    (folder / "model.onnx").write_bytes(b"half")
    assert "model.onnx" in bundle_problem(folder)
    (folder / "manifest.json").unlink()
    assert "has no manifest and contains" in bundle_problem(folder)
    shutil.rmtree(folder)
    (folder / ".staging-x").mkdir(parents=True)
    assert bundle_problem(folder) == "", "the next writer removes it"
