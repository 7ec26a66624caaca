"""The GPU report: commands in processes of their own, with limits, and what is kept of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import report
from tests.each import each


@each(
    ("code", "limit_s", "left_s", "state", "reason"),
    [
        ("print('fine')", 60, 60, "done", ""),
        ("raise SystemExit('no such kernel')", 60, 60, "a gate failed", "no such kernel"),
        ("print('TensorRT is missing'); raise SystemExit(3)", 60, 60, "skipped", "TensorRT is"),
        ("raise SystemExit(4)", 60, 60, "failed", "no word"),
        (
            "import subprocess, sys; print('begun', flush=True); "
            "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
            *(1.5, 60, "stopped", "it took more than 2 s"),
        ),
        ("print('never')", 60, 5, "skipped", "5 s of the budget were left"),
    ],
)
def test_what_becomes_of_a_step(
    tmp_path: Path, code: str, limit_s: float, left_s: float, state: str, reason: str
) -> None:
    (tmp_path / "step.py").write_text(code)
    start = time.monotonic()
    step = report.Step("step", [str(tmp_path / "step.py")], limit_s)
    step.run(tmp_path, left_s)
    assert (step.state, reason in step.reason) == (state, True), step
    assert time.monotonic() - start < 30, "what it started is ended, too"
    assert ("begun" in step.output) == (state == "stopped")


@each("part", ["a", "b"])
def test_every_step_has_a_command_and_a_reason_where_it_needs_a_gpu(part: str) -> None:
    here, there = (list(report.steps_of(part, device)) for device in ("cpu", "cuda:0"))
    names = [step.name for step in there]
    assert len(names) == len(set(names))
    assert names == [step.name for step in here]
    assert not any(step.skip for step in there)
    assert all("cuda" not in " ".join(step.words) for step in here if not step.skip)


def test_a_run_keeps_results_and_a_page(tmp_path: Path) -> None:
    words = ["--part", "a", "--device", "cpu", "--output", str(tmp_path), "--only", "doctor"]
    done = subprocess.run([sys.executable, report.__file__, *words], check=False)
    assert done.returncode == 0
    (step,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (step["name"], step["state"]) == ("doctor", "done")
    text = (tmp_path / "results.md").read_text()
    assert "| doctor | done |" in text
    assert "`van-deploy doctor`" in text
    assert "export ONNX files" in text
