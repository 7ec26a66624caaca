"""A seeded share of `make fuzz` and `make faults`, and tests of the tools' failure detection."""

import argparse
import importlib.util
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from benchmarks.accuracy import export_networks
from benchmarks.table import names_of
from reliability import faults, fuzz, mutate
from reliability.corruption import Draw, find_failure
from reliability.kinds import KINDS
from reliability.outcome import Outcome
from van_deploy.environment.hardware import peak_memory_bytes

CASES = 11  # of each kind


@pytest.mark.slow
def test_corrupt_files_are_accepted_or_rejected_with_a_documented_exit_code(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed, so there is no engine to corrupt")
    total = Counter[int]()
    for kind in KINDS:
        codes, _, failure = fuzz.fuzz(kind, 1, CASES, tmp_path / "valid")  # `make fuzz`: seed 0
        assert failure == ""
        total.update(codes)
        if kind in {"manifest", "calibration", "recipe"}:
            assert 0 < codes[0] < codes.total(), f"all files of {kind} have the same outcome"
    assert total.total() - total[0] > total.total() / 3, "few are rejected"


def test_fuzzer_detects_crashes_bad_exit_codes_high_memory_and_executed_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[str] = []
    limit = peak_memory_bytes() + 2**30  # this process has run other tests before
    marker = tmp_path / "executed"
    cases: tuple[tuple[Any, int, str], ...] = (
        ("list", limit, ""),
        ("list", 1, " GB"),
        ({}.__getitem__, limit, "KeyError: PosixPath('x')"),
        ("crash", limit, "exit code 9"),
        (lambda _: executed.append("os.system"), limit, "executed ['os.system']"),
        (lambda _: marker.touch(), limit, "executed the payload"),
    )
    monkeypatch.setattr(fuzz, "run_command", {"list": 0, "crash": 9}.get)
    for read, most, expected in cases:
        monkeypatch.setattr(fuzz, "MEMORY_LIMIT_BYTES", most)
        monkeypatch.setitem(KINDS, "image", (1, "", lambda *_: Path("x"), read))
        failure = find_failure(
            lambda draw: fuzz.run_case(draw, "image", tmp_path, tmp_path, executed), 0, 1
        )
        assert failure.endswith(expected)
        assert bool(failure) == bool(expected)


def test_find_failure_reports_one_of_several_failures() -> None:
    def fails(draw: Draw) -> None:
        if draw(st.booleans()):
            raise AssertionError("first")
        assert not draw(st.booleans()), "second"

    assert find_failure(fails, 0, 50).startswith(("first", "second"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inject", "args"),
    [
        (faults.interrupt_every_step, (["report"], ["kill"])),
        (faults.full_disk, (["build"], (256, 900))),
    ],
)
def test_bundle_survives_faults(
    tmp_path: Path, inject: Callable[..., Iterable[Outcome]], args: Any
) -> None:
    outcomes = list(inject(tmp_path, *args))
    assert [outcome.failure for outcome in outcomes if outcome.failure] == []
    if all(outcome.text.startswith("skipped") for outcome in outcomes):
        pytest.skip(outcomes[0].text)


@pytest.mark.slow
def test_fault_injection_detects_a_damaged_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "van_digits"
    assert faults.bundle_problem(folder) == ""
    assert faults.run_command(faults.COMMANDS["export"], folder)[0] == 0
    assert faults.bundle_problem(folder) == ""
    (folder / "model.onnx").write_bytes(b"half")
    assert "model.onnx" in faults.bundle_problem(folder)
    (folder / "manifest.json").unlink()
    assert "has no manifest and contains" in faults.bundle_problem(folder)
    shutil.rmtree(folder)
    (folder / ".staging-x").mkdir(parents=True)
    assert faults.bundle_problem(folder) == "", "the next writer removes it"


def test_tools_refuse_unknown_names_half_given_networks_and_tests_that_do_not_run(
    tmp_path: Path,
) -> None:
    parse = names_of(["fuzz", "load"])["type"]
    assert parse("load,fuzz") == ["load", "fuzz"]
    with pytest.raises(argparse.ArgumentTypeError, match="'faults' is not one of fuzz, load"):
        parse("fuzz,faults")
    with pytest.raises(ValueError, match="give all of checkpoint=FILE"):
        next(export_networks(tmp_path, "mine.pth", "", ""))
    mutant = {"file": "files.py", "area": "bundle"}  # there are no tests in the folder
    with pytest.raises(RuntimeError, match="without a mutant, pytest exits with 5 for bundle"):
        mutate.test_mutant(mutant, Path(sys.executable), tmp_path, {})
