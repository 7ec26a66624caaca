"""Device memory, pinned memory, streams and CUDA graphs, with NVIDIA's cuda-bindings.

Nothing is imported or initialised before a runner is opened.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.runners.base import Logits, Outputs

TensorSpecs = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]  # name: (row shape, type)


def require_cuda(device: int = 0) -> Cuda:
    """Return the CUDA runtime on one device, after checking that the GPU responds.

    Args:
        device: CUDA's device number, after ``CUDA_VISIBLE_DEVICES`` is applied.

    Raises:
        MissingDependency: cuda-bindings, the driver or this GPU is missing.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependency(
            f"NVIDIA's cuda-bindings is not installed ({error}); GPU memory is allocated with it.",
            f"Install it with `{pip_command()} install cuda-bindings`.",
        ) from error
    try:
        status, count = runtime.cudaGetDeviceCount()
        reason = _error_text(runtime, status) if int(status) or not count else ""
    except RuntimeError as error:  # without libcuda.so.1 the bindings raise instead
        count, reason = 0, str(error)
    if reason:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is '{visible}'"
        raise MissingDependency(
            f"CUDA finds no GPU here: {reason}{hidden}.",
            "Run this on a machine with an NVIDIA GPU; see `van-deploy doctor`.",
        )
    if device >= count:
        raise device_not_found(device, count)
    return Cuda(runtime, device)


def out_of_memory(operation: str) -> MissingDependency:
    """Return the error for an operation for which the GPU has not enough memory."""
    return MissingDependency(
        f"The GPU is out of memory ({operation}).",
        "Use a smaller batch, or close other programs that use the GPU.",
    )


def device_not_found(device: int, count: int) -> MissingDependency:
    """Return the error for a device number that CUDA does not list."""
    return MissingDependency(
        f"There is no device cuda:{device}; CUDA sees {count}, from cuda:0.",
        "Give one of these, or check CUDA_VISIBLE_DEVICES.",
    )


def _error_text(runtime: Any, error: Any) -> str:
    _, text = runtime.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


class Cuda:
    """The CUDA runtime on one device; error codes become exceptions.

    Args:
        runtime: the module ``cuda.bindings.runtime``.
        device: CUDA's device number.
    """

    def __init__(self, runtime: Any, device: int = 0) -> None:
        self.runtime, self.device = runtime, device
        self.call("cudaSetDevice", device)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a CUDA runtime function and return its result without the error code.

        Raises:
            MissingDependency: the GPU is out of memory, or another process has exclusive access.
            ConversionError: the call failed otherwise.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        codes = self.runtime.cudaError_t
        if int(error) == int(codes.cudaErrorMemoryAllocation):
            raise out_of_memory(name)
        if int(error) == int(codes.cudaErrorDevicesUnavailable):
            raise MissingDependency(
                f"The GPU cuda:{self.device} is in use by another process with exclusive access.",
                "Wait for that process, or select another GPU with --device cuda:N.",
            )
        if int(error) != 0:
            raise ConversionError(
                f"CUDA failed in {name}: {_error_text(self.runtime, error)}.",
                "Run `van-deploy doctor`; after an illegal access the process must be restarted.",
            )
        return values[0] if len(values) == 1 else tuple(values)

    def create_stream(self, stack: ExitStack) -> int:
        """Return a stream that does not wait for the default one; ``stack`` destroys it."""
        handle = self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)
        stack.callback(self.call, "cudaStreamDestroy", handle)
        return int(handle)

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        self.call("cudaStreamSynchronize", stream)


class DeviceBatch:
    """Buffers for one batch in pinned and in GPU memory: a :class:`~.base.ResidentBatch`.

    Args:
        cuda: the runtime.
        stream: the runner's stream, on which all work is enqueued.
        inputs: the input tensor.
        outputs: the output tensors; the first holds the logits.
        capacity: largest number of images.
        enqueue: enqueues the network on the stream for the batch's current :attr:`rows`.
        graph: capture a CUDA graph for each number of rows and replay it.

    Attributes:
        stream: handle of the stream.
        rows: current number of images.
        addresses: GPU address of each tensor by name.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        inputs: TensorSpecs,
        outputs: TensorSpecs,
        capacity: int,
        enqueue: Callable[[DeviceBatch], None],
        *,
        graph: bool = False,
    ) -> None:
        self.cuda, self.stream, self.rows = cuda, stream, capacity
        self._enqueue, self._use_graph = enqueue, graph
        self._input, self._outputs = next(iter(inputs)), tuple(outputs)
        self._host: Outputs = {}
        self.addresses: dict[str, int] = {}
        self._graphs: dict[int, Any] = {}
        with ExitStack() as stack:
            for name, (shape, dtype) in {**inputs, **outputs}.items():
                kind, count = np.dtype(dtype), int(np.prod((capacity, *shape)))
                size = max(1, count * kind.itemsize)
                pinned = int(cuda.call("cudaMallocHost", size))
                stack.callback(cuda.call, "cudaFreeHost", pinned)
                memory = memoryview((ctypes.c_byte * size).from_address(pinned))
                self._host[name] = np.frombuffer(memory, kind, count).reshape(capacity, *shape)
                self.addresses[name] = int(cuda.call("cudaMalloc", size))
                stack.callback(cuda.call, "cudaFree", self.addresses[name])
            stack.callback(self._destroy_graphs)
            stack.callback(cuda.synchronize, stream)  # runs before everything is freed
            self._stack = stack.pop_all()

    def fill(self, images: npt.NDArray[Any]) -> None:
        """Copy images, at most the capacity, into pinned memory."""
        self.rows = len(images)
        self._host[self._input][: self.rows] = images

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        self._copy(self._input, to_gpu=True)

    def launch(self) -> None:
        """Enqueue the network; with ``graph``, as a CUDA graph from the second call on."""
        if self.rows in self._graphs:
            self.cuda.call("cudaGraphLaunch", self._graphs[self.rows], self.stream)
            return
        self._enqueue(self)  # also the warm-up that a capture needs
        if self._use_graph:
            self.cuda.synchronize(self.stream)
            self._graphs[self.rows] = self._capture_graph()

    def download(self) -> None:
        """Enqueue the copies of the outputs to pinned memory."""
        for name in self._outputs:
            self._copy(name, to_gpu=False)

    def outputs(self) -> Outputs:
        """Wait for the stream and return a copy of every output by name."""
        self.cuda.synchronize(self.stream)
        return {name: self._host[name][: self.rows].copy() for name in self._outputs}

    def logits(self) -> Logits:
        """Wait for the stream and return the logits ``(N, K)`` float32."""
        return next(iter(self.outputs().values())).astype(np.float32)

    def infer(self, images: npt.NDArray[Any]) -> Outputs:
        """Return every output for some images: all steps in sequence."""
        self.cuda.call("cudaSetDevice", self.cuda.device)  # for the calling thread
        self.fill(images)
        self.upload()
        self.launch()
        self.download()
        return self.outputs()

    def close(self) -> None:
        """Wait for the stream and free all memory."""
        self._stack.close()

    def _copy(self, name: str, *, to_gpu: bool) -> None:
        host, kinds = self._host[name][: self.rows], self.cuda.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_gpu else kinds.cudaMemcpyDeviceToHost
        ends = [self.addresses[name], host.ctypes.data]  # destination, source
        ends = ends if to_gpu else ends[::-1]
        self.cuda.call("cudaMemcpyAsync", *ends, host.nbytes, kind, self.stream)

    def _capture_graph(self) -> Any:
        """Return an executable CUDA graph of one launch, which is captured and not executed."""
        runtime, call = self.cuda.runtime, self.cuda.call
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.stream, mode)
        try:
            self._enqueue(self)
        except BaseException:
            # Ends the capture without a check: its error would hide the one that matters.
            runtime.cudaStreamEndCapture(self.stream)
            raise
        graph = call("cudaStreamEndCapture", self.stream)
        try:
            return call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def _destroy_graphs(self) -> None:
        for graph in self._graphs.values():
            self.cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()
