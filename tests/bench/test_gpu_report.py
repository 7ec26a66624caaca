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

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"

IN_TURN = """
import sys, time, pathlib
sys.path.insert(0, {scripts!r})
from turns import turn
from result import Result
with turn():
    start = time.monotonic()
    time.sleep(0.4)
    end = time.monotonic()
Result(pathlib.Path({out!r})).fact("span", [start, end])
"""

IN_BACKGROUND = """
import time, pathlib
ticks = []
while len(ticks) < 60:
    ticks.append(time.monotonic())
    time.sleep(0.02)
pathlib.Path({out!r}).write_text(__import__("json").dumps({{"rows": [], "ticks": ticks}}))
"""


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The modules of benchmarks/gpu, which run as files and import each other by name."""
    names = ("step", "turns", "result", "page", "part_a", "part_b", "report")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def context(scripts: Any, tmp_path: Path) -> Any:
    folders = [tmp_path / name for name in ("output", "work", "cache")]
    for folder in folders:
        folder.mkdir()
    return scripts.step.Context("a", *folders, "cpu", True, None, "report.py --part a")


def step_of(scripts: Any, name: str, code: str, **more: Any) -> Any:
    return scripts.step.Step(name, f"{name}.", [sys.executable, "-c", code], **more)


def run(scripts: Any, context: Any, steps: list[Any], budget: float = 60, parallel: int = 3) -> Any:
    scripts.report.Report(context, steps, budget, parallel).run()
    return json.loads((context.output / "results.json").read_text())["steps"]


def test_others_are_stopped_during_a_turn(scripts: Any, context: Any) -> None:
    outs = {name: str(context.work / f"{name}.json") for name in ("one", "two", "rest")}
    codes = {
        name: (IN_BACKGROUND if name == "rest" else IN_TURN).format(scripts=str(SCRIPTS), out=out)
        for name, out in outs.items()
    }
    steps = run(scripts, context, [step_of(scripts, name, codes[name]) for name in codes])
    assert [step["state"] for step in steps] == ["done"] * 3
    spans = [steps[index]["content"]["facts"]["span"] for index in (0, 1)]
    first, second = sorted(spans)
    assert first[1] <= second[0]
    ticks = steps[2]["content"]["ticks"]
    margin = 0.05  # a signal arrives a little later than it was sent
    for start, end in spans:
        assert not [tick for tick in ticks if start + margin < tick < end - margin]


def test_a_script_without_turns_is_held_at_its_line_until_it_has_the_machine(
    scripts: Any, context: Any
) -> None:
    out = {name: str(context.work / f"{name}.json") for name in ("turns", "none")}
    held = (
        "import time, json, pathlib\n"
        "print('built', flush=True); time.sleep(0.1)\n"
        "print('step=copy', flush=True); time.sleep(0.02)\n"
        "start = time.monotonic(); time.sleep(0.4); end = time.monotonic()\n"
        f"pathlib.Path({out['none']!r}).write_text(json.dumps({{'span': [start, end]}}))"
    )
    steps = [
        step_of(scripts, "turns", IN_TURN.format(scripts=str(SCRIPTS), out=out["turns"])),
        step_of(scripts, "none", held, turn_at="step=copy"),
    ]
    first, second = run(scripts, context, steps)
    spans = sorted([first["content"]["facts"]["span"], second["content"]["span"]])
    assert spans[0][1] <= spans[1][0] + 0.05
    assert second["state"] == "done"


def test_a_failure_a_timeout_and_a_refusal_do_not_stop_the_others(
    scripts: Any, context: Any
) -> None:
    steps = run(
        scripts,
        context,
        [
            step_of(scripts, "breaks", "raise SystemExit('no such kernel')"),
            step_of(scripts, "hangs", "import time; time.sleep(60)", limit_s=1),
            step_of(scripts, "cannot", "print('no TensorRT here'); raise SystemExit(75)"),
            step_of(scripts, "never", "", skip="no NVIDIA driver answers here"),
            step_of(scripts, "late", "", least_s=1000),
            step_of(scripts, "works", "print('fine')"),
        ],
    )
    told = {step["name"]: (step["state"], step["reason"]) for step in steps}
    assert told["breaks"] == ("failed", "exit code 1: no such kernel")
    assert told["hangs"] == ("stopped", "it took more than 1 s")
    assert told["cannot"] == ("skipped", "no TensorRT here")
    assert told["never"] == ("skipped", "no NVIDIA driver answers here")
    assert told["late"][0] == "skipped"
    assert told["late"][1].endswith("s of the budget were left, it needs about 1000")
    assert told["works"] == ("done", "")
    page = (context.output / "results.md").read_text()
    assert "| breaks | failed |" in page
    assert "no TensorRT here" in page


def test_the_budget_ends_what_still_runs_and_keeps_its_rows(scripts: Any, context: Any) -> None:
    out = str(context.work / "long.json")
    code = (
        f"import sys, pathlib, time; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "from result import Result\n"
        f"Result(pathlib.Path({out!r})).row(network='van_b0', runner='r', batch=1, queued_ms=2.0)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    (step,) = run(scripts, context, [step_of(scripts, "long", code, least_s=0)], budget=8)
    assert time.monotonic() - start < 10
    assert (step["state"], step["reason"]) == (
        "stopped",
        "the budget of the whole report was spent",
    )
    assert step["content"]["rows"][0]["queued_ms"] == 2.0


def test_rows_are_held_against_the_best_of_pytorch_and_the_floor(scripts: Any) -> None:
    def row(runner: str, group: str, ms: float) -> dict[str, Any]:
        return {
            "network": "van_b0",
            "image_size": 224,
            "runner": runner,
            "group": group,
            "batch": 128,
            "queued_ms": ms,
        }

    rows = [
        row("pytorch-eager-fp32", "pytorch", 40.0),
        row("pytorch-compile-fp16", "pytorch", 10.0),
        row("kernels, plan auto", "van-deploy", 4.0),
    ]
    ceilings = {"ops_per_s": {"fp16": 8e14}, "bytes_per_s": 3e12, "how": {"memory": "copy"}}
    document = {
        "steps": [
            {"name": "ceilings", "content": {"facts": {"ceilings": ceilings}}},
            {"name": "x", "content": {"rows": rows}},
        ]
    }
    ours, best, eager = scripts.page.rows_of(document)
    assert ours["runner"] == "kernels, plan auto"
    assert (ours["times_best"], ours["times_eager"]) == (2.5, 10.0)
    assert (best["times_best"], eager["times_best"]) == (1.0, 0.25)
    # 55.57 MB an image and 8.2 MB of weights at 3 TB/s: 2.37 ms
    assert ours["percent_of_floor"] == pytest.approx(59.3, abs=0.1)


def test_the_page_is_made_from_the_files_of_a_run(scripts: Any, context: Any) -> None:
    run(scripts, context, [step_of(scripts, "works", "print('fine')")])
    command = [sys.executable, str(SCRIPTS / "report.py"), "--page", str(context.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# Results on a GPU")
    assert "| works | ran | 0 |  |" in done.stdout


@pytest.mark.parametrize("part", ["a", "b"])
def test_every_step_has_a_script_or_a_reason(scripts: Any, context: Any, part: str) -> None:
    steps = getattr(getattr(scripts, f"part_{part}"), f"steps_of_{part}")(context)
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    for step in steps:
        assert step.skip or Path(step.command[1]).is_file()
