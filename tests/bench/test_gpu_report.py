"""The GPU report: steps in processes of their own, turns, budgets, and what is kept of them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.each import each

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"

PRELUDE = f"""
import json, pathlib, sys, time
sys.path.insert(0, {str(SCRIPTS)!r})
from result import Result, turn
result = Result(pathlib.Path(sys.argv[1]))
"""
SPAN = "start = time.monotonic(); time.sleep(0.4); result.fact('span', [start, time.monotonic()])"
IN_TURN = f"with turn():\n    {SPAN}"
IN_BACKGROUND = """
ticks = []
while len(ticks) < 60:
    ticks.append(time.monotonic())
    time.sleep(0.02)
result.fact("ticks", ticks)
"""


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The modules of benchmarks/gpu, which run as files and import each other by name."""
    names = ("result", "steps", "page", "report")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def context(scripts: Any, tmp_path: Path) -> Any:
    output, work = tmp_path / "output", tmp_path / "work"
    output.mkdir()
    work.mkdir()
    return scripts.steps.Context("a", output, work, "cpu", True, tmp_path, "report.py --part a")


def run(
    scripts: Any, context: Any, codes: dict[str, str], budget: float = 60, **more: Any
) -> dict[str, dict[str, Any]]:
    steps = [
        scripts.steps.Step(
            name,
            f"{name}.",
            [sys.executable, "-c", PRELUDE + code, str(context.work / f"{name}.json")],
            **more.get(name, {}),
        )
        for name, code in codes.items()
    ]
    scripts.report.Report(context, steps, budget, 3).run()
    document = json.loads((context.output / "results.json").read_text())
    return {step["name"]: step for step in document["steps"]}


def test_others_are_stopped_during_a_turn(scripts: Any, context: Any) -> None:
    steps = run(scripts, context, {"one": IN_TURN, "two": IN_TURN, "rest": IN_BACKGROUND})
    assert [step["state"] for step in steps.values()] == ["done"] * 3
    spans = sorted(steps[name]["content"]["facts"]["span"] for name in ("one", "two"))
    margin = 0.05  # a signal arrives a little later than it was sent
    assert spans[0][1] <= spans[1][0] + margin
    for start, end in spans:
        ticks = steps["rest"]["content"]["facts"]["ticks"]
        assert not [tick for tick in ticks if start + margin < tick < end - margin]


def test_a_failure_a_timeout_and_a_refusal_do_not_stop_the_others(
    scripts: Any, context: Any
) -> None:
    codes = {
        "breaks": "raise SystemExit('no such kernel')",
        "hangs": "time.sleep(60)",
        "cannot": "print('no TensorRT here'); raise SystemExit(75)",
        "never": "",
        "late": "",
        "works": "print('fine')",
    }
    more: dict[str, Any] = {
        "hangs": {"limit_s": 1},
        "never": {"skip": "no driver"},
        "late": {"least_s": 1000},
    }
    steps = run(scripts, context, codes, **more)
    told = {name: (step["state"], step["reason"]) for name, step in steps.items()}
    assert told["breaks"] == ("failed", "exit code 1: no such kernel")
    assert told["hangs"] == ("stopped", "it took more than 1 s")
    assert told["cannot"] == ("skipped", "no TensorRT here")
    assert told["never"] == ("skipped", "no driver")
    assert told["late"][0] == "skipped"
    assert told["late"][1].endswith("s of the budget were left, it needs about 1000")
    assert told["works"] == ("done", "")
    command = [sys.executable, str(SCRIPTS / "report.py"), "--page", str(context.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == (context.output / "results.md").read_text()
    assert done.stdout.startswith("# Results on a GPU")
    assert "| breaks | failed |" in done.stdout
    assert "| works | ran |" in done.stdout


def test_the_budget_ends_what_still_runs_and_keeps_its_rows(scripts: Any, context: Any) -> None:
    row = "result.row(network='van_b0', runner='r', batch=1, queued_ms=2.0, sqnr_db=float('inf'))"
    start = time.monotonic()
    steps = run(scripts, context, {"long": f"{row}; time.sleep(60)"}, 8, long={"least_s": 0})
    assert time.monotonic() - start < 10
    assert steps["long"]["state"] == "stopped"
    assert steps["long"]["reason"] == "the budget of the whole report was spent"
    assert steps["long"]["content"]["rows"][0]["queued_ms"] == 2.0


def test_rows_are_held_against_the_best_of_pytorch_and_the_floor(scripts: Any) -> None:
    rows = [
        {"runner": runner, "group": group, "queued_ms": ms, "network": "van_b0", "batch": 128}
        for runner, group, ms in (
            ("pytorch-eager-fp32", "pytorch", 40.0),
            ("pytorch-compile-fp16", "pytorch", 10.0),
            ("kernels", "van-deploy", 4.0),
        )
    ]
    ceilings = {"ops_per_s": {"fp16": 8e14}, "bytes_per_s": 3e12, "how": {"memory": "copy"}}
    steps = [
        {"name": "ceilings", "content": {"facts": {"ceilings": ceilings}}},
        {"name": "x", "content": {"rows": rows, "facts": {}}},
    ]
    ours, best, eager = scripts.page.rows_of([{"steps": steps}])
    assert ours["runner"] == "kernels"
    assert (ours["times_best"], ours["times_eager"]) == (2.5, 10.0)
    assert (best["times_best"], eager["times_best"]) == (1.0, 0.25)
    # 55.57 MB an image and 8.2 MB of weights at 3 TB/s: 2.37 ms
    assert ours["percent_of_floor"] == pytest.approx(59.3, abs=0.1)


@each("part", ["a", "b"])
def test_every_step_has_a_script_or_a_reason(scripts: Any, context: Any, part: str) -> None:
    steps = getattr(scripts.steps, f"steps_of_{part}")(context)
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    for step in steps:
        assert step.skip or Path(step.command[1]).is_file()
