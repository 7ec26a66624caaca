"""The interface of all runners: a context manager that maps images to logits."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.errors import InputError, UsageError

Images = npt.NDArray[np.float32]  # (N, C, S, S), normalised by the model's preprocessing
Logits = npt.NDArray[np.float32]  # (N, K)
Outputs = dict[str, npt.NDArray[Any]]  # every output by name; the arrays belong to the caller
AnyRunner = TypeVar("AnyRunner", bound="Runner")


@runtime_checkable
class ResidentBatch(Protocol):
    """One batch whose input and output stay in GPU memory between calls.

    ``upload``, ``launch`` and ``download`` only enqueue work on :attr:`stream` and return; called
    in that order they are one inference. Each may be repeated alone, so that CUDA events recorded
    on the stream time transfers and kernels separately. The first ``launch`` may compile, tune or
    capture a CUDA graph: never time it.

    Attributes:
        stream: handle of the CUDA stream (``cudaStream_t``) on which all work is enqueued.
    """

    stream: int

    def upload(self) -> None:
        """Enqueue the copy of the images from pinned host memory to the GPU."""

    def launch(self) -> None:
        """Enqueue the network on the images of the last :meth:`upload`."""

    def download(self) -> None:
        """Enqueue the copy of the outputs from the GPU to pinned host memory."""

    def logits(self) -> Logits:
        """Wait for the stream and return the logits of the last :meth:`download`."""

    def close(self) -> None:
        """Wait for the stream and free the memory."""


class Runner:
    """A network that can run batches. Open it with ``with``, which also releases its resources.

    Attributes:
        on_gpu: whether an open runner runs on a GPU.
        tf32: whether FP32 layers of an open runner may compute in TF32.
        emulates_bf16: whether an open runner emulates BF16.
    """

    on_gpu = tf32 = emulates_bf16 = False

    def __enter__(self: AnyRunner) -> AnyRunner:
        """Load the network."""
        with ExitStack() as stack:
            self._load(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Release all resources in the reverse order of their creation."""
        self._resources.close()

    def _load(self, stack: ExitStack) -> None:
        """Load the network; ``stack`` releases it."""

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` float32 of one batch, or the first feature map."""
        return next(iter(self.run_all(images).values())).astype(np.float32, copy=False)

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the network's own input type.

        Raises:
            InputError: the network does not take this batch.
            MissingDependency: the GPU is out of memory.
            ConversionError: the runtime fails.
        """
        raise NotImplementedError

    def resident_batch(self, images: npt.NDArray[Any]) -> ResidentBatch:
        """Return a batch in GPU memory, in the network's own input type, not yet uploaded.

        Close the batch before the runner.

        Raises:
            InputError: the network does not take these images, or not this many.
            UsageError: the network runs on a CPU.
            MissingDependency: the GPU is out of memory.
        """
        raise UsageError("This network runs on no GPU.", "Open it on a GPU with --device cuda:0.")


@dataclass(frozen=True)
class CudaOptions:
    """Options of ONNX Runtime's CUDA provider; reports store them with ``dataclasses.asdict``.

    Attributes:
        prefer_nhwc: convert convolutions to NHWC, which suits Tensor Cores; not with CUDA graphs.
        use_tf32: let FP32 convolutions and matrix products compute with a 10-bit mantissa.
        cudnn_conv_algo_search: how cuDNN's convolution algorithm is selected.
        fuse_conv_bias: let cuDNN fuse convolution, bias and activation. ONNX Runtime 1.31 fails
            with it on an H200.
        cuda_graph: capture a CUDA graph once for each batch size and replay it.
    """

    prefer_nhwc: bool = False
    use_tf32: bool = True
    cudnn_conv_algo_search: Literal["EXHAUSTIVE", "HEURISTIC", "DEFAULT"] = "EXHAUSTIVE"
    fuse_conv_bias: bool = False
    cuda_graph: bool = False


def gpu_index(device: str) -> int | None:
    """Return the CUDA device number of a device name, or None for the CPU.

    Raises:
        UsageError: the name is neither ``cpu``, ``cuda`` nor ``cuda:N``.

    >>> gpu_index("cuda:1"), gpu_index("cuda"), gpu_index("cpu")
    (1, 0, None)
    """
    kind, _, number = device.partition(":")
    if device == "cpu":
        return None
    if kind != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise UsageError(f"There is no device '{device}'.", "Give cpu, cuda or cuda:N.")
    return int(number or 0)


def select_profile(profiles: Sequence[BatchRange], batch: int) -> int:
    """Return the index of the profile for ``batch`` images: the one with the nearest optimum.

    Raises:
        InputError: no profile allows this batch size.

    >>> select_profile([BatchRange(1, 1, 1), BatchRange(1, 8, 32)], 6)
    1
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    if not fitting:
        ranges = ", ".join(str(profile) for profile in profiles)
        raise InputError(
            f"The compiled network does not serve a batch of {batch}; its profiles are {ranges}.",
            f"Send batches within these profiles, or rebuild it with --batch 1:{batch}:{batch}.",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


def check_input(
    images: npt.NDArray[Any],
    row_shape: Sequence[int],
    dtype: npt.DTypeLike,
    profiles: Sequence[BatchRange] = (),
) -> None:
    """Check that a network takes these images; NumPy would stretch some others to its buffers.

    Args:
        images: ``(N, ...)``; float32 images are also accepted for float16 networks.
        row_shape: shape of one image; -1 for a dynamic height or width.
        dtype: type of the network's input.
        profiles: supported batch sizes; none for a dynamic batch.

    Raises:
        InputError: shape or type differ, or no profile allows this batch size.
    """
    shape = images.shape[1:]
    fits = len(shape) == len(row_shape) and all(
        size in (-1, given) for size, given in zip(row_shape, shape, strict=True)
    )
    narrowed = images.dtype == np.float32 and dtype == np.float16
    if not fits or not (narrowed or images.dtype == dtype):
        raise InputError(
            f"The network takes (N, {', '.join(map(str, row_shape))}) {np.dtype(dtype)}, "
            f"not {images.shape} {images.dtype}.",
            "Prepare the images with the model's own preprocessing.",
        )
    if profiles:
        select_profile(profiles, len(images))
