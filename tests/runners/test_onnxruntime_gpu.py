"""ONNX Runtime's CUDA provider: it starts or fails with a reason, never falls back to the CPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import (
    CUDA,
    LIBRARIES,
    OnnxRuntimeRunner,
    check_cuda_options,
    convert_errors,
    cuda_libraries,
    require_onnxruntime,
)


def test_missing_and_broken_providers_are_refused(
    digits_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without cuDNN the provider is listed, but the session would silently run on the CPU."""
    ort = require_onnxruntime()
    if CUDA in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {CUDA}, which would really start")
    with pytest.raises(MissingDependency) as caught:
        OnnxRuntimeRunner(digits_onnx, name="ort-cuda").__enter__()
    start = f"ONNX Runtime {ort.__version__} here has no {CUDA}, only "
    assert caught.value.message.startswith(start)
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.remedy
    listed = [*ort.get_available_providers(), CUDA]
    monkeypatch.setattr(ort, "get_available_providers", lambda: listed)
    gpu = SimpleNamespace(device=0, create_stream=lambda _: 1)
    monkeypatch.setattr("van_deploy.runners.onnxruntime.require_cuda", lambda _: gpu)
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(MissingDependency) as caught,
    ):
        OnnxRuntimeRunner(digits_onnx, name="ort-cuda").__enter__()
    message = f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it."
    assert caught.value.message == message
    assert "cuDNN 9" in caught.value.remedy


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


def test_onnxruntime_exceptions_become_project_errors(digits_onnx: Path) -> None:
    """Its exceptions derive directly from Exception; GPU failures are RuntimeErrors."""
    with OnnxRuntimeRunner(digits_onnx) as runner:
        with pytest.raises(UsageError, match="runs on no GPU"):
            runner.resident_batch(np.zeros((1, 1, 32, 32), np.float32))
        for shape in ((1, 2, 32, 32), (1, 1, 32)):
            with pytest.raises(InputError, match="ONNX Runtime failed on a batch of 1: ") as caught:
                runner.run(np.zeros(shape, np.float32))
            assert "van-deploy inspect" in caught.value.remedy
    for raised, kind, message in (
        (RuntimeError("CUDNN_STATUS_X"), ConversionError, "failed on a batch of 8: CUDNN_STATUS_X"),
        (RuntimeError("CUDA: out of memory"), MissingDependency, "The GPU is out of memory"),
        (
            RuntimeError("fallback to CPU EP has been explicitly disabled"),
            ConversionError,
            "run part of it on the CPU(.|\n)*--target tensorrt",
        ),
        (KeyError("bug in this program"), KeyError, "bug in this program"),
    ):
        with pytest.raises(kind, match=message), convert_errors("a batch of 8"):
            raise raised


def test_cuda_libraries_match_onnxruntime_and_are_in_load_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in NVIDIA's wheels, each after its own dependencies."""
    nvidia = tmp_path / "elsewhere" / "nvidia"
    for folder, suffix in (("cu12/lib", 12), ("cu13/lib", 13), ("cudnn/lib", 9)):
        (nvidia / folder).mkdir(parents=True)
        for name in LIBRARIES[:-1] if suffix > 9 else ["cudnn"]:
            (nvidia / folder / f"lib{name}.so.{suffix}").touch()
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(nvidia)]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    libraries = [path.relative_to(nvidia).as_posix() for path in cuda_libraries("13.0")]
    assert libraries == [
        *(f"cu13/lib/lib{name}.so.13" for name in LIBRARIES[:-1]),
        "cudnn/lib/libcudnn.so.9",
    ]


PROVIDER_SCRIPT = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import onnxruntime as ort
from pathlib import Path
from van_deploy.errors import MissingDependency
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA, OnnxRuntimeRunner
from van_deploy.runners.onnxruntime import is_provider_usable, preload_cuda_libraries

assert ort.__file__.startswith({folder!r}), ort.__file__
capi = Path(ort.__file__).parent / "capi"
ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"))
def missing_library():
    try:
        ctypes.CDLL(str(capi / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error).split(":")[0]
    return "none"
print(missing_library())
preload_cuda_libraries(ort)
print(missing_library())
print(is_provider_usable(ort, CUDA))
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
    if importlib.util.find_spec("nvidia") is None or not cuda_libraries("13.0"):
        pytest.skip("NVIDIA's wheels for CUDA 13 are not installed")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    if subprocess.run([*pip, "onnxruntime-gpu>=1.31"], check=False).returncode:
        pytest.skip("pip cannot download onnxruntime-gpu")
    folder = tmp_path / "ort"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(folder)
    code = PROVIDER_SCRIPT.format(folder=str(folder), model=str(digits_onnx))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, starts, message = done.stdout.splitlines()
    assert before.startswith("libcublas")
    assert after == "libcuda.so.1"
    assert starts == "False"
    assert message.startswith("CUDA finds no GPU here: ")
