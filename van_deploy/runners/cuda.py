"""Device memory, pinned memory, streams and CUDA graphs, through NVIDIA's cuda-bindings.

Nothing here is imported or initialised before a runner is opened.
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

Specs = Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]
"""Tensors by name: the shape of one row, and the type."""


def require_cuda(device: int = 0) -> Cuda:
    """Return CUDA's runtime on one of its devices, having seen that the GPU answers.

    Args:
        device: CUDA's number, so that ``CUDA_VISIBLE_DEVICES`` has been applied.

    Raises:
        MissingDependency: cuda-bindings, the driver or this GPU is missing.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingDependency(
            f"NVIDIA's cuda-bindings is not installed ({error}); GPU memory is taken with it.",
            f"Install it with `{pip_command()} install cuda-bindings`.",
        ) from error
    try:
        status, count = runtime.cudaGetDeviceCount()
        why = _text(runtime, status) if int(status) or not count else ""
    except RuntimeError as error:  # without libcuda.so.1 the bindings raise instead
        count, why = 0, str(error)
    if why:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is '{visible}'"
        raise MissingDependency(
            f"CUDA finds no GPU here: {why}{hidden}.",
            "Run this on a machine with an NVIDIA GPU; see `van-deploy doctor`.",
        )
    if device >= count:
        raise no_device(device, count)
    return Cuda(runtime, device)


def out_of_memory(what: str) -> MissingDependency:
    """Return the error for a GPU without room for ``what``."""
    return MissingDependency(
        f"The GPU is out of memory ({what}).",
        "Use a smaller batch, or close what else uses the GPU.",
    )


def no_device(device: int, count: int) -> MissingDependency:
    """Return the error for a GPU that is not among those CUDA sees."""
    return MissingDependency(
        f"There is no device cuda:{device}; CUDA sees {count}, from cuda:0.",
        "Give one of these, or look at CUDA_VISIBLE_DEVICES.",
    )


def _text(runtime: Any, error: Any) -> str:
    """Return CUDA's words for an error code."""
    _, text = runtime.cudaGetErrorString(error)
    return text.decode() if isinstance(text, bytes) else str(text)


class Cuda:
    """CUDA's runtime on one device, with error codes turned into exceptions.

    Args:
        runtime: the module ``cuda.bindings.runtime``.
        device: CUDA's number of the device.
    """

    def __init__(self, runtime: Any, device: int = 0) -> None:
        self.runtime, self.device = runtime, device
        self.call("cudaSetDevice", device)

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what the function called ``name`` returns besides its error code.

        Raises:
            MissingDependency: the GPU is out of memory, or others have it for themselves.
            ConversionError: it failed otherwise.
        """
        error, *values = getattr(self.runtime, name)(*arguments)
        codes = self.runtime.cudaError_t
        if int(error) == int(codes.cudaErrorMemoryAllocation):
            raise out_of_memory(name)
        if int(error) == int(codes.cudaErrorDevicesUnavailable):
            raise MissingDependency(
                f"The GPU cuda:{self.device} is in use by another process that has it for itself.",
                "Wait for that process, or take another GPU with --device cuda:N.",
            )
        if int(error) != 0:
            raise ConversionError(
                f"CUDA failed in {name}: {_text(self.runtime, error)}.",
                "Run `van-deploy doctor`; after an illegal access the process must be restarted.",
            )
        return values[0] if len(values) == 1 else tuple(values)

    def stream(self, stack: ExitStack) -> int:
        """Return a stream that does not wait for the default one; ``stack`` destroys it."""
        handle = self.call("cudaStreamCreateWithFlags", self.runtime.cudaStreamNonBlocking)
        stack.callback(self.call, "cudaStreamDestroy", handle)
        return int(handle)

    def synchronize(self, stream: int) -> None:
        """Wait until everything on the stream is done."""
        self.call("cudaStreamSynchronize", stream)


class DeviceBatch:
    """Room for one batch in pinned memory and on the GPU: a :class:`~.base.ResidentBatch`.

    Args:
        cuda: the runtime.
        stream: what everything is enqueued on; the runner's.
        given: the input.
        answers: the outputs; the first holds the logits.
        rows: images it has room for.
        enqueue: puts the network on the stream, for this batch's :attr:`rows`.
        graph: record the network once for each number of rows, and launch it as one piece.

    Attributes:
        stream: likewise.
        rows: images in it now; at most what there is room for.
        addresses: where each tensor lies on the GPU.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        given: Specs,
        answers: Specs,
        rows: int,
        enqueue: Callable[[DeviceBatch], None],
        *,
        graph: bool = False,
    ) -> None:
        self.cuda, self.stream, self.rows = cuda, stream, rows
        self._enqueue, self._records = enqueue, graph
        self._input, self._outputs = next(iter(given)), tuple(answers)
        self._host: Outputs = {}
        self.addresses: dict[str, int] = {}
        self._graphs: dict[int, Any] = {}
        with ExitStack() as stack:
            for name, (shape, dtype) in {**given, **answers}.items():
                kind, count = np.dtype(dtype), int(np.prod((rows, *shape)))
                size = max(1, count * kind.itemsize)
                pinned = int(cuda.call("cudaMallocHost", size))
                stack.callback(cuda.call, "cudaFreeHost", pinned)
                memory = memoryview((ctypes.c_byte * size).from_address(pinned))
                self._host[name] = np.frombuffer(memory, kind, count).reshape(rows, *shape)
                self.addresses[name] = int(cuda.call("cudaMalloc", size))
                stack.callback(cuda.call, "cudaFree", self.addresses[name])
            stack.callback(self._drop_graphs)
            stack.callback(cuda.synchronize, stream)  # first of all
            self._stack = stack.pop_all()

    def fill(self, images: npt.NDArray[Any]) -> None:
        """Put images, at most as many as there is room for, into pinned memory."""
        self.rows = len(images)
        self._host[self._input][: self.rows] = images

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        self._copy(self._input, to_gpu=True)

    def launch(self) -> None:
        """Enqueue the network, as a CUDA graph from the second call on where that was asked."""
        if self.rows in self._graphs:
            self.cuda.call("cudaGraphLaunch", self._graphs[self.rows], self.stream)
            return
        self._enqueue(self)  # also the warm-up a recording needs
        if self._records:
            self.cuda.synchronize(self.stream)
            self._graphs[self.rows] = self._recorded()

    def download(self) -> None:
        """Enqueue the copies of the outputs to pinned memory."""
        for name in self._outputs:
            self._copy(name, to_gpu=False)

    def outputs(self) -> Outputs:
        """Wait, and return every output by name; the arrays are the caller's."""
        self.cuda.synchronize(self.stream)
        return {name: self._host[name][: self.rows].copy() for name in self._outputs}

    def logits(self) -> Logits:
        """Wait, and return the logits ``(N, K)`` float32."""
        return next(iter(self.outputs().values())).astype(np.float32)

    def answers(self, images: npt.NDArray[Any]) -> Outputs:
        """Return every output for some images: all steps, one after the other."""
        self.cuda.call("cudaSetDevice", self.cuda.device)  # for the calling thread
        self.fill(images)
        self.upload()
        self.launch()
        self.download()
        return self.outputs()

    def close(self) -> None:
        """Wait, and give everything back."""
        self._stack.close()

    def _copy(self, name: str, *, to_gpu: bool) -> None:
        host, kinds = self._host[name][: self.rows], self.cuda.runtime.cudaMemcpyKind
        kind = kinds.cudaMemcpyHostToDevice if to_gpu else kinds.cudaMemcpyDeviceToHost
        ends = [self.addresses[name], host.ctypes.data]
        ends = ends if to_gpu else ends[::-1]
        self.cuda.call("cudaMemcpyAsync", *ends, host.nbytes, kind, self.stream)

    def _recorded(self) -> Any:
        """Return one launch of the network, recorded instead of done."""
        runtime, call = self.cuda.runtime, self.cuda.call
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.stream, mode)
        try:
            self._enqueue(self)
        except BaseException:
            # Ends the capture; its own error would hide the one that matters.
            runtime.cudaStreamEndCapture(self.stream)
            raise
        graph = call("cudaStreamEndCapture", self.stream)
        try:
            return call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            self.cuda.call("cudaGraphExecDestroy", graph)
        self._graphs.clear()
