"""ONNX Runtime's CUDA provider: found, or refused with a reason; never the CPU in its place."""

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
    cuda_libraries,
    failures,
    refuse_options,
    require_onnxruntime,
)


def test_a_provider_that_is_not_there_or_does_not_start(
    digits_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without cuDNN: it is listed, and the session would quietly be the CPU's."""
    ort = require_onnxruntime()
    if CUDA in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {CUDA}, which would really start")
    with pytest.raises(MissingDependency) as caught:
        OnnxRuntimeRunner(digits_onnx, name="ort-cuda").__enter__()
    start = f"ONNX Runtime {ort.__version__} here has no {CUDA}, only "
    assert caught.value.message.startswith(start)
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.remedy
    claimed = [*ort.get_available_providers(), CUDA]
    monkeypatch.setattr(ort, "get_available_providers", lambda: claimed)
    gpu = SimpleNamespace(device=0, stream=lambda _: 1)
    monkeypatch.setattr("van_deploy.runners.onnxruntime.require_cuda", lambda _: gpu)
    with (
        pytest.warns(UserWarning, match="not in available provider"),
        pytest.raises(MissingDependency) as caught,
    ):
        OnnxRuntimeRunner(digits_onnx, name="ort-cuda").__enter__()
    said = f"ONNX Runtime {ort.__version__} has {CUDA} but could not start it."
    assert caught.value.message == said
    assert "cuDNN 9" in caught.value.remedy


def test_nhwc_is_not_for_a_quantised_graph_nor_with_a_cuda_graph(digits_onnx: Path) -> None:
    """One fails, the other answers wrongly: seen on an H200 with ONNX Runtime 1.31."""
    graph, nhwc = onnx.load(digits_onnx), CudaOptions(prefer_nhwc=True)
    for options in (nhwc, CudaOptions(cuda_graph=True)):
        refuse_options(digits_onnx, options)
    with pytest.raises(UsageError, match="answers wrongly from a CUDA graph"):
        refuse_options(graph, replace(nhwc, cuda_graph=True))
    graph.graph.node[0].op_type = "QuantizeLinear"
    refuse_options(graph, CudaOptions(cuda_graph=True))
    with pytest.raises(UsageError, match="runs no INT8 graph"):
        refuse_options(graph, nhwc)


def test_what_onnxruntime_raises_becomes_the_projects_error(digits_onnx: Path) -> None:
    """Its exceptions derive from Exception, and a GPU's failures come as RuntimeError."""
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
        (KeyError("a fault of this program keeps its traceback"), KeyError, "a fault of this"),
    ):
        with pytest.raises(kind, match=message), failures("a batch of 8"):
            raise raised


def test_libraries_are_those_of_onnxruntimes_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In NVIDIA's wheels, wherever they are, each after those it needs itself."""
    nvidia = tmp_path / "elsewhere" / "nvidia"
    for folder, suffix in (("cu12/lib", 12), ("cu13/lib", 13), ("cudnn/lib", 9)):
        (nvidia / folder).mkdir(parents=True)
        for name in LIBRARIES[:-1] if suffix > 9 else ["cudnn"]:
            (nvidia / folder / f"lib{name}.so.{suffix}").touch()
    spec = importlib.util.spec_from_loader("nvidia", None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(nvidia)]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    found = [path.relative_to(nvidia).as_posix() for path in cuda_libraries("13.0")]
    assert found == [
        *(f"cu13/lib/lib{name}.so.13" for name in LIBRARIES[:-1]),
        "cudnn/lib/libcudnn.so.9",
    ]


IN_A_FRESH_PROCESS = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import onnxruntime as ort
from pathlib import Path
from van_deploy.errors import MissingDependency
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA, OnnxRuntimeRunner, preload, is_provider_usable

assert ort.__file__.startswith({folder!r}), ort.__file__
capi = Path(ort.__file__).parent / "capi"
ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"))
def lacking():
    try:
        ctypes.CDLL(str(capi / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error).split(":")[0]
    return "nothing"
print(lacking())
preload(ort)
print(lacking())
print(is_provider_usable(ort, CUDA))
try:
    OnnxRuntimeRunner(Path({model!r}), name="ort-cuda").__enter__()
except MissingDependency as error:
    print(error.message)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_the_cuda_provider_lacks_the_driver_alone(digits_onnx: Path, tmp_path: Path) -> None:
    """The real package of ONNX Runtime for GPUs, unpacked apart from NVIDIA's wheels."""
    if importlib.util.find_spec("nvidia") is None or not cuda_libraries("13.0"):
        pytest.skip("NVIDIA's wheels for CUDA 13 are not installed")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    if subprocess.run([*pip, "onnxruntime-gpu>=1.31"], check=False).returncode:
        pytest.skip("onnxruntime-gpu cannot be had here")
    folder = tmp_path / "ort"
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(folder)
    code = IN_A_FRESH_PROCESS.format(folder=str(folder), model=str(digits_onnx))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after, starts, message = done.stdout.splitlines()
    assert before.startswith("libcublas")
    assert after == "libcuda.so.1"
    assert starts == "False"
    assert message.startswith("CUDA finds no GPU here: ")
