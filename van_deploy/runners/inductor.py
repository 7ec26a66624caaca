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

from van_deploy.config import BatchRange
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.host import host_here
from van_deploy.engine.inductor import cudnn_tf32, quietly
from van_deploy.engine.sidecar import verified_package
from van_deploy.errors import ConversionError, InputError, UsageError
from van_deploy.graph.names import OUTPUT_NAME
from van_deploy.runners.base import Images, Logits, gpu_index
from van_deploy.runners.pytorch_modes import TorchBatch, torch_device, torch_failures

__all__ = ["InductorRunner"]


class InductorRunner:
    """Runs a package on the device it was compiled for. Open it with ``with``.

    Args:
        package: the file.
        device: which GPU, for a package for GPUs.
        threads: threads of a package for the CPU; None lets PyTorch choose. It holds for
            PyTorch in the whole process.
        name: what reports call it.
    """

    def __init__(
        self,
        package: Path,
        *,
        device: str = "cuda:0",
        threads: int | None = None,
        name: str = "inductor",
    ) -> None:
        self.package = package
        self.device = torch.device("cpu")
        self.threads = threads
        self.name = name
        self._wanted = device
        self._row: tuple[int, ...] = ()
        self._batch = BatchRange()
        self._call: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> InductorRunner:
        """Check the package and load it.

        Raises:
            InputError: package or sidecar is missing, damaged, edited or swapped.
            MissingDependency: PyTorch, GPU or processor are others than it was compiled for.
            ConversionError: PyTorch does not load it.
        """
        index = gpu_index(self._wanted) or 0
        sidecar = verified_package(self.package)
        require_compatible(sidecar, host_here(device=index))
        if sidecar.device == "cuda":
            self.device = torch_device(f"cuda:{index}")
        elif self.threads is not None:
            torch.set_num_threads(self.threads)
        self._row, self._batch = sidecar.input_shape[1:], sidecar.batch
        with ExitStack() as stack, torch_failures("loading the package"):
            if sidecar.device == "cuda":
                stack.enter_context(cudnn_tf32(sidecar.tf32))
            try:
                with quietly():
                    # PyTorch before 2.8 loads on the first GPU only.
                    where: dict[str, Any] = (
                        {"device_index": index} if index and sidecar.device == "cuda" else {}
                    )
                    self._call = torch._inductor.aoti_load_package(str(self.package), **where)
            except (RuntimeError, OSError) as error:
                raise ConversionError(
                    f"PyTorch {torch.__version__} cannot load '{self.package}': "
                    f"{str(error).splitlines()[0]}",
                    "Build it again with `van-deploy build --backend inductor`.",
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the package."""
        self._call = None
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    @property
    def on_gpu(self) -> bool:
        """Whether the package is for a GPU; of one that is open."""
        return self.device.type == "cuda"

    @torch.no_grad()
    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``, float32.

        Raises:
            InputError: the images have another shape or type than the package's input, or are
                more or fewer than it serves.
            UsageError: it is not open.
        """
        self._check(images)
        with torch_failures(f"a batch of {len(images)}"):
            given = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits: Logits = self._call(given).cpu().numpy()
        return logits

    def run_all(self, batch: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the logits by their name. Errors are :meth:`run`'s."""
        return {OUTPUT_NAME: self.run(batch)}

    def resident(self, images: npt.NDArray[Any]) -> TorchBatch:
        """Return a batch that stays on the GPU; see :class:`~.base.ResidentRunner`.

        Raises:
            InputError: as :meth:`run`.
            UsageError: the package is for the CPU.
            MissingDependency: the GPU is out of memory.
        """
        self._check(images)
        if self.device.type != "cuda":
            raise UsageError(f"'{self.package.name}' is for the CPU.", "Build one for a GPU.")
        return TorchBatch(self._call, images, self.device)

    def _check(self, images: npt.NDArray[Any]) -> None:
        if self._call is None:
            raise UsageError("The package is not open.", "Use the runner in a `with` block.")
        if images.shape[1:] != self._row or images.dtype != np.float32:
            raise InputError(
                f"The package takes (N, {', '.join(map(str, self._row))}) float32; the images "
                f"are {images.shape} {images.dtype}.",
                "Prepare them with the model's own preprocessing.",
            )
        if not self._batch.min <= len(images) <= self._batch.max:
            raise InputError(
                f"The package does not serve a batch of {len(images)}; it takes "
                f"{self._batch.min} to {self._batch.max}.",
                f"Send batches it serves, or rebuild it with --batch 1:8:{len(images)}.",
            )
