"""What CUDA answers where something is wrong, each as one message with a remedy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.each import each
from van_deploy.errors import ConversionError, MissingDependency, UsageError, VanDeployError
from van_deploy.runners.base import gpu_index
from van_deploy.runners.cuda import Cuda, DeviceBatch, require_cuda

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


class HostGpu:
    """CUDA's functions on host memory: what is copied, recorded and given back, without a GPU."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launched = 0
        ok = CODES.cudaSuccess
        takes = dict.fromkeys(("cudaMalloc", "cudaMallocHost"), self._take)
        gives = dict.fromkeys(("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy"), self._give)
        self.runtime = SimpleNamespace(
            cudaError_t=CODES,
            cudaMemcpyKind=bindings.cudaMemcpyKind,
            cudaStreamCaptureMode=bindings.cudaStreamCaptureMode,
            cudaSetDevice=lambda _: (ok,),
            cudaStreamSynchronize=lambda _: (ok,),
            cudaGraphDestroy=lambda _: (ok,),
            cudaMemcpyAsync=self._copy,
            cudaStreamBeginCapture=self._begin,
            cudaStreamEndCapture=self._end,
            cudaGraphInstantiate=self._instantiate,
            cudaGraphLaunch=self._launch,
            **takes,
            **gives,
        )

    def _take(self, size: int) -> tuple[Any, int]:
        memory = (ctypes.c_byte * size)()
        address = ctypes.addressof(memory)
        self.held[address] = memory
        return CODES.cudaSuccess, address

    def _give(self, what: int) -> tuple[Any]:
        del self.held[what]
        return (CODES.cudaSuccess,)

    def _copy(self, to: int, source: int, size: int, kind: Any, stream: int) -> tuple[Any]:
        ctypes.memmove(to, source, size)
        return (CODES.cudaSuccess,)

    def _begin(self, stream: int, mode: Any) -> tuple[Any]:
        self.recording = []
        return (CODES.cudaSuccess,)

    def _end(self, stream: int) -> tuple[Any, list[Callable[[], None]] | None]:
        recorded, self.recording = self.recording, None
        return CODES.cudaSuccess, recorded

    def _instantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, int]:
        handle = len(self.held) + 1
        self.graphs[handle] = graph
        self.held[handle] = graph
        return CODES.cudaSuccess, handle

    def _launch(self, handle: int, stream: int) -> tuple[Any]:
        self.launched += 1
        for work in self.graphs[handle]:
            work()
        return (CODES.cudaSuccess,)

    def enqueue(self, batch: DeviceBatch) -> None:
        """Put a network on the stream that doubles each number and sums each row."""
        rows = batch.rows

        def work() -> None:
            given, doubled = (self._array(batch.addresses[n], (rows, 3)) for n in "xy")
            doubled[:] = 2 * given
            self._array(batch.addresses["sum"], (rows,))[:] = given.sum(axis=1)

        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    @staticmethod
    def _array(address: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        count = int(np.prod(shape))
        memory = (ctypes.c_float * count).from_address(address)
        return np.frombuffer(memoryview(memory), np.float32).reshape(shape)


@each("graph", [False, True])
def test_a_batch_is_copied_run_and_given_back(graph: bool) -> None:
    gpu = HostGpu()
    batch = DeviceBatch(
        Cuda(gpu.runtime),
        7,
        {"x": ((3,), np.float32)},
        {"y": ((3,), np.float32), "sum": ((), np.float32)},
        4,
        gpu.enqueue,
        graph=graph,
    )
    images = np.arange(12, dtype=np.float32).reshape(4, 3)
    kept = batch.answers(images[:2])
    for rows in (4, 1, 2, 4):  # back and forth between sizes, each recorded once
        found = batch.answers(images[-rows:])
        np.testing.assert_array_equal(found["y"], 2 * images[-rows:])
        np.testing.assert_array_equal(found["sum"], images[-rows:].sum(axis=1))
    np.testing.assert_array_equal(kept["y"], 2 * images[:2])
    assert gpu.launched == (2 if graph else 0)
    assert len(gpu.graphs) == (3 if graph else 0)
    batch.close()
    assert gpu.held == {}


def test_a_batch_that_finds_no_room_gives_back_what_it_took() -> None:
    gpu = HostGpu()
    taken: list[int] = []

    def take(size: int) -> tuple[Any, int | None]:
        taken.append(size)
        return gpu._take(size) if len(taken) < 2 else (CODES.cudaErrorMemoryAllocation, None)

    gpu.runtime.cudaMalloc = take
    specs = {"x": ((3,), np.float32)}
    with pytest.raises(MissingDependency, match="The GPU is out of memory"):
        DeviceBatch(Cuda(gpu.runtime), 7, specs, {"y": ((3,), np.float32)}, 4, gpu.enqueue)
    assert gpu.held == {}
