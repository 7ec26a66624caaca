"""ONNX Runtime's CUDA provider: it starts or fails with a reason, never falls back to the CPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import pytest

from tests.each import each
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
    full = Mock(side_effect=RuntimeError("CUDA failure 2: out of memory"))
    monkeypatch.setattr("van_deploy.runners.onnxruntime.create_session", full)
    with pytest.raises(MissingDependency, match="The GPU is out of memory"):
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


# Those that ``readelf -d`` lists for the CUDA provider of ONNX Runtime 1.31, and those it opens.
LIBRARIES = """libcudart.so.13 libnvrtc.so.13 libcublasLt.so.13 libcublas.so.13 libcurand.so.10
libcufft.so.12 libcudnn.so.9"""


def test_libraries_of_the_cuda_provider_are_found_without_pytorch() -> None:
    pytest.importorskip("nvidia.cu13", reason="NVIDIA's wheels for CUDA 13 are not installed")
    code = f"""
import ctypes, sys
from van_deploy.runners.onnxruntime import preload_cuda_libraries
preload_cuda_libraries()
for name in {LIBRARIES.split()}:
    ctypes.CDLL(name)
assert "torch" not in sys.modules"""
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
