"""CUDA errors as project errors, and buffers, copies and graphs of a device batch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.each import each
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.runners.base import gpu_index
from van_deploy.runners.cuda import Cuda, DeviceBatch, require_cuda

bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
CODES = bindings.cudaError_t


def runtime(count: Any = (CODES.cudaSuccess, 1), **results: Any) -> Any:
    """Return a CUDA runtime with its real names and texts, and functions with given results."""
    functions = {
        "cudaGetDeviceCount": lambda: count,
        "cudaSetDevice": lambda _: (CODES.cudaSuccess,),
        **{name: (lambda *_, result=result: result) for name, result in results.items()},
    }
    return SimpleNamespace(
        cudaError_t=CODES, cudaGetErrorString=bindings.cudaGetErrorString, **functions
    )


def test_cuda_error_codes_become_project_errors() -> None:
    for code, kind, message in (
        (CODES.cudaErrorMemoryAllocation, MissingDependency, "The GPU is out of memory"),
        (CODES.cudaErrorDevicesUnavailable, MissingDependency, "cuda:0 is in use by another"),
        (CODES.cudaErrorIllegalAddress, ConversionError, "in f: an illegal memory access was"),
    ):
        with pytest.raises(kind, match=message):
            Cuda(runtime(f=(code, None))).call("f")


NO_DEVICE_RESULT = (CODES.cudaErrorNoDevice, None)
NO_GPU = "CUDA finds no GPU here: "
NO_DEVICE = f"{NO_GPU}no CUDA-capable device is detected; CUDA_VISIBLE_DEVICES is"
OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version."


@each(
    ("count", "visible", "message"),
    [
        ((CODES.cudaErrorInsufficientDriver, None), None, f"{NO_GPU}{OLD_DRIVER}"),
        (NO_DEVICE_RESULT, "", f"{NO_DEVICE} ''."),
        (NO_DEVICE_RESULT, "GPU-of-yesterday", f"{NO_DEVICE} 'GPU-of-yesterday'."),
        ((CODES.cudaSuccess, 2), None, "There is no device cuda:5; CUDA sees 2, from cuda:0."),
    ],
)
def test_unavailable_gpus_are_reported(
    monkeypatch: pytest.MonkeyPatch, count: Any, visible: str | None, message: str
) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", runtime(count=count))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(MissingDependency) as caught:
        require_cuda(5)
    assert caught.value.message == message
    assert caught.value.exit_code == 3


@each("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", ""])
def test_invalid_device_names_are_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"There is no device '{device}'."):
        gpu_index(device)


class HostGpu:
    """A fake GPU: CUDA's functions on host memory, which track allocations and graphs."""

    def __init__(self) -> None:
        self.allocated: dict[int, Any] = {}
        self.capture: Any = None
        self.launches = self.captures = 0
        functions: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(("cudaMalloc", "cudaMallocHost"), self.allocate),
            **dict.fromkeys(("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy"), self.free),
            "cudaMemcpyAsync": lambda to, source, size, *_: ctypes.memmove(to, source, size),
            "cudaStreamBeginCapture": lambda *_: setattr(self, "capture", []),
            "cudaStreamEndCapture": lambda _: self.capture,
            "cudaGraphInstantiate": self.instantiate,
            "cudaGraphLaunch": self.launch,
        }
        nothing = ("cudaSetDevice", "cudaStreamSynchronize", "cudaGraphDestroy")
        functions |= dict.fromkeys(nothing, lambda _: None)
        self.runtime = SimpleNamespace(
            cudaError_t=CODES,
            cudaMemcpyKind=bindings.cudaMemcpyKind,
            cudaStreamCaptureMode=bindings.cudaStreamCaptureMode,
            **{
                name: functools.partial(self.call, function) for name, function in functions.items()
            },
        )

    @staticmethod
    def call(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        return CODES.cudaSuccess, function(*arguments)

    def free(self, address: int) -> None:
        del self.allocated[address]

    def allocate(self, size: int) -> int:
        memory = (ctypes.c_byte * size)()
        self.allocated[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def instantiate(self, graph: Any, _: int) -> int:
        self.captures, self.capture = self.captures + 1, None
        self.allocated[self.captures] = graph
        return self.captures

    def launch(self, handle: int, _: int) -> None:
        self.launches += 1
        for work in self.allocated[handle]:
            work()

    def enqueue(self, batch: DeviceBatch) -> None:
        """Enqueue a network that doubles each number and sums each row."""

        def array(name: str, *shape: int) -> npt.NDArray[np.float32]:
            kind = ctypes.c_float * int(np.prod(shape))
            memory = memoryview(kind.from_address(batch.addresses[name]))
            return np.frombuffer(memory, np.float32).reshape(shape)

        def work(rows: int = batch.rows) -> None:
            inputs = array("x", rows, 3)
            array("y", rows, 3)[:] = 2 * inputs
            array("sum", rows)[:] = inputs.sum(axis=1)

        (work() if self.capture is None else self.capture.append(work))


ROW, SUM = ((3,), np.float32), ((), np.float32)


@each("graph", [False, True])
def test_device_batch_copies_runs_and_frees(graph: bool) -> None:
    gpu = HostGpu()
    specs = {"x": ROW}, {"y": ROW, "sum": SUM}
    batch = DeviceBatch(Cuda(gpu.runtime), 7, *specs, 4, gpu.enqueue, graph=graph)
    images = np.arange(12, dtype=np.float32).reshape(4, 3)
    first = batch.infer(images[:2])
    for rows in (4, 1, 2, 4):  # each size is captured once
        outputs = batch.infer(images[-rows:])
        np.testing.assert_array_equal(outputs["y"], 2 * images[-rows:])
        np.testing.assert_array_equal(outputs["sum"], images[-rows:].sum(axis=1))
    np.testing.assert_array_equal(first["y"], 2 * images[:2])
    assert gpu.launches == (2 if graph else 0)
    assert gpu.captures == (3 if graph else 0)
    batch.close()
    assert gpu.allocated == {}


def test_device_batch_frees_memory_when_an_allocation_fails() -> None:
    gpu = HostGpu()
    results = iter([gpu.runtime.cudaMalloc, lambda _: (CODES.cudaErrorMemoryAllocation, None)])
    gpu.runtime.cudaMalloc = lambda size: next(results)(size)
    with pytest.raises(MissingDependency, match="The GPU is out of memory"):
        DeviceBatch(Cuda(gpu.runtime), 7, {"x": ROW}, {"y": ROW}, 4, gpu.enqueue)
    assert gpu.allocated == {}
