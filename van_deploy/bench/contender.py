"""What can be timed: one network in one runtime, described so that another process can open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CUDA_GRAPH", "Contender", "Skipped"]

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
