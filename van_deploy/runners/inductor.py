"""Inductor packages (``.pt2``): the network as PyTorch compiled it ahead of time.

A package is native code. Before one is loaded its sidecar has vouched for its bytes, and
PyTorch, GPU and processor have been compared with this machine.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from van_deploy.engine.backend import host_here
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.inductor import cudnn_tf32, quietly
from van_deploy.engine.sidecar import verified_package
from van_deploy.errors import ConversionError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.runners.base import Outputs, Runner, gpu_index, require_served
from van_deploy.runners.pytorch import TorchBatch, torch_device, torch_failures


class InductorRunner(Runner):
    """Runs a package on the device it was compiled for.

    Args:
        package: the file.
        device: which GPU, for a package for GPUs.
        threads: threads of a package for the CPU; None lets PyTorch choose. It holds for
            PyTorch in the whole process.
    """

    def __init__(
        self, package: Path, *, device: str = "cuda:0", threads: int | None = None
    ) -> None:
        self.package, self.threads = package, threads
        self._index = gpu_index(device) or 0

    def _load(self, stack: ExitStack) -> None:
        """Check the package and load it.

        Raises:
            InputError: package or sidecar is missing, damaged, edited or swapped.
            MissingDependency: PyTorch, GPU or processor are others than it was compiled for.
            ConversionError: PyTorch does not load it.
        """
        self.sidecar = verified_package(self.package)
        require_compatible(self.sidecar, host_here(device=self._index))
        self.on_gpu = self.sidecar.device == "cuda"
        self.tf32 = self.on_gpu and self.sidecar.tf32
        self.device = torch_device(f"cuda:{self._index}" if self.on_gpu else "cpu")
        if self.on_gpu:
            stack.enter_context(cudnn_tf32(self.sidecar.tf32))
        elif self.threads is not None:
            torch.set_num_threads(self.threads)
        # PyTorch before 2.8 loads on the first GPU only.
        where: dict[str, Any] = {"device_index": self._index} if self._index and self.on_gpu else {}
        try:
            with torch_failures("loading the package"), quietly():
                self._call = torch._inductor.aoti_load_package(str(self.package), **where)
        except (RuntimeError, OSError) as error:
            raise ConversionError(
                f"PyTorch {torch.__version__} cannot load '{self.package}': "
                f"{str(error).splitlines()[0]}",
                "Build it again with `van-deploy build --backend inductor`.",
            ) from error
        stack.callback(self.__dict__.pop, "_call")

    @torch.no_grad()
    def run_all(self, batch: npt.NDArray[Any]) -> Outputs:
        """Return the logits ``(N, K)`` float32 by their name; see :meth:`Runner.run_all`."""
        self._check(batch)
        with torch_failures(f"a batch of {len(batch)}"):
            given = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device)
            return {OUTPUT_NAME: self._call(given).cpu().numpy()}

    def resident(self, images: npt.NDArray[Any]) -> TorchBatch:
        """Return a batch that stays on the GPU; see :meth:`Runner.resident`."""
        self._check(images)
        if not self.on_gpu:
            super().resident(images)
        return TorchBatch(self._call, images, self.device)

    def _check(self, images: npt.NDArray[Any]) -> None:
        sidecar = self.sidecar
        require_served(images, sidecar.input_shape[1:], np.float32, [sidecar.batch])
