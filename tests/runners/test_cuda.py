"""What CUDA answers where something is wrong, each as one message with a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.each import each
from van_deploy.errors import ConversionError, MissingDependency, UsageError, VanDeployError
from van_deploy.runners.base import gpu_index
from van_deploy.runners.cuda import Cuda, require_cuda

bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
CODES = bindings.cudaError_t


def runtime(count: Any = (CODES.cudaSuccess, 1), **answers: Any) -> Any:
    """Return CUDA's own names and texts, with some functions that answer as they are told."""
    functions = {
        "cudaGetDeviceCount": lambda: count,
        "cudaSetDevice": lambda _: (CODES.cudaSuccess,),
        **{name: (lambda *_, answer=answer: answer) for name, answer in answers.items()},
    }
    return SimpleNamespace(
        cudaError_t=CODES, cudaGetErrorString=bindings.cudaGetErrorString, **functions
    )


@each(
    ("code", "kind", "message"),
    [
        (CODES.cudaErrorMemoryAllocation, MissingDependency, "The GPU is out of memory (f)."),
        (
            CODES.cudaErrorDevicesUnavailable,
            MissingDependency,
            "The GPU cuda:0 is in use by another process that has it for itself.",
        ),
        (
            CODES.cudaErrorIllegalAddress,
            ConversionError,
            "CUDA failed in f: an illegal memory access was encountered.",
        ),
    ],
)
def test_an_error_code_is_one_message(code: Any, kind: type[VanDeployError], message: str) -> None:
    cuda = Cuda(runtime(f=(code, None)))
    with pytest.raises(kind) as caught:
        cuda.call("f")
    assert caught.value.message == message
    assert caught.value.remedy


@each(
    ("answer", "visible", "message"),
    [
        (
            (CODES.cudaErrorInsufficientDriver, None),
            None,
            "CUDA finds no GPU here: CUDA driver version is insufficient for CUDA runtime version.",
        ),
        (
            (CODES.cudaErrorNoDevice, None),
            "",
            "CUDA finds no GPU here: no CUDA-capable device is detected; "
            "CUDA_VISIBLE_DEVICES is ''.",
        ),
        (
            (CODES.cudaErrorNoDevice, None),
            "GPU-of-yesterday",
            "CUDA finds no GPU here: no CUDA-capable device is detected; "
            "CUDA_VISIBLE_DEVICES is 'GPU-of-yesterday'.",
        ),
        ((CODES.cudaSuccess, 2), None, "There is no device cuda:5; CUDA sees 2, from cuda:0."),
    ],
)
def test_a_gpu_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, answer: Any, visible: str | None, message: str
) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", runtime(count=answer))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(MissingDependency) as caught:
        require_cuda(5)
    assert caught.value.message == message
    assert caught.value.exit_code == 3


@each("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", ""])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(UsageError) as caught:
        gpu_index(device)
    assert caught.value.message == f"There is no device '{device}'."
