"""TensorRT 10, TensorRT 11 and TensorRT for RTX: engines on the GPU they were built for.

A plan is native code. Before one is deserialised its sidecar has vouched for its
bytes, and backend, version, GPU and driver have been compared with this machine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.engine.backend import RTX, backend_named
from van_deploy.engine.compatibility import require_compatible
from van_deploy.engine.host import host_here
from van_deploy.engine.sidecar import Sidecar, sidecar_path, verified_sidecar
from van_deploy.errors import UsageError
from van_deploy.runners.base import Images, Logits, gpu_index
from van_deploy.runners.cuda import DeviceBatch, require_cuda
from van_deploy.runners.plan import LoadedPlan

__all__ = ["TensorRtRunner", "admit"]


def admit(plan: Path, *, trust_engine: bool = False, device: int = 0) -> Sidecar | None:
    """Return the sidecar of a plan that may be deserialised here.

    Args:
        plan: the engine.
        trust_engine: take a plan without a sidecar, for which None is returned. A
            sidecar that is there is believed and checked all the same.
        device: CUDA's number of the GPU that is to run it.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
        MissingDependency: back end, version, GPU or driver do not fit.
    """
    if trust_engine and plan.is_file() and not sidecar_path(plan).exists():
        return None
    sidecar = verified_sidecar(plan)
    require_compatible(sidecar, host_here(device=device))
    return sidecar


class TensorRtRunner:
    """Runs an engine. Open it with ``with``; it holds GPU memory until the end.

    Not to be used from several threads at once.

    Args:
        plan: the engine.
        trust_engine: take a plan that has no sidecar. Loading it runs the code in it.
        backend: for a plan without a sidecar: ``tensorrt`` or ``tensorrt-rtx``.
        device: which GPU.
        cuda_graph: record each batch size once and launch it as one piece from then on.
        runtime_cache: TensorRT for RTX only: file of kernels compiled on this machine,
            read at the start and written at the end.
        name: what reports call it.
    """

    def __init__(
        self,
        plan: Path,
        *,
        trust_engine: bool = False,
        backend: str = RTX,
        device: str = "cuda:0",
        cuda_graph: bool = False,
        runtime_cache: Path | None = None,
        name: str = "tensorrt",
    ) -> None:
        self.plan = plan
        self.trust_engine = trust_engine
        self.backend = backend
        self.device = device
        self.cuda_graph = cuda_graph
        self.runtime_cache = runtime_cache
        self.name = name
        self._stack = contextlib.ExitStack()
        self._loaded: LoadedPlan | None = None

    def __enter__(self) -> TensorRtRunner:
        """Check the plan, load it and take the memory for its largest batch.

        Raises:
            InputError: plan or sidecar cannot be used.
            MissingDependency: something the plan needs is not here.
            ConversionError: TensorRT does not load it.
            UsageError: a run-time cache is asked of a back end that has none.
        """
        index = gpu_index(self.device) or 0
        sidecar = admit(self.plan, trust_engine=self.trust_engine, device=index)
        backend = backend_named(sidecar.backend if sidecar else self.backend)
        if self.runtime_cache is not None and backend.name != RTX:
            raise UsageError(
                f"{backend.title} has no run-time cache.", "Leave it out; plans are compiled."
            )
        cuda = require_cuda(index)
        with self._stack as stack:
            self._loaded = LoadedPlan(
                *(self.plan, backend, cuda, stack),
                cuda_graph=self.cuda_graph,
                # A version-compatible plan carries host code; only a verified sidecar says so.
                host_code=sidecar is not None and sidecar.options.version_compatible,
                runtime_cache=self.runtime_cache,
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Release everything, in the reverse order of its making."""
        loaded, self._loaded = self._loaded, None
        stack, self._stack = self._stack, contextlib.ExitStack()
        with stack:
            if loaded is not None and kind is None:
                loaded.save_runtime_cache()

    def run(self, images: Images) -> Logits:
        """Return the logits ``(N, K)`` of ``images (N, C, H, W)``: the engine's first output.

        Raises:
            InputError: the images have another shape or type than the engine's input, or no
                profile allows this batch.
        """
        return next(iter(self.run_all(images).values())).astype(np.float32)

    def run_all(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return every output by name, in the engine's types; the arrays are the caller's.

        Raises:
            InputError: as :meth:`run`.
            UsageError: the runner is not open.
        """
        return self._open().run(images)

    def resident(self, images: npt.NDArray[Any]) -> DeviceBatch:
        """Return a batch that stays on the GPU; see :class:`~.base.ResidentRunner`.

        Raises:
            InputError: as :meth:`run`.
            UsageError: the runner is not open.
            MissingDependency: the GPU is out of memory.
        """
        return self._open().batch(images)

    def _open(self) -> LoadedPlan:
        if self._loaded is None:
            raise UsageError("The engine is not open.", "Use the runner in a `with` block.")
        return self._loaded
