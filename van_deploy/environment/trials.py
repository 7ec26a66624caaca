"""What really runs here, found out by running it, each trial in a process of its own.

A package's metadata says what was meant to work. ONNX Runtime lists providers whose libraries
do not load, PyTorch may be built without CUDA, and bindings import without a driver.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping

__all__ = ["TRIALS", "tried"]

WAIT_S = 120.0
_PROVIDER = """
import sys, onnxruntime
from van_deploy.runners.onnxruntime_cuda import provider_starts
sys.exit(not provider_starts(onnxruntime, "{}", quiet=False))
"""
_TENSORRT = """
import {0} as trt
log = trt.Logger(trt.Logger.ERROR)
{1}
"""
TRIALS: Mapping[str, str] = {
    "gpu": "from van_deploy.runners.cuda import require_cuda\n"
    "cuda = require_cuda()\ncuda.call('cudaFree', cuda.call('cudaMalloc', 1))",
    "torch": "import torch\ntorch.ones(1, device='cuda').item()",
    "ort-cpu": _PROVIDER.format("CPUExecutionProvider"),
    "ort-cuda": _PROVIDER.format("CUDAExecutionProvider"),
    "tensorrt": _TENSORRT.format("tensorrt", "trt.Runtime(log)"),
    "tensorrt-rtx": _TENSORRT.format("tensorrt_rtx", "trt.Builder(log)"),
    "tensorrt-rtx-run": _TENSORRT.format("tensorrt_rtx", "trt.Runtime(log)"),
}
"""A program for each: it takes a byte on the GPU, opens a session of one operator, makes a
runtime. It ends with 0 where that works."""


def tried(names: Iterable[str], trials: Mapping[str, str] = TRIALS) -> dict[str, str]:
    """Return, for each of some trials, why it failed; "" where it did not.

    They run at the same time; each gets :data:`WAIT_S` seconds.
    """
    pipe = subprocess.PIPE
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", trials[name]], stdout=pipe, stderr=pipe, text=True
        )
        for name in names
    }
    return {name: _outcome(process) for name, process in running.items()}


def _outcome(process: subprocess.Popen[str]) -> str:
    try:
        _, said = process.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"it did not answer within {WAIT_S:.0f} s"
    if process.returncode == 0:
        return ""
    cause = re.search(r"with error: (.*)", said)
    lines = [line for line in said.splitlines() if line.strip()]
    text = cause[1] if cause else lines[-1] if lines else f"exit code {process.returncode}"
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())[:300].rstrip(".")
