"""What every runtime looks like from outside: a context manager that maps images to logits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from van_deploy.config import BatchRange
from van_deploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from typing_extensions import Self

Images = npt.NDArray[np.float32]
"""``(N, C, S, S)`` float32, normalised by the model's preprocessing."""

Logits = npt.NDArray[np.float32]
"""``(N, K)`` float32."""

Outputs = dict[str, npt.NDArray[Any]]
"""Every output of a network by its name; the arrays are the caller's to keep."""


@runtime_checkable
class ResidentBatch(Protocol):
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

    def logits(self) -> Logits:
        """Wait for the stream, and return the logits that :meth:`download` brought."""

    def close(self) -> None:
        """Wait for the stream, and give the memory back."""


class Runner:
    """A network ready to answer. Open it with ``with``; it holds its resources until the end.

    Attributes:
        on_gpu: whether it runs on a GPU; of one that is open.
        tf32: whether FP32 layers may compute in TF32; likewise.
        emulated: whether BF16 is emulated; likewise.
    """

    on_gpu = tf32 = emulated = False

    def __enter__(self) -> Self:
        """Load the network."""
        with ExitStack() as stack:
            self._load(stack)
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Release everything, in the reverse order of its making."""
        self._held.close()

    def _load(self, stack: ExitStack) -> None:
        """Load the network; ``stack`` releases it."""

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` float32 of one batch, or the first feature map."""
        return next(iter(self.run_all(images).values())).astype(np.float32, copy=False)

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by name, for a batch in the network's own input type.

        Raises:
            InputError: the batch is not what the network takes.
            MissingDependency: the GPU is out of memory.
            ConversionError: the runtime fails.
        """
        raise NotImplementedError

    def resident_batch(self, images: npt.NDArray[Any]) -> ResidentBatch:
        """Return a batch that stays on the GPU, in the network's own input type; not uploaded yet.

        It belongs to the runner and has to be closed before it.

        Raises:
            InputError: the network does not take these images, or not so many.
            UsageError: it runs on a CPU.
            MissingDependency: the GPU is out of memory.
        """
        raise UsageError("This network runs on no GPU.", "Open it on one, with --device cuda:0.")


@dataclass(frozen=True)
class CudaOptions:
    """How ONNX Runtime's CUDA provider runs a graph. ``dataclasses.asdict`` is the record of it.

    Attributes:
        prefer_nhwc: convert convolutions to NHWC, which Tensor Cores want; not with CUDA graphs.
        use_tf32: let FP32 convolutions and products compute with 10 bits of mantissa.
        cudnn_conv_algo_search: how cuDNN's algorithm is chosen.
        fuse_conv_bias: let cuDNN fuse convolution, bias and activation. ONNX Runtime 1.31 fails
            with it on an H200.
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


def profile_for(profiles: Sequence[BatchRange], batch: int) -> int:
    """Return the index of the profile to run ``batch`` images with.

    Of those that allow it, the one whose optimum is nearest.

    Raises:
        InputError: none allows it.

    >>> profile_for([BatchRange(1, 1, 1), BatchRange(1, 8, 32)], 6)
    1
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.min <= batch <= profile.max]
    if not fitting:
        served = ", ".join(str(profile) for profile in profiles)
        raise InputError(
            f"The compiled network does not serve a batch of {batch}; its profiles are {served}.",
            f"Send batches it serves, or rebuild it with --batch 1:{batch}:{batch}.",
        )
    return min(fitting, key=lambda i: abs(profiles[i].opt - batch))


def require_served(
    images: npt.NDArray[Any],
    row: Sequence[int],
    dtype: npt.DTypeLike,
    profiles: Sequence[BatchRange],
) -> None:
    """Return if a compiled network takes these images.

    Args:
        images: ``(N, ...)``; float32 is taken for float16, too.
        row: the shape of one image; -1 for a dynamic height or width.
        dtype: of the network's input.
        profiles: the batch sizes it serves.

    Raises:
        InputError: they have another shape or type, or no profile allows so many.
    """
    given = images.shape[1:]
    fits = len(given) == len(row) and all(r in (-1, g) for r, g in zip(row, given, strict=True))
    narrowed = images.dtype == np.float32 and dtype == np.float16
    if not fits or not (narrowed or images.dtype == dtype):
        raise InputError(
            f"The compiled network takes (N, {', '.join(map(str, row))}) {np.dtype(dtype)}, "
            f"not {images.shape} {images.dtype}.",
            "Prepare them with the model's own preprocessing.",
        )
    profile_for(profiles, len(images))
