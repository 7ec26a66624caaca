"""Opening a contender in the process that will time it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from van_deploy.bench.contender import CUDA_GRAPH, Contender
from van_deploy.bundle import Bundle
from van_deploy.errors import MissingDependency, UsageError

__all__ = ["OpenContender", "import_runtime", "open_contender"]

MODULES = {
    "pytorch": ("torch", "timm"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("van_deploy.runners.tensorrt",),
}


class OpenContender:
    """A runner with its input prepared, so that a timed call is the run alone.

    Args:
        runner: any run time's runner. Its ``run_all`` is used for graphs that do
            not take normalised floats.
        embedded: see :class:`Contender`.
    """

    def __init__(self, runner: Any, embedded: str = "none") -> None:
        self._runner = runner
        self._embedded = embedded

    def __enter__(self) -> OpenContender:
        """Open the runner."""
        self._runner.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the runner."""
        self._runner.__exit__(kind, error, trace)

    def prepared(self, batch: Any) -> Callable[[], object]:
        """Return a function that runs ``batch``."""
        run = self._runner.run if self._embedded == "none" else self._runner.run_all
        return lambda: run(batch)

    def take_device_ms(self) -> list[float]:
        """Return what the device itself measured since the last time, in ms; empty on a CPU."""
        times = list(getattr(self._runner, "device_ms", ()))
        if times:
            self._runner.device_ms.clear()
        return times


def import_runtime(contender: Contender) -> dict[str, str]:
    """Import a contender's run time; return the versions of what was imported.

    Raises:
        MissingDependency: it is not installed.
    """
    versions = {}
    for name in MODULES[contender.runtime]:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise MissingDependency(
                f"{name} is not installed: {error}.", "See `van-deploy doctor`."
            ) from error
        if hasattr(module, "__version__"):
            versions[name] = str(module.__version__).split("-")[0]
    return versions


def open_contender(contender: Contender, threads: int) -> OpenContender:
    """Return ``contender``, to be opened with ``with``, on ``threads`` threads.

    Raises:
        UsageError: there is no such run time.
    """
    openers = {
        "pytorch": _pytorch,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "tensorrt": _tensorrt,
    }
    if contender.runtime not in openers:
        raise UsageError(f"There is no run time '{contender.runtime}'.", f"Known: {[*openers]}.")
    return OpenContender(openers[contender.runtime](contender, threads), contender.embedded)


def _pytorch(contender: Contender, threads: int) -> Any:
    import torch

    from van_deploy.runners.original import original_network
    from van_deploy.runners.pytorch_modes import TorchModeRunner

    torch.set_num_threads(threads)
    network = original_network(Bundle.open(contender.bundle))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchModeRunner(network.model, contender.mode, device)


def _onnxruntime(contender: Contender, threads: int) -> Any:
    from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(
        Path(contender.file), threads=threads, name=contender.mode or "ort-cpu"
    )


def _openvino(contender: Contender, threads: int) -> Any:
    from van_deploy.runners.openvino import OpenVinoRunner

    precision = "bf16" if contender.precision == "bf16" else "f32"
    return OpenVinoRunner(Path(contender.file), threads=threads, precision=precision)


def _tensorrt(contender: Contender, threads: int) -> Any:
    module = importlib.import_module("van_deploy.runners.tensorrt")
    return module.TensorRtRunner(Path(contender.file), cuda_graph=contender.mode == CUDA_GRAPH)
