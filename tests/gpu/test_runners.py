"""All runners against PyTorch in float64, including transfers and CUDA graphs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.gpu.cases import Case, Digits, params, require_cuda_provider
from van_deploy.checks.gates import sqnr_floor
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.metrics import compare
from van_deploy.runners.base import ResidentBatch
from van_deploy.runners.cuda import require_cuda
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
from van_deploy.runners.pytorch import torch_device

Opened = tuple[Case, Any]
ALL = pytest.mark.parametrize("opened", params(), indirect=True)
ON_A_GPU = pytest.mark.parametrize("opened", params(gpu_only=True), indirect=True)


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, digits: Digits) -> Iterator[Opened]:
    """Return a case and its open runner."""
    case: Case = request.param
    with case.open(digits.bundle) as runner:
        yield case, runner


def min_sqnr_db(case: Case, digits: Digits) -> float:
    return sqnr_floor(case.numeric, digits.noise_db).value


@ALL
def test_sqnr_of_each_batch_size(opened: Opened, digits: Digits) -> None:
    case, runner = opened
    for batch in case.batches:
        logits = runner.run(digits.images[:batch])
        assert logits.dtype == np.float32
        metrics = compare(digits.expected[:batch], logits)
        assert metrics.sqnr_db >= min_sqnr_db(case, digits), (batch, metrics.sqnr_db)


@ON_A_GPU
def test_resident_batch_agrees_with_run(opened: Opened, digits: Digits) -> None:
    case, runner = opened
    for batch in sorted(set(case.batches), reverse=True):
        resident = runner.resident_batch(digits.images[:batch])
        assert isinstance(resident, ResidentBatch)
        assert resident.stream != 0
        for _ in range(3):  # the first launch may tune or capture, the others replay
            resident.upload()
            resident.launch()
            resident.download()
            logits = resident.logits()
            metrics = compare(digits.expected[:batch], logits)
            assert metrics.sqnr_db >= min_sqnr_db(case, digits), (batch, metrics.sqnr_db)
        for _ in range(3):
            resident.launch()
        resident.download()
        assert compare(logits, resident.logits()).sqnr_db >= 60
        resident.close()
    count = case.batches[0]
    again = runner.run(digits.images[:count])
    assert compare(digits.expected[:count], again).sqnr_db >= min_sqnr_db(case, digits)


@ON_A_GPU
def test_results_are_not_overwritten_by_later_calls(opened: Opened, digits: Digits) -> None:
    case, runner = opened
    count = case.batches[0]
    first = runner.run(digits.images[:count])
    copy = first.copy()
    runner.run(digits.images[::-1][:count].copy())
    np.testing.assert_array_equal(first, copy)


@pytest.mark.parametrize("opened", params("inductor", "tensorrt-fp", "cpu-inductor"), indirect=True)
def test_unsupported_batch_sizes_and_shapes(opened: Opened, digits: Digits) -> None:
    case, runner = opened
    nine = np.concatenate([digits.images, digits.images[:1]])
    for call in (runner.run, runner.resident_batch):
        with pytest.raises(InputError, match="does not serve a batch of 9"):
            call(nine)
    with pytest.raises(InputError, match=r"not \(1, 3"):
        runner.run(digits.images[:1, :, 1:])
    if not case.gpu:
        with pytest.raises(UsageError, match="runs on no GPU"):
            runner.resident_batch(digits.images[:1])
    assert runner.run(digits.images[:1]).shape == digits.expected[:1].shape


@pytest.mark.gpu
def test_onnxruntime_rejects_graphs_that_need_the_cpu(digits: Digits, tmp_path: Path) -> None:
    require_cuda_provider()
    with OnnxRuntimeRunner(digits.bundle.verified_path("fp32"), name="ort-cuda") as runner:
        assert runner._session.get_providers()[0] == "CUDAExecutionProvider"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    node = helper.make_node("Det", ["x"], ["y"])  # not in the CUDA provider
    graph, opset = helper.make_graph([node], "det", [x], [y]), helper.make_opsetid("", 17)
    path = tmp_path / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    with pytest.raises(ConversionError, match="would run part of"):
        OnnxRuntimeRunner(path, name="ort-cuda").__enter__()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, "-c", code], {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.gpu
def test_onnxruntime_starts_cuda_without_importing_torch(digits: Digits) -> None:
    require_cuda_provider()
    done = python(f"""
import sys
from pathlib import Path
import numpy as np
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
path = Path({str(digits.bundle.verified_path("fp32"))!r})
with OnnxRuntimeRunner(path, name="ort-cuda") as runner:
    print(runner.run(np.zeros({digits.images.shape}, np.float32)).shape)
assert "torch" not in sys.modules
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(digits.expected.shape)


@pytest.mark.gpu
def test_gpu_out_of_memory_missing_or_hidden() -> None:
    with pytest.raises(MissingDependency) as caught:
        require_cuda().call("cudaMalloc", 1 << 48)
    assert caught.value.message == "The GPU is out of memory (cudaMalloc)."
    assert caught.value.exit_code == 3
    for request in (lambda: require_cuda(99), lambda: torch_device("cuda:99")):
        with pytest.raises(MissingDependency, match=r"There is no device cuda:99; CUDA sees \d+"):
            request()
    code = "from van_deploy.runners.cuda import require_cuda; require_cuda()"
    stderr = python(code, CUDA_VISIBLE_DEVICES="").stderr
    assert "CUDA finds no GPU here" in stderr
    assert "CUDA_VISIBLE_DEVICES is ''" in stderr
