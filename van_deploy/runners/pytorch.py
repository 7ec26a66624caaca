"""PyTorch runners: the original network in PyTorch's execution modes, and Inductor packages.

An Inductor package (``.pt2``) is a network that PyTorch compiled ahead of time: native code.
Before it is loaded, its bytes are verified with its sidecar, and PyTorch, GPU and processor are
compared with this machine.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from van_deploy.engine.backend import detect_host
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.inductor import compile_environment, cudnn_tf32
from van_deploy.engine.sidecar import PackageSidecar
from van_deploy.errors import ConversionError, MissingDependency
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.runners.base import Logits, Outputs, Runner, check_input, gpu_index
from van_deploy.runners.cuda import device_not_found, out_of_memory

# Inductor's search, without its own templates for convolutions: on an H200 with PyTorch 2.11 the
# 3x3 depth-wise one took 22 s to try and was 400 times slower than cuDNN's.
AUTOTUNE = {"max_autotune": True, "max_autotune_conv_backends": "ATEN"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchRunner(Runner):
    """Runs a network on the CPU or a GPU. Eager mode on the CPU works without opening it.

    Args:
        model: a network in eval mode. It is not copied: opening moves and converts it in place.
        mode: ``eager``: unchanged. ``channels-last``: NHWC memory. ``compile``: torch.compile with
            frozen weights, specialised on each batch size; on a GPU in NHWC memory, with
            ``max-autotune`` and CUDA graphs. ``autocast``: mixed precision, bfloat16 on a CPU and
            float16 on a GPU, in NHWC memory.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: type of weights and images, a key of :data:`DTYPES`; None keeps the network's
            own type. The outputs are always float32.
        threads: threads on the CPU, of PyTorch in the whole process; None keeps their number.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "eager",
        device: str = "cpu",
        precision: str | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        self.threads = threads
        own = next(model.parameters()).dtype
        self.model, self.mode, self.device = model, mode, torch_device(device)
        self.dtype = own if precision is None else DTYPES[precision]
        self.on_gpu = self.device.type == "cuda"
        nhwc = mode in {"channels-last", "autocast"} or (mode == "compile" and self.on_gpu)
        self._layout = torch.channels_last if nhwc else torch.contiguous_format
        self._call: Any = model

    def _load(self, stack: contextlib.ExitStack) -> None:
        """Move and convert the network; the first batch compiles it."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with torch_errors("loading the network"):
            self.model.to(self.device, self.dtype).eval()
        if self._layout is torch.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if self.on_gpu:
            torch.backends.cudnn.benchmark = True
        if self.mode == "compile":
            options: dict[str, Any] = {"freezing": True}
            options |= {**AUTOTUNE, "triton.cudagraphs": True} if self.on_gpu else {}
            self._call = torch.compile(self.model, dynamic=False, options=options)

    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return every output by its index, float32, including the transfers from and to a GPU."""
        # Freezing does not accept tensors of inference mode.
        with (
            torch_errors(f"a batch of {len(batch)}"),
            torch.inference_mode(self.mode != "compile"),
            torch.no_grad(),
        ):
            inputs = torch.from_numpy(batch).to(self.device, self.dtype)
            outputs = self._infer(inputs.contiguous(memory_format=self._layout))
            return {str(i): value.float().cpu().numpy() for i, value in enumerate(outputs)}

    def resident_batch(self, images: npt.NDArray[Any]) -> TorchBatch:
        """Return a batch in GPU memory; see :meth:`Runner.resident_batch`."""
        if not self.on_gpu:
            super().resident_batch(images)
        return TorchBatch(
            lambda inputs: self._infer(inputs)[0], images, self.device, self.dtype, self._layout
        )

    def _infer(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kind = torch.float16 if self.on_gpu else torch.bfloat16
        with torch.autocast(self.device.type, kind, enabled=self.mode == "autocast"):
            outputs = self._call(inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


class InductorRunner(Runner):
    """Runs an Inductor package on the device it was compiled for.

    Args:
        package: the file.
        device: the GPU, for a package for GPUs.
        threads: threads of a package for the CPU; None lets PyTorch choose. Applies to PyTorch
            in the whole process.
    """

    def __init__(
        self, package: Path, *, device: str = "cuda:0", threads: int | None = None
    ) -> None:
        self.package, self.threads = package, threads
        self._index = gpu_index(device) or 0

    def _load(self, stack: contextlib.ExitStack) -> None:
        """Check the package and load it.

        Raises:
            InputError: package or sidecar is missing, damaged, edited or swapped.
            MissingDependency: PyTorch, GPU or processor differ from those it was compiled for.
            ConversionError: PyTorch does not load it.
        """
        self.sidecar = PackageSidecar.load(self.package)
        require_compatible(self.sidecar, detect_host(device=self._index))
        self.on_gpu = self.sidecar.device == "cuda"
        self.tf32 = self.on_gpu and self.sidecar.tf32
        self.device = torch_device(f"cuda:{self._index}" if self.on_gpu else "cpu")
        if self.on_gpu:
            stack.enter_context(cudnn_tf32(self.sidecar.tf32))
        elif self.threads is not None:
            torch.set_num_threads(self.threads)
        # PyTorch before 2.8 loads on the first GPU only.
        options: Any = {"device_index": self._index} if self._index and self.on_gpu else {}
        try:
            with torch_errors("loading the package"), compile_environment():
                self._call = torch._inductor.aoti_load_package(str(self.package), **options)
        except (RuntimeError, OSError) as error:
            raise ConversionError(
                f"PyTorch {torch.__version__} cannot load '{self.package}': "
                f"{str(error).splitlines()[0]}",
                "Build it again with `van-deploy build --backend inductor`.",
            ) from error
        stack.callback(self.__dict__.pop, "_call")

    @torch.no_grad()
    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return the logits ``(N, K)`` float32 by name; see :meth:`Runner.run_all`."""
        self._check(batch)
        with torch_errors(f"a batch of {len(batch)}"):
            inputs = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device)
            return {OUTPUT_NAME: self._call(inputs).cpu().numpy()}

    def resident_batch(self, images: npt.NDArray[Any]) -> TorchBatch:
        """Return a batch in GPU memory; see :meth:`Runner.resident_batch`."""
        self._check(images)
        if not self.on_gpu:
            super().resident_batch(images)
        return TorchBatch(self._call, images, self.device)

    def _check(self, images: npt.NDArray[Any]) -> None:
        check_input(images, self.sidecar.input_shape[1:], np.float32, [self.sidecar.batch])


class TorchBatch:
    """One batch of a PyTorch network on the GPU: a :class:`~.base.ResidentBatch`.

    Args:
        call: maps images in GPU memory to logits in GPU memory.
        images: ``(N, C, S, S)``, in host memory.
        device: device of the network.
        dtype: type of the network's input.
        layout: memory format of the network's input.

    Attributes:
        stream: handle of the batch's own CUDA stream.
    """

    def __init__(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        images: npt.NDArray[Any],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        source = torch.from_numpy(np.ascontiguousarray(images))
        with torch_errors(f"a batch of {len(images)}"):
            source = source.to(dtype).contiguous(memory_format=layout)
            self._host_input = torch.empty_like(source, pin_memory=True).copy_(source)
            self._input = torch.empty_like(source, device=device)
            self._input.copy_(source)  # so that a launch before the first upload has images
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self.stream = int(self._stream.cuda_stream)
        self._call = call
        self._output: Any = None
        self._host_output: Any = None

    def upload(self) -> None:
        """Enqueue the copy of the images to the GPU."""
        with torch.cuda.stream(self._stream):
            self._input.copy_(self._host_input, non_blocking=True)

    def launch(self) -> None:
        """Enqueue the network."""
        with (
            torch_errors(f"a batch of {len(self._input)}"),
            torch.cuda.device(self._input.device),
            torch.cuda.stream(self._stream),
            torch.no_grad(),
        ):
            self._output = self._call(self._input)

    def download(self) -> None:
        """Enqueue the copy of the logits of the last :meth:`launch` to pinned memory."""
        if self._host_output is None:
            self._host_output = torch.empty_like(self._output, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._host_output.copy_(self._output, non_blocking=True)

    def logits(self) -> Logits:
        """Wait for the stream and return the downloaded logits ``(N, K)`` float32."""
        self._stream.synchronize()
        logits: Logits = self._host_output.float().numpy().copy()
        return logits

    def close(self) -> None:
        """Wait for the stream and release the memory."""
        self._stream.synchronize()
        self._output = self._host_output = None


def torch_device(device: str) -> torch.device:
    """Return PyTorch's device after checking that it exists.

    Raises:
        MissingDependency: PyTorch was built without CUDA, or finds no such GPU.
    """
    index = gpu_index(device)
    if index is None:
        return torch.device("cpu")
    if torch.version.cuda is None or not torch.cuda.is_available():
        build = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
        raise MissingDependency(
            f"PyTorch {torch.__version__} finds no GPU here; it {build}.",
            "Run this on a machine with an NVIDIA GPU; see `van-deploy doctor`.",
        )
    if index >= torch.cuda.device_count():
        raise device_not_found(index, torch.cuda.device_count())
    return torch.device("cuda", index)


@contextlib.contextmanager
def torch_errors(operation: str) -> Iterator[None]:
    """Convert failures of CUDA and of compiled packages into this project's errors."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise out_of_memory(f"PyTorch, {operation}") from error
        # A compiled package may report only "API call failed", with the cause on stderr.
        if not re.search("CUDA error|cuDNN error|API call failed", str(error)):
            raise
        raise ConversionError(
            f"PyTorch failed ({operation}): {str(error).splitlines()[0]}",
            "See the output above, and run `van-deploy doctor`. After an illegal access the "
            "process must be restarted.",
        ) from error


@contextlib.contextmanager
def single_torch_thread() -> Iterator[None]:
    """Limit PyTorch to one thread, also in threads started inside the block.

    On a busy machine several threads wait for each other, and small operations take longer on
    several threads than on one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
