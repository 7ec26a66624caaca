"""What CUDA answers where something is wrong, each as one message with a remedy."""

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


def test_an_error_code_is_one_message() -> None:
    for code, kind, message in (
        (CODES.cudaErrorMemoryAllocation, MissingDependency, "The GPU is out of memory"),
        (CODES.cudaErrorDevicesUnavailable, MissingDependency, "cuda:0 is in use by another"),
        (CODES.cudaErrorIllegalAddress, ConversionError, "in f: an illegal memory access was"),
    ):
        with pytest.raises(kind, match=message):
            Cuda(runtime(f=(code, None))).call("f")


NOTHING = (CODES.cudaErrorNoDevice, None)
NO_GPU = "CUDA finds no GPU here: "
NO_DEVICE = f"{NO_GPU}no CUDA-capable device is detected; CUDA_VISIBLE_DEVICES is"
OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version."


@each(
    ("answer", "visible", "message"),
    [
        ((CODES.cudaErrorInsufficientDriver, None), None, f"{NO_GPU}{OLD_DRIVER}"),
        (NOTHING, "", f"{NO_DEVICE} ''."),
        (NOTHING, "GPU-of-yesterday", f"{NO_DEVICE} 'GPU-of-yesterday'."),
        ((CODES.cudaSuccess, 2), None, "There is no device cuda:5; CUDA sees 2, from cuda:0."),
    ],
)
def test_a_gpu_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, answer: Any, visible: str | None, message: str
) -> None:
    monkeypatch.setattr("cuda.bindings.runtime", runtime(count=answer))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(MissingDependency) as caught:
        require_cuda(5)
    assert caught.value.message == message
    assert caught.value.exit_code == 3


@each("device", ["gpu", "cuda:x", "cuda:", "cuda:-1", ""])
def test_what_is_no_device(device: str) -> None:
    with pytest.raises(UsageError, match=f"There is no device '{device}'."):
        gpu_index(device)


class HostGpu:
    """CUDA's functions on host memory: what is copied, recorded and given back, without a GPU."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.recording: Any = None
        self.launched = self.recorded = 0
        done: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(("cudaMalloc", "cudaMallocHost"), self.take),
            **dict.fromkeys(("cudaFree", "cudaFreeHost", "cudaGraphExecDestroy"), self.held.pop),
            "cudaMemcpyAsync": lambda to, source, size, *_: ctypes.memmove(to, source, size),
            "cudaStreamBeginCapture": lambda *_: setattr(self, "recording", []),
            "cudaStreamEndCapture": lambda _: self.recording,
            "cudaGraphInstantiate": self.instantiate,
            "cudaGraphLaunch": self.launch,
        }
        nothing = ("cudaSetDevice", "cudaStreamSynchronize", "cudaGraphDestroy")
        done |= dict.fromkeys(nothing, lambda _: None)
        self.runtime = SimpleNamespace(
            cudaError_t=CODES,
            cudaMemcpyKind=bindings.cudaMemcpyKind,
            cudaStreamCaptureMode=bindings.cudaStreamCaptureMode,
            **{name: functools.partial(self.answer, function) for name, function in done.items()},
        )

    @staticmethod
    def answer(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
        return CODES.cudaSuccess, function(*arguments)

    def take(self, size: int) -> int:
        memory = (ctypes.c_byte * size)()
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def instantiate(self, graph: Any, _: int) -> int:
        self.recorded, self.recording = self.recorded + 1, None
        self.held[self.recorded] = graph
        return self.recorded

    def launch(self, handle: int, _: int) -> None:
        self.launched += 1
        for work in self.held[handle]:
            work()

    def enqueue(self, batch: DeviceBatch) -> None:
        """Put a network on the stream that doubles each number and sums each row."""

        def array(name: str, *shape: int) -> npt.NDArray[np.float32]:
            kind = ctypes.c_float * int(np.prod(shape))
            memory = memoryview(kind.from_address(batch.addresses[name]))
            return np.frombuffer(memory, np.float32).reshape(shape)

        def work(rows: int = batch.rows) -> None:
            given = array("x", rows, 3)
            array("y", rows, 3)[:] = 2 * given
            array("sum", rows)[:] = given.sum(axis=1)

        (work() if self.recording is None else self.recording.append(work))


ROW, SUM = ((3,), np.float32), ((), np.float32)


@each("graph", [False, True])
def test_a_batch_is_copied_run_and_given_back(graph: bool) -> None:
    gpu = HostGpu()
    specs = {"x": ROW}, {"y": ROW, "sum": SUM}
    batch = DeviceBatch(Cuda(gpu.runtime), 7, *specs, 4, gpu.enqueue, graph=graph)
    images = np.arange(12, dtype=np.float32).reshape(4, 3)
    kept = batch.answers(images[:2])
    for rows in (4, 1, 2, 4):  # back and forth between sizes, each recorded once
        found = batch.answers(images[-rows:])
        np.testing.assert_array_equal(found["y"], 2 * images[-rows:])
        np.testing.assert_array_equal(found["sum"], images[-rows:].sum(axis=1))
    np.testing.assert_array_equal(kept["y"], 2 * images[:2])
    assert gpu.launched == (2 if graph else 0)
    assert gpu.recorded == (3 if graph else 0)
    batch.close()
    assert gpu.held == {}


def test_a_batch_that_finds_no_room_gives_back_what_it_took() -> None:
    gpu = HostGpu()
    answers = iter([gpu.runtime.cudaMalloc, lambda _: (CODES.cudaErrorMemoryAllocation, None)])
    gpu.runtime.cudaMalloc = lambda size: next(answers)(size)
    with pytest.raises(MissingDependency, match="The GPU is out of memory"):
        DeviceBatch(Cuda(gpu.runtime), 7, {"x": ROW}, {"y": ROW}, 4, gpu.enqueue)
    assert gpu.held == {}
