"""What can be timed: one network in one runtime, described so that another process can open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMPORTED = {
    "pytorch": ("torch", "timm"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "inductor": ("torch",),
}
"""What each runtime imports."""

CUDA_GRAPH = "cuda-graph"
"""The mode of an engine that is recorded once and launched as one piece."""


@dataclass(frozen=True)
class Contender:
    """One network in one runtime.

    Attributes:
        name: what reports call it, such as ``ort-cpu/fp32``.
        runtime: ``pytorch``, ``onnxruntime``, ``openvino``, ``tensorrt`` or ``inductor``.
        precision: of the arithmetic: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        file: the ONNX file, plan or package to open; "" for PyTorch.
        bundle: folder the original network is read from; "" for files.
        mode: how PyTorch runs it (``eager``, ``channels-last``, ``compile``,
            ``autocast``), ONNX Runtime's runner, or :data:`CUDA_GRAPH`; "" otherwise.
        embedded: what preprocessing the graph has inside: ``none``, ``normalize`` or ``uint8``.
        sha256: digest of ``file``, or of the weights.
        max_batch: largest batch the file takes, or None where it is dynamic.
        min_batch: smallest batch it takes.
        keeps_memory: whether its process keeps freed memory (see
            :data:`~van_deploy.bench.process.KEEP_MEMORY`).
        device: ``cpu`` or ``cuda:N``.
        options: of the runtime, as :class:`~van_deploy.runners.base.CudaOptions` has them.
    """

    name: str
    runtime: str
    precision: str
    file: str = ""
    bundle: str = ""
    mode: str = ""
    embedded: str = "none"
    sha256: str = ""
    max_batch: int | None = None
    min_batch: int = 1
    keeps_memory: bool = True
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)

    def refuses(self, batch: int) -> str:
        """Return why it cannot run ``batch`` images at once, or "" if it can.

        >>> Contender("tensorrt/x", "tensorrt", "fp16", max_batch=8).refuses(16)
        "batch 16 is outside the engine's profile (1 to 8)"
        """
        if self.max_batch is None or self.min_batch <= batch <= self.max_batch:
            return ""
        profile = f"{self.min_batch} to {self.max_batch}"
        return f"batch {batch} is outside the engine's profile ({profile})"


@dataclass(frozen=True)
class Skipped:
    """A contender that does not start, and why.

    Attributes:
        name: what reports call it.
        reason: one phrase for the user.
        remedy: what would let it start; "" where nothing on this machine would.
    """

    name: str
    reason: str
    remedy: str = ""


def runner_of(contender: Contender, threads: int) -> Any:
    """Return the runner of a contender, to be opened by the process that times it."""
    file, device = Path(contender.file), contender.device
    if contender.runtime == "pytorch":
        import torch

        from van_deploy.bundle import Bundle
        from van_deploy.runners.original import original_network
        from van_deploy.runners.pytorch import TorchRunner

        torch.set_num_threads(threads)
        network = original_network(Bundle.open(contender.bundle)).model
        precision = "fp32" if contender.mode == "autocast" else contender.precision
        return TorchRunner(network, contender.mode, device, precision)
    if contender.runtime == "onnxruntime":
        from van_deploy.runners.base import CudaOptions
        from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

        name, cuda = contender.mode, CudaOptions(**contender.options)
        return OnnxRuntimeRunner(file, threads=threads, name=name, device=device, cuda=cuda)
    if contender.runtime == "openvino":
        from van_deploy.runners.onnxruntime import OpenVinoRunner

        precision = "bf16" if contender.precision == "bf16" else "f32"
        return OpenVinoRunner(file, threads=threads, precision=precision)
    if contender.runtime == "inductor":
        from van_deploy.runners.pytorch import InductorRunner

        return InductorRunner(file, device=device, threads=threads)
    from van_deploy.runners.tensorrt import TensorRtRunner

    return TensorRtRunner(file, device=device, cuda_graph=contender.mode == CUDA_GRAPH)
