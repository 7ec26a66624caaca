"""The kernels in Triton's interpreter, compared with float64 PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("interpreted_cases.py")
ROOT = SCRIPT.parents[2]


def failed_cases(count: int, *arguments: str) -> dict[str, float]:
    """Run the cases in another process; return the errors that are NaN or exceed their limit."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(SCRIPT), *arguments]
    run = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    errors = json.loads(run.stdout.splitlines()[-1])
    assert len(errors) == count
    return {name: error for name, error in errors.items() if not error <= 1}


def test_kernels_agree_with_float64() -> None:
    assert failed_cases(15) == {}


@pytest.mark.slow
def test_random_shapes_and_whole_networks_agree_with_float64() -> None:
    assert failed_cases(20, "--slow") == {}
