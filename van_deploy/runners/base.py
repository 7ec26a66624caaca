"""What every run time looks like from outside: a context manager that maps images to logits."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from van_deploy.errors import UsageError

__all__ = [
    "CudaOptions",
    "Images",
    "Logits",
    "Resident",
    "ResidentRunner",
    "Runner",
    "gpu_index",
]

Images = npt.NDArray[np.float32]
"""``(N, C, S, S)`` float32, normalised by the model's preprocessing."""

Logits = npt.NDArray[np.float32]
"""``(N, K)`` float32."""


@runtime_checkable
class Runner(Protocol):
    """A network ready to answer. Open it with ``with``; it holds its resources until the end.

    Attributes:
        name: what reports call it, such as ``ort-cpu``.
    """

    name: str

    def __enter__(self) -> Runner:
        """Load the network."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release everything, whatever happened."""

    def run(self, images: Images) -> Logits:
        """Return the logits of one batch. The result is the caller's to keep."""


@runtime_checkable
class Resident(Protocol):
    """One batch whose input and output stay in the GPU's memory from call to call.

    ``upload``, ``launch`` and ``download`` only enqueue on :attr:`stream` and return; in that
    order they are one inference. Each may be repeated alone, so that CUDA events recorded on
    the stream time transfers and kernels apart. The first ``launch`` may compile, tune or
    record a CUDA graph: never time it.

    Attributes:
        stream: handle of the CUDA stream (``cudaStream_t``) on which everything is enqueued.
    """

    stream: int

    def upload(self) -> None:
        """Enqueue the copy of the images from pinned host memory to the GPU."""

    def launch(self) -> None:
        """Enqueue the network on what :meth:`upload` brought."""

    def download(self) -> None:
        """Enqueue the copy of the outputs from the GPU to pinned host memory."""

    def outputs(self) -> Logits:
        """Wait for the stream, and return the logits that :meth:`download` brought."""

    def close(self) -> None:
        """Wait for the stream, and give the memory back."""


@runtime_checkable
class ResidentRunner(Protocol):
    """A runner on a GPU. Opened, it also gives batches that stay there."""

    def resident(self, images: npt.NDArray[Any]) -> Resident:
        """Return one batch on the GPU, in the network's own input type; not uploaded yet.

        It belongs to the runner and has to be closed before it.

        Raises:
            InputError: the network does not take these images, or not so many.
            UsageError: it runs on a CPU.
            MissingDependency: the GPU is out of memory.
        """


@dataclass(frozen=True)
class CudaOptions:
    """How ONNX Runtime's CUDA provider runs a graph. ``dataclasses.asdict`` is the record of it.

    Attributes:
        prefer_nhwc: convert convolutions to NHWC, which Tensor Cores want.
        use_tf32: let FP32 convolutions and products compute with 10 bits of mantissa.
        cudnn_conv_algo_search: how cuDNN's algorithm is chosen.
        fuse_conv_bias: let cuDNN fuse convolution, bias and activation.
        cuda_graph: record each batch size of a resident batch once, then launch it as one piece.
    """

    prefer_nhwc: bool = False
    use_tf32: bool = True
    cudnn_conv_algo_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] = "EXHAUSTIVE"
    fuse_conv_bias: bool = False
    cuda_graph: bool = False


def gpu_index(device: str) -> int | None:
    """Return which of CUDA's devices is meant, or None for the CPU.

    Raises:
        UsageError: it is neither ``cpu`` nor ``cuda:N``.

    >>> gpu_index("cuda:1"), gpu_index("cuda"), gpu_index("cpu")
    (1, 0, None)
    """
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise UsageError(f"There is no device '{device}'.", "Give cpu, cuda or cuda:N.")
    return int(number or 0)
