"""The ways PyTorch itself offers to run a network, and PyTorch's batches that stay on the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from van_deploy.errors import ConversionError, MissingDependency, UsageError
from van_deploy.runners.base import Images, Logits, gpu_index
from van_deploy.runners.cuda import no_device, out_of_memory

__all__ = [
    "AUTOTUNE",
    "DTYPES",
    "MODES",
    "TorchBatch",
    "TorchModeRunner",
    "torch_device",
    "torch_failures",
]

MODES = ("eager", "channels-last", "compile", "autocast")
"""``eager``: as it is. ``channels-last``: NHWC memory. ``compile``: torch.compile with frozen
weights, specialised on each batch size; on a GPU in NHWC memory, with ``max-autotune`` and CUDA
graphs. ``autocast``: mixed precision, bfloat16 on a CPU and float16 on a GPU, in NHWC memory."""

AUTOTUNE = {"max_autotune": True, "max_autotune_conv_backends": "ATEN"}
"""Inductor's search, without its own templates for convolutions: on an H100 each depth-wise one
took 22 s to try and was 400 times slower than cuDNN's (PyTorch 2.11; docs/gpu-results.md)."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def torch_device(device: str) -> torch.device:
    """Return PyTorch's device, having seen that it is there.

    Raises:
        MissingDependency: PyTorch was built without CUDA, or finds no such GPU.
    """
    index = gpu_index(device)
    if index is None:
        return torch.device("cpu")
    if torch.version.cuda is None or not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise MissingDependency(
            f"PyTorch {torch.__version__} finds no GPU here; it {built}.",
            "Run this on a machine with an NVIDIA GPU; see `van-deploy doctor`.",
        )
    if index >= torch.cuda.device_count():
        raise no_device(index, torch.cuda.device_count())
    return torch.device("cuda", index)


@contextlib.contextmanager
def torch_failures(what: str) -> Iterator[None]:
    """Turn CUDA's failures in PyTorch into the project's errors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"PyTorch, {what}") from error
    except RuntimeError as error:
        if "CUDA error" not in str(error) and "out of memory" not in str(error):
            raise
        if "out of memory" in str(error):
            raise out_of_memory(f"PyTorch, {what}") from error
        raise ConversionError(
            f"CUDA failed in PyTorch ({what}): {str(error).splitlines()[0]}",
            "Run `van-deploy doctor`; after an illegal access the process must be restarted.",
        ) from error


class TorchBatch:
    """One batch of a PyTorch network on the GPU: a :class:`~.base.Resident`.

    Args:
        call: maps the images on the GPU to logits there.
        images: ``(N, C, S, S)``, in host memory.
        device: of the network.
        dtype: what the network computes in.
        channels_last: whether it takes NHWC memory.

    Attributes:
        stream: a CUDA stream of its own.
    """

    def __init__(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        images: npt.NDArray[Any],
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        given = torch.from_numpy(np.ascontiguousarray(images))
        with torch_failures(f"a batch of {len(images)}"):
            given = given.to(dtype or given.dtype).contiguous(memory_format=layout)
            self._host_input = torch.empty_like(given, pin_memory=True).copy_(given)
            self._input = torch.empty_like(given, device=device)
            self._input.copy_(given)  # what is launched before an upload sees images, too
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.stream = int(self._stream.cuda_stream)
        self._call = call
        self._output: torch.Tensor | None = None
        self._host_output: torch.Tensor | None = None

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        with torch.cuda.stream(self._stream):
            self._input.copy_(self._host_input, non_blocking=True)

    def launch(self) -> None:
        """Enqueue the network."""
        with (
            torch_failures(f"a batch of {len(self._input)}"),
            torch.cuda.device(self._input.device),
            torch.cuda.stream(self._stream),
            torch.no_grad(),
        ):
            self._output = self._call(self._input)

    def download(self) -> None:
        """Enqueue the copy of the logits to pinned memory.

        Raises:
            UsageError: nothing was launched.
        """
        if self._output is None:
            raise UsageError("There is no output to bring back.", "Call launch() first.")
        if self._host_output is None:
            self._host_output = torch.empty_like(self._output, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._host_output.copy_(self._output, non_blocking=True)

    def outputs(self) -> Logits:
        """Wait, and return the logits ``(N, K)`` float32."""
        if self._host_output is None:
            raise UsageError("There is no output yet.", "Call launch() and download() first.")
        self._stream.synchronize()
        logits: Logits = self._host_output.float().numpy().copy()
        return logits

    def close(self) -> None:
        """Wait, and let go of the memory."""
        self._stream.synchronize()
        self._output = self._host_output = None


class TorchModeRunner:
    """Runs a network on the CPU or a GPU in one of :data:`MODES`.

    Args:
        model: a network in eval mode, float32. It becomes the runner's.
        mode: one of :data:`MODES`.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: what weights and images are converted to: a key of :data:`DTYPES`. The
            logits are float32 always.

    Attributes:
        name: what reports call it.
        model: the network.
    """

    def __init__(
        self, model: nn.Module, mode: str = "eager", device: str = "cpu", precision: str = "fp32"
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"PyTorch has no mode '{mode}'.", f"Choose from: {', '.join(MODES)}.")
        if precision not in DTYPES:
            raise UsageError(f"PyTorch runs nothing in '{precision}'.", f"Known: {[*DTYPES]}.")
        plain = "pytorch" if mode == "eager" else f"pytorch-{mode}"
        self.name = plain if precision == "fp32" else f"{plain}-{precision}"
        self.mode = mode
        self.device = torch_device(device)
        self.dtype = DTYPES[precision]
        self.model = model
        self._call: Any = None
        self._channels_last = mode in {"channels-last", "autocast"} or (
            mode == "compile" and self.device.type == "cuda"
        )

    def __enter__(self) -> TorchModeRunner:
        """Move the network to where and how it runs; compiling waits for the first batch.

        Raises:
            MissingDependency: the GPU is out of memory.
        """
        with torch_failures("loading the network"):
            model = self.model.to(self.device, self.dtype).eval()
        if self._channels_last:
            model = model.to(memory_format=torch.channels_last)
        self._call = model
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        if self.mode == "compile":
            options: dict[str, Any] = {"freezing": True}
            if self.device.type == "cuda":
                options |= {**AUTOTUNE, "triton.cudagraphs": True}
            self._call = torch.compile(model, dynamic=False, options=options)
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the network."""
        self._call = None

    @torch.no_grad()  # freezing does not take tensors of inference mode
    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``, float32.

        On a GPU the transfers in and out are part of it.
        """
        with torch_failures(f"a batch of {len(images)}"):
            inputs = torch.from_numpy(images).to(self.device, self.dtype)
            if self._channels_last:
                inputs = inputs.to(memory_format=torch.channels_last)
            logits: Logits = self._infer(inputs).float().cpu().numpy()
        return logits

    def resident(self, images: npt.NDArray[Any]) -> TorchBatch:
        """Return a batch that stays on the GPU; see :class:`~.base.ResidentRunner`.

        Raises:
            UsageError: the network is on the CPU.
            MissingDependency: the GPU is out of memory.
        """
        if self.device.type != "cuda":
            raise UsageError(f"'{self.name}' runs on no GPU.", "Open it with device='cuda:0'.")
        return TorchBatch(
            self._infer, images, self.device, self.dtype, channels_last=self._channels_last
        )

    def _infer(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the logits, or the last of the feature maps."""
        kind = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        mixed = self.mode == "autocast"
        with torch.autocast(self.device.type, kind, enabled=mixed):
            outputs: torch.Tensor | tuple[torch.Tensor, ...] = self._call(inputs)
        return outputs[-1] if isinstance(outputs, tuple) else outputs
