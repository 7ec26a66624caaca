"""ONNX Runtime's CUDA provider: it starts or fails with a reason, never falls back to the CPU."""

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.each import each
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import (
    CUDA,
    OnnxRuntimeRunner,
    check_cuda_options,
    convert_errors,
    require_onnxruntime,
)


def test_missing_and_broken_providers_are_refused(
    digits_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without cuDNN the provider is listed, but the session would silently run on the CPU."""
    ort, runner = require_onnxruntime(), OnnxRuntimeRunner(digits_onnx, name="ort-cuda")
    providers = ort.get_available_providers()
    if CUDA in providers:
        pytest.skip(f"this ONNX Runtime has {CUDA}, which would really start")
    with pytest.raises(MissingDependency, match=f"here has no {CUDA}, only (.|\n)*\\[cuda,cudnn]"):
        runner.__enter__()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [*providers, CUDA])
    gpu = SimpleNamespace(device=0, create_stream=lambda _: 1)
    monkeypatch.setattr("van_deploy.runners.onnxruntime.require_cuda", lambda _: gpu)
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(MissingDependency, match=f"has {CUDA} but could not start it(.|\n)*cuDNN 9"),
    ):
        runner.__enter__()


def test_nhwc_is_refused_for_quantised_graphs_and_cuda_graphs(digits_onnx: Path) -> None:
    """One fails, the other computes wrong results: on an H200 with ONNX Runtime 1.31."""
    graph, nhwc = onnx.load(digits_onnx), CudaOptions(prefer_nhwc=True)
    for options in (nhwc, CudaOptions(cuda_graph=True)):
        check_cuda_options(digits_onnx, options)
    with pytest.raises(UsageError, match="a CUDA graph computes wrong results"):
        check_cuda_options(graph, replace(nhwc, cuda_graph=True))
    graph.graph.node[0].op_type = "QuantizeLinear"
    check_cuda_options(graph, CudaOptions(cuda_graph=True))
    with pytest.raises(UsageError, match="INT8 fails"):
        check_cuda_options(graph, nhwc)


def test_a_cpu_runner_refuses_other_shapes_and_gpu_memory(digits_onnx: Path) -> None:
    with OnnxRuntimeRunner(digits_onnx) as runner:
        with pytest.raises(UsageError, match="runs on no GPU"):
            runner.resident_batch(np.zeros((1, 1, 32, 32), np.float32))
        for shape in ((1, 2, 32, 32), (1, 1, 32)):
            message = "ONNX Runtime failed on a batch of 1: (.|\n)*van-deploy inspect"
            with pytest.raises(InputError, match=message):
                runner.run(np.zeros(shape, np.float32))
        # Both paths with buffers check the shape before CUDA; NumPy would repeat this row.
        runner.on_gpu, runner.options = True, CudaOptions(cuda_graph=True)
        for call in (runner.run_all, runner.resident_batch):
            with pytest.raises(InputError, match=r"takes \(N, 3, 32, 32\) float32, not \(2, 1, 1,"):
                call(np.zeros((2, 1, 1, 32), np.float32))


PARTLY = "fallback to CPU EP has been explicitly disabled"


@each(
    ("raised", "kind", "message"),
    [
        (RuntimeError("CUDNN_STATUS_X"), ConversionError, "failed on a batch of 8: CUDNN_STATUS_X"),
        (RuntimeError("CUDA: out of memory"), MissingDependency, "The GPU is out of memory"),
        (RuntimeError(PARTLY), ConversionError, "run part of it on the CPU(.|\n)*tensorrt"),
        (KeyError("bug in this program"), KeyError, "bug in this program"),
    ],
)
def test_gpu_failures_become_project_errors(raised: Exception, kind: Any, message: str) -> None:
    """Some are RuntimeErrors; ONNX Runtime's own exceptions derive directly from Exception."""
    with pytest.raises(kind, match=message), convert_errors("a batch of 8"):
        raise raised


PROVIDER_SCRIPT = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import onnxruntime as ort
from pathlib import Path
from van_deploy.errors import MissingDependency
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner, preload_cuda_libraries

assert ort.__file__.startswith({folder!r}), ort.__file__
capi = Path(ort.__file__).parent / "capi"
ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"))
for preload in (lambda: None, preload_cuda_libraries):
    preload()
    try:
        ctypes.CDLL(str(capi / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        print(str(error).split(":")[0])
try:
    OnnxRuntimeRunner(Path({model!r}), name="ort-cuda").__enter__()
except MissingDependency as error:
    print(error.message)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_cuda_provider_needs_only_the_driver(digits_onnx: Path, tmp_path: Path) -> None:
    """Uses the real package of ONNX Runtime for GPUs, unpacked separately."""
    pytest.importorskip("nvidia.cu13", reason="NVIDIA's wheels for CUDA 13 are not installed")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    if subprocess.run([*pip, "onnxruntime-gpu>=1.31"], check=False).returncode:
        pytest.skip("pip cannot download onnxruntime-gpu")
    folder = tmp_path / "ort"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(folder)
    code = PROVIDER_SCRIPT.format(folder=str(folder), model=str(digits_onnx))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, message = done.stdout.splitlines()
    assert before.startswith("libcublas")
    assert after == "libcuda.so.1"
    assert message.startswith("CUDA finds no GPU here: ")
