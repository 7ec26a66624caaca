"""Device memory, pinned memory, streams and CUDA graphs, through NVIDIA's cuda-python.

Thin: each class owns one thing and releases it once. Nothing here is imported or
initialised before a runner is opened.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, MissingDependency

__all__ = ["Cuda", "CudaGraph", "DeviceBuffer", "PinnedArray", "Stream", "require_cuda"]


def require_cuda() -> Cuda:
    """Return CUDA's run time, having seen that a GPU answers.

    Raises:
        MissingDependency: cuda-python, the driver or a GPU is missing.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependency(
            f"NVIDIA's cuda-python is not installed ({error}); engines need it for device memory.",
            f"Install it with `{pip_command()} install cuda-bindings`.",
        ) from error
    cuda = Cuda(runtime)
    status, count = runtime.cudaGetDeviceCount()
    if int(status) != 0 or not count:
        raise MissingDependency(
            f"CUDA finds no GPU here: {cuda.text_of(status)}.",
            "Run this on a machine with an NVIDIA GPU; see `van-deploy doctor`.",
        )
    return cuda


class Cuda:
    """CUDA's run time, with error codes turned into exceptions.

    Args:
        runtime: the module ``cuda.bindings.runtime``.
    """

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what the function called ``name`` returns besides its error code.

        Raises:
            MissingDependency: the GPU is out of memory.
            ConversionError: it failed otherwise.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        if int(error) == int(self.runtime.cudaError_t.cudaErrorMemoryAllocation):
            raise MissingDependency(
                f"The GPU is out of memory ({name}).",
                "Use a smaller batch, or close what else uses the GPU.",
            )
        if int(error) != 0:
            raise ConversionError(
                f"CUDA failed in {name}: {self.text_of(error)}.",
                "Run `van-deploy doctor`; after an illegal access the process must be restarted.",
            )
        return values[0] if len(values) == 1 else tuple(values)

    def text_of(self, error: Any) -> str:
        """Return CUDA's words for an error code."""
        _, text = self.runtime.cudaGetErrorString(error)
        return text.decode() if isinstance(text, bytes) else str(text)


class Stream:
    """A stream of its own, which does not wait for the default one."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        flags = cuda.runtime.cudaStreamNonBlocking
        self.handle = cuda.call("cudaStreamCreateWithFlags", flags)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self._cuda.call("cudaStreamSynchronize", self.handle)

    def close(self) -> None:
        """Destroy the stream."""
        self._cuda.call("cudaStreamDestroy", self.handle)


class DeviceBuffer:
    """Memory on the GPU.

    Args:
        cuda: the run time.
        size: in bytes.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.size = size
        self.address = int(cuda.call("cudaMalloc", max(1, size)))

    def close(self) -> None:
        """Give the memory back."""
        self._cuda.call("cudaFree", self.address)


class PinnedArray:
    """A NumPy array in page-locked memory, which the GPU can read and write on its own.

    Args:
        cuda: the run time.
        shape: of the array.
        dtype: of the array.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self._cuda = cuda
        kind = np.dtype(dtype)
        size = max(1, int(np.prod(shape)) * kind.itemsize)
        self.address = int(cuda.call("cudaMallocHost", size))
        memory = memoryview((ctypes.c_byte * size).from_address(self.address))
        count = int(np.prod(shape))
        self.array: npt.NDArray[Any] = np.frombuffer(memory, kind, count).reshape(shape)

    def copy_to(self, device: DeviceBuffer, size: int, stream: Stream) -> None:
        """Copy the first ``size`` bytes to the GPU, on ``stream``."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(device.address, self.address, size, kind, stream)

    def copy_from(self, device: DeviceBuffer, size: int, stream: Stream) -> None:
        """Copy ``size`` bytes from the GPU to the beginning, on ``stream``."""
        kind = self._cuda.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(self.address, device.address, size, kind, stream)

    def close(self) -> None:
        """Give the memory back; the array must not be used afterwards."""
        self._cuda.call("cudaFreeHost", self.address)

    def _copy(self, to: int, source: int, size: int, kind: Any, stream: Stream) -> None:
        self._cuda.call("cudaMemcpyAsync", to, source, size, kind, stream.handle)


class CudaGraph:
    """Work recorded from a stream, which can be launched again as a whole.

    Args:
        cuda: the run time.
        stream: where the work is put, and launched.
        work: puts it there. It runs once, and is recorded instead of done.
    """

    def __init__(self, cuda: Cuda, stream: Stream, work: Callable[[], None]) -> None:
        self._cuda, self._stream = cuda, stream
        mode = cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        cuda.call("cudaStreamBeginCapture", stream.handle, mode)
        try:
            work()
        except BaseException:
            # Ends the capture; its own error would hide the one that matters.
            cuda.runtime.cudaStreamEndCapture(stream.handle)
            raise
        graph = cuda.call("cudaStreamEndCapture", stream.handle)
        try:
            self._executable = cuda.call("cudaGraphInstantiate", graph, 0)
        finally:
            cuda.call("cudaGraphDestroy", graph)

    def launch(self) -> None:
        """Put the recorded work on the stream."""
        self._cuda.call("cudaGraphLaunch", self._executable, self._stream.handle)

    def close(self) -> None:
        """Release the recording."""
        self._cuda.call("cudaGraphExecDestroy", self._executable)
