"""The GPU report: steps in processes with time limits, and the saved results."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import report
from tests.conftest import Cli
from tests.each import each
from van_deploy.bench.contenders import ORT_CUDA_VARIANTS, PYTORCH_ON_GPU, select_contenders
from van_deploy.bench.document import Contender

SLEEPS = """
import subprocess, sys
print('begun', flush=True)
subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"""
OWN, OTHER = "van-deploy", "pytest"  # modules of these names in the step's folder are run
STEPS = [
    (OWN, "print('fine')", "done", ""),
    (OWN, "raise SystemExit('SQNR 15.9')", "a gate did not pass", "SQNR 15.9"),
    (OWN, "print('TensorRT is missing'); raise SystemExit(3)", "skipped", "TensorRT is"),
    (OWN, "raise SystemExit(4)", "failed", "no output"),
    (OTHER, "print('27 skipped in 1 s')", "done", "27 skipped in 1 s"),
    (OTHER, "raise SystemExit('1 failed in 1 s')", "failed", "1 failed in 1 s"),
    (OTHER, "raise SystemExit(3)", "failed", "no output"),
    (OTHER, SLEEPS, "stopped", "it took more than 2 s"),
    (OTHER, "print('never')", "skipped", "5 s of the budget were left"),
]


@each("program, code, state, reason", STEPS)
def test_states_of_a_step(tmp_path: Path, program: str, code: str, state: str, reason: str) -> None:
    (tmp_path / f"{program.replace('-', '_')}.py").write_text(code)
    start = time.monotonic()
    step = report.Step("step", [program], 1.5 if code == SLEEPS else 60)
    step.run(tmp_path, 5 if "never" in code else 60)
    assert (step.state, reason in step.reason) == (state, True), step
    assert bool(step.reason) == bool(reason)
    assert time.monotonic() - start < 30, "child processes are killed, too"
    assert ("begun" in step.output) == (state == "stopped")


@each("part", report.BUDGETS)
def test_steps_are_the_same_with_and_without_a_gpu(part: str) -> None:
    on_cpu, on_gpu = (list(report.steps_of(part, device)) for device in ("cpu", "cuda:0"))
    names = [step.name for step in on_gpu]
    assert len(names) == len(set(names))
    assert names == [step.name for step in on_cpu]
    assert not any(step.skip for step in on_gpu)
    assert all("cuda" not in " ".join(step.words) for step in on_cpu if not step.skip)


@each("part", report.BUDGETS)
@each("device", ["cpu", "cuda:0"])
def test_steps_are_valid_commands(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, device: str
) -> None:
    monkeypatch.chdir(tmp_path)  # without bundles, so that commands end after reading options
    for step in report.steps_of(part, device):
        if step.words[0] == "van-deploy":
            result = cli(*step.words[1:], *(["--help"] if "export" in step.words else []))
            assert result.exit_code in (0, 5), (step.words, result.output)


def test_runners_of_each_gpu_benchmark_exist_where_tensorrt_is_not_installed() -> None:
    names = [f"{way}/{p}" for way in (*ORT_CUDA_VARIANTS, "inductor") for p in ("fp32", "fp16")]
    ready = dict.fromkeys([*PYTORCH_ON_GPU, *names], Contender("x", "pytorch", "fp32"))
    steps = [step for part in report.BUDGETS for step in report.steps_of(part, "cuda:0")]
    for words in (step.words for step in steps if "--runners" in step.words):
        select_contenders((ready, {}), words[words.index("--runners") + 1].split(","))


def test_results_are_saved_as_json_and_as_a_page(tmp_path: Path) -> None:
    words = ["--part", "a", "--device", "cpu", "--output", str(tmp_path), "--only", "doctor"]
    done = subprocess.run([sys.executable, report.__file__, *words], check=False)
    assert done.returncode == 0
    (step,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (step["name"], step["state"]) == ("doctor", "done")
    text = (tmp_path / "results.md").read_text()
    assert "| doctor | done |" in text
    assert "`van-deploy doctor`" in text
    assert "export ONNX files" in text
