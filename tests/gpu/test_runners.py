"""Every runner against PyTorch's float64, transfers and CUDA graphs included."""

from __future__ import annotations

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

from tests.gpu.cases import Case, Digits, need_cuda_provider, params
from van_deploy.checks.gates import sqnr_floor
from van_deploy.errors import ConversionError, InputError, MissingDependency
from van_deploy.metrics import compare
from van_deploy.runners.base import ResidentBatch
from van_deploy.runners.cuda import require_cuda
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
from van_deploy.runners.pytorch import torch_device

Held = tuple[Case, Any]
ALL = pytest.mark.parametrize("held", params(), indirect=True)
ON_A_GPU = pytest.mark.parametrize("held", params(gpu_only=True), indirect=True)


@pytest.fixture(scope="module")
def held(request: pytest.FixtureRequest, digits: Digits) -> Iterator[Held]:
    """Return a case and its runner, open for all tests of it."""
    case: Case = request.param
    with case.open(digits.bundle) as runner:
        yield case, runner


def floor_of(case: Case, digits: Digits) -> float:
    return sqnr_floor(case.numeric, digits.noise_db).value


@ALL
def test_every_batch_holds_the_floor_of_its_class(held: Held, digits: Digits) -> None:
    case, runner = held
    for batch in case.batches:
        logits = runner.run(digits.images[:batch])
        assert logits.dtype == np.float32
        found = compare(digits.expected[:batch], logits)
        assert found.sqnr_db >= floor_of(case, digits), (batch, found.sqnr_db)


@ON_A_GPU
def test_a_resident_batch_answers_as_run_does(held: Held, digits: Digits) -> None:
    case, runner = held
    for batch in sorted(set(case.batches), reverse=True):
        resident = runner.resident_batch(digits.images[:batch])
        assert isinstance(resident, ResidentBatch)
        assert resident.stream != 0
        for _ in range(3):  # the first may tune or record, the others replay
            resident.upload()
            resident.launch()
            resident.download()
            logits = resident.logits()
            found = compare(digits.expected[:batch], logits)
            assert found.sqnr_db >= floor_of(case, digits), (batch, found.sqnr_db)
        for _ in range(3):
            resident.launch()
        resident.download()
        assert compare(logits, resident.logits()).sqnr_db >= 60
        resident.close()
    count = case.batches[0]
    again = runner.run(digits.images[:count])
    assert compare(digits.expected[:count], again).sqnr_db >= floor_of(case, digits)


@ON_A_GPU
def test_results_are_the_callers_to_keep(held: Held, digits: Digits) -> None:
    case, runner = held
    count = case.batches[0]
    first = runner.run(digits.images[:count])
    kept = first.copy()
    runner.run(digits.images[::-1][:count].copy())
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("held", params("inductor", "tensorrt-fp", "cpu-inductor"), indirect=True)
def test_a_batch_that_is_not_served(held: Held, digits: Digits) -> None:
    runner = held[1]
    nine = np.concatenate([digits.images, digits.images[:1]])
    with pytest.raises(InputError, match="does not serve a batch of 9"):
        runner.run(nine)
    with pytest.raises(InputError, match="does not serve a batch of 9"):
        runner.resident_batch(nine)
    with pytest.raises(InputError, match=r"not \(1, 3"):
        runner.run(digits.images[:1, :, 1:])
    assert runner.run(digits.images[:1]).shape == digits.expected[:1].shape


@pytest.mark.gpu
def test_onnxruntime_runs_nothing_on_the_cpu(digits: Digits, tmp_path: Path) -> None:
    need_cuda_provider()
    with OnnxRuntimeRunner(digits.bundle.verified_path("fp32"), name="ort-cuda") as runner:
        assert runner._session.get_providers()[0] == "CUDAExecutionProvider"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])
    node = helper.make_node("Det", ["x"], ["y"])  # which CUDA's provider does not have
    graph, opset = helper.make_graph([node], "det", [x], [y]), helper.make_opsetid("", 17)
    path = tmp_path / "det.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    with pytest.raises(ConversionError, match="would run part of"):
        OnnxRuntimeRunner(path, name="ort-cuda").__enter__()


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", code]
    given = {**os.environ, **environment}
    return subprocess.run(words, env=given, capture_output=True, text=True, check=False)


@pytest.mark.gpu
def test_onnxruntime_starts_cuda_without_torch_in_the_process(digits: Digits) -> None:
    need_cuda_provider()
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
def test_a_gpu_that_is_full_absent_or_hidden() -> None:
    with pytest.raises(MissingDependency) as caught:
        require_cuda().call("cudaMalloc", 1 << 48)
    assert caught.value.message == "The GPU is out of memory (cudaMalloc)."
    assert caught.value.exit_code == 3
    for ask in (lambda: require_cuda(99), lambda: torch_device("cuda:99")):
        with pytest.raises(MissingDependency, match=r"There is no device cuda:99; CUDA sees \d+"):
            ask()
    code = "from van_deploy.runners.cuda import require_cuda; require_cuda()"
    said = python(code, CUDA_VISIBLE_DEVICES="").stderr
    assert "CUDA finds no GPU here" in said
    assert "CUDA_VISIBLE_DEVICES is ''" in said
