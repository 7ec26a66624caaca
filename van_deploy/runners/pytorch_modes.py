"""The ways PyTorch itself offers to run a network faster than plain eager mode."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn

from van_deploy.errors import UsageError
from van_deploy.runners.base import Images, Logits

__all__ = ["MODES", "TorchModeRunner"]

MODES = ("eager", "channels-last", "compile", "autocast")
"""``eager``: as it is. ``channels-last``: NHWC memory. ``compile``: torch.compile with
frozen weights, specialised on each batch size. ``autocast``: mixed precision, bfloat16
on a CPU and float16 on a GPU, in NHWC memory."""


class TorchModeRunner:
    """Runs a network on the CPU or a GPU in one of :data:`MODES`.

    Args:
        model: a network in eval mode, float32. It becomes the runner's.
        mode: one of :data:`MODES`.
        device: ``cpu`` or ``cuda``.

    Attributes:
        name: what reports call it.
        device_ms: what CUDA events measured around the network alone, in ms, one
            a call since it was last emptied; stays empty on a CPU.
    """

    def __init__(self, model: nn.Module, mode: str = "eager", device: str = "cpu") -> None:
        if mode not in MODES:
            raise UsageError(f"PyTorch has no mode '{mode}'.", f"Choose from: {', '.join(MODES)}.")
        self.name = "pytorch" if mode == "eager" else f"pytorch-{mode}"
        self.mode = mode
        self.device = torch.device(device)
        self.device_ms: list[float] = []
        self._model = model
        self._call: Any = None

    def __enter__(self) -> TorchModeRunner:
        """Move the network to where and how it runs; compiling waits for the first batch."""
        model = self._model.to(self.device).eval()
        if self.mode in {"channels-last", "autocast"}:
            model = model.to(memory_format=torch.channels_last)
        self._call = model
        if self.mode == "compile":
            options: dict[str, Any] = {"freezing": True}
            self._call = torch.compile(model, dynamic=False, options=options)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the network."""
        self._call = None

    @torch.no_grad()  # freezing does not take tensors of inference mode
    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``, float32.

        On a GPU the transfers in and out are part of it.
        """
        inputs = torch.from_numpy(images).to(self.device)
        if self.mode in {"channels-last", "autocast"}:
            inputs = inputs.to(memory_format=torch.channels_last)
        logits: Logits = self._timed(inputs).float().cpu().numpy()
        return logits

    def _timed(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return self._infer(inputs)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        outputs = self._infer(inputs)
        end.record()
        end.synchronize()
        self.device_ms.append(start.elapsed_time(end))
        return outputs

    def _infer(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.mode != "autocast":
            outputs: torch.Tensor = self._call(inputs)
            return outputs
        kind = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        with torch.autocast(self.device.type, kind):
            mixed: torch.Tensor = self._call(inputs)
        return mixed
