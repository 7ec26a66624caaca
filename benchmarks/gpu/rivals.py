"""PyTorch's own ways to run a network fast on a GPU: what a GPU's figures are held against.

"Times PyTorch" on a GPU is against the fastest of these, at the same batch; eager FP32 is
shown beside it. All inputs and outputs stay on the device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from van_deploy.kernels.network import FusedVan

__all__ = ["RIVALS", "Rival", "TorchResident"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Rival:
    """One way PyTorch runs a network.

    Attributes:
        name: what reports call it.
        precision: of weights and activations: ``fp32`` (its convolutions compute in TF32, as
            PyTorch has it), ``fp16`` or ``bf16``.
        channels_last: NHWC memory.
        compile_mode: of ``torch.compile``; "" for eager.
        graph: record the launches once as a CUDA graph, and replay it. The modes of
            ``torch.compile`` used here do so by themselves.
    """

    name: str
    precision: Literal["fp32", "fp16", "bf16"]
    channels_last: bool = True
    compile_mode: str = ""
    graph: bool = False


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("eager-fp32", "fp32", channels_last=False),
        Rival("eager-fp16", "fp16"),
        Rival("eager-fp16-graph", "fp16", graph=True),
        Rival("compile-fp16", "fp16", compile_mode="max-autotune"),
        Rival("compile-fp16-quick", "fp16", compile_mode="reduce-overhead"),
        Rival("compile-bf16", "bf16", compile_mode="reduce-overhead"),
        Rival("kernels", "fp16", graph=True),
        Rival("kernels-compile", "fp16", compile_mode="reduce-overhead"),
    )
}
"""By name. ``quick`` and ``bf16`` have CUDA graphs, but no kernels chosen by timing them;
``kernels`` are this project's, the second through ``torch.compile``."""


class TorchResident:
    """A PyTorch network with its input and output on the device.

    Args:
        model: a network in eval mode, without gradients. It becomes this one's.
        images: ``(N, C, S, S)`` float32, normalised.
        rival: how it runs.
        device: such as ``cuda:0``. On ``cpu`` a launch is a run, and nothing is pinned.

    Attributes:
        stream: handle of the stream; PyTorch's current one.
        compile_s: seconds until the first answer: compiling, tuning and recording.
    """

    def __init__(
        self, model: nn.Module, images: npt.NDArray[np.float32], rival: Rival, device: str
    ) -> None:
        """See the class."""
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        dtype = DTYPES[rival.precision]
        layout = torch.channels_last if rival.channels_last else torch.contiguous_format
        self._model: Any = model.to(self.device)
        if not isinstance(model, FusedVan):  # which has its types and layouts by itself
            self._model = model.to(dtype).to(memory_format=layout)
        host = torch.from_numpy(images).to(dtype).contiguous(memory_format=layout)
        self._host_in = host.pin_memory() if on_gpu else host
        self._input = self._host_in.to(self.device)
        self._compiled = bool(rival.compile_mode)
        if self._compiled:
            torch.compiler.reset()
            self._model = torch.compile(self._model, mode=rival.compile_mode, dynamic=False)
        self.stream = torch.cuda.current_stream(self.device).cuda_stream if on_gpu else 0
        self._output: Tensor | None = None
        self._graph: Any = None
        start = time.perf_counter()
        for _ in range(3):  # torch.compile records its CUDA graph in the second call
            self.launch()
        if rival.graph and on_gpu:
            self._record()
        output = self._ready()
        self._host_out = torch.empty_like(output, device="cpu", pin_memory=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.compile_s = time.perf_counter() - start

    def upload(self) -> None:
        """Copy the images to the device."""
        self._input.copy_(self._host_in, non_blocking=True)

    @torch.no_grad()
    def launch(self) -> None:
        """Put one run on the stream."""
        if self._graph is not None:
            self._graph.replay()
            return
        self._output = None  # a compiled network writes over what it gave before
        if self._compiled:
            torch.compiler.cudagraph_mark_step_begin()
        self._output = self._model(self._input)

    def download(self) -> None:
        """Copy the logits to the host."""
        self._host_out.copy_(self._ready(), non_blocking=True)

    def outputs(self) -> npt.NDArray[np.float32]:
        """Wait, and return the logits ``(N, K)`` float32."""
        logits: npt.NDArray[np.float32] = self._ready().float().cpu().numpy()
        return logits

    def close(self) -> None:
        """Let go of the network and its buffers."""
        self._model = self._graph = self._output = None

    def _ready(self) -> Tensor:
        if self._output is None:
            raise RuntimeError("the network was not launched yet")
        return self._output

    @torch.no_grad()
    def _record(self) -> None:
        """Record one run as a CUDA graph. The runs before it have chosen cuDNN's algorithms."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._model(self._input)
        self._graph = graph
        self.launch()
