"""The kernels in Triton's interpreter, compared with float64 PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("interpreted_cases.py")
ROOT = SCRIPT.parents[2]


def run_cases(*arguments: str) -> dict[str, Any]:
    """Run the cases in another process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(json.loads(run.stdout.splitlines()[-1]))


def failed(errors: dict[str, float]) -> dict[str, float]:
    """Return the cases whose error exceeds the limit of their type or is NaN."""
    limits = {"float16": 2e-3, "bfloat16": 1.6e-2}
    return {
        name: error
        for name, error in errors.items()
        if not error <= limits.get(name.split()[-1], 2e-6)
    }


@pytest.fixture(scope="module")
def fast() -> dict[str, Any]:
    return run_cases()


def test_kernels_agree_with_float64(fast: dict[str, Any]) -> None:
    assert len(fast["errors"]) == 15
    assert failed(fast["errors"]) == {}


@pytest.mark.slow
def test_random_shapes_and_whole_networks_agree_with_float64() -> None:
    errors = run_cases("--slow")["errors"]
    assert len(errors) == 20
    assert failed(errors) == {}


def test_invalid_arguments_are_refused_before_launch(fast: dict[str, Any]) -> None:
    assert len(fast["refused"]) == 8
    assert {words: m for words, m in fast["refused"].items() if words not in m} == {}
