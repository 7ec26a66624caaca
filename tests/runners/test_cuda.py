"""CUDA errors as project errors, and buffers, copies and graphs of a device batch."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.each import each
from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.runners.base import gpu_index
from van_deploy.runners.cuda import Cuda, DeviceBatch, require_cuda

bindings = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
CODES, VISIBLE = bindings.cudaError_t, "CUDA_VISIBLE_DEVICES"


class HostGpu:
    """A fake GPU: CUDA's functions on host memory, which track allocations and graphs.

    Args:
        results: results of other functions, with their error codes.
    """

    def __init__(self, **results: Any) -> None:
        self.allocated: dict[int, Any] = {}
        self.capture: Any = None
        self.launches = self.captures = 0
        self.results = results
        self.functions: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(("cudaMalloc", "cudaMallocHost"), self.allocate),
            **dict.fromkeys(("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy"), self.free),
            "cudaMemcpyAsync": lambda to, source, size, *_: ctypes.memmove(to, source, size),
            "cudaStreamBeginCapture": lambda *_: setattr(self, "capture", []),
            "cudaStreamEndCapture": lambda _: self.capture,
            "cudaGraphInstantiate": self.instantiate,
            "cudaGraphLaunch": self.launch,
        }

    def __getattr__(self, name: str) -> Any:
        real = getattr(bindings, name)  # fails where CUDA has no such function
        if name in {"cudaError_t", "cudaGetErrorString", "cudaMemcpyKind", "cudaStreamCaptureMode"}:
            return real

        def call(*arguments: Any) -> Any:
            result = self.functions[name](*arguments) if name in self.functions else None
            return self.results.get(name) or (CODES.cudaSuccess, result)

        return call

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

        def work(rows: int = batch.rows) -> None:
            addresses = batch.addresses
            x, y, sums = (
                np.frombuffer(self.allocated[addresses[name]], np.float32)
                for name in ("x", "y", "sum")
            )
            y[: 3 * rows] = 2 * x[: 3 * rows]
            sums[:rows] = x[: 3 * rows].reshape(rows, 3).sum(axis=1)

        (work() if self.capture is None else self.capture.append(work))


@each(
    ("code", "kind", "message"),
    [
        (CODES.cudaErrorMemoryAllocation, MissingDependency, "The GPU is out of memory"),
        (CODES.cudaErrorDevicesUnavailable, MissingDependency, "cuda:0 is in use by another"),
        (
            CODES.cudaErrorIllegalAddress,
            ConversionError,
            "in cudaMalloc: an illegal memory access was",
        ),
    ],
)
def test_cuda_error_codes_become_project_errors(code: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        Cuda(HostGpu(cudaMalloc=(code, None))).call("cudaMalloc", 8)


@each(
    ("count", "environment", "message"),
    [
        ((CODES.cudaErrorInsufficientDriver, None), {}, r"no GPU here: .* CUDA runtime version\."),
        ((CODES.cudaErrorNoDevice, None), {VISIBLE: ""}, "is detected; CUDA_VISIBLE_DEVICES is ''"),
        ((CODES.cudaErrorNoDevice, None), {VISIBLE: "GPU-x"}, "CUDA_VISIBLE_DEVICES is 'GPU-x'"),
        ((CODES.cudaSuccess, 2), {}, "There is no device cuda:5; CUDA sees 2, from cuda:0."),
    ],
)
def test_unavailable_gpus_are_reported(
    monkeypatch: pytest.MonkeyPatch, count: Any, environment: dict[str, str], message: str
) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", HostGpu(cudaGetDeviceCount=count))
    monkeypatch.setattr("os.environ", environment)
    with pytest.raises(MissingDependency, match=message):
        require_cuda(5)


@each("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", ""])
def test_invalid_device_names_are_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"There is no device '{device}'."):
        gpu_index(device)


ROW, SUM = ((3,), np.float32), ((), np.float32)


@each("graph", [False, True])
def test_device_batch_copies_runs_and_frees(graph: bool) -> None:
    gpu = HostGpu()
    specs = {"x": ROW}, {"y": ROW, "sum": SUM}
    batch = DeviceBatch(Cuda(gpu), 7, *specs, 4, gpu.enqueue, graph=graph)
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


def test_device_batch_frees_memory_when_an_allocation_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = HostGpu()
    results = iter([gpu.cudaMalloc, lambda _: (CODES.cudaErrorMemoryAllocation, None)])
    monkeypatch.setattr(gpu, "cudaMalloc", lambda size: next(results)(size))
    with pytest.raises(MissingDependency, match="The GPU is out of memory"):
        DeviceBatch(Cuda(gpu), 7, {"x": ROW}, {"y": ROW}, 4, gpu.enqueue)
    assert gpu.allocated == {}
