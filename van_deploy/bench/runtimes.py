"""Opening a contender in the process that will time it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import CUDA_GRAPH, Contender
from van_deploy.errors import MissingDependency, UsageError

__all__ = ["import_runtime", "runner_of"]

MODULES = {
    "pytorch": ("torch", "timm"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "inductor": ("torch",),
}


def import_runtime(runtime: str) -> None:
    """Import a runtime's modules.

    Raises:
        MissingDependency: one is not installed.
    """
    for name in MODULES.get(runtime, ()):
        try:
            importlib.import_module(name)
        except ImportError as error:  # noqa: PERF203 - two names at most
            raise MissingDependency(
                f"{name} is not installed: {error}.", "See `van-deploy doctor`."
            ) from error


def runner_of(contender: Contender, threads: int) -> Any:
    """Return the runner of a contender, to be opened with ``with``.

    Raises:
        UsageError: there is no such runtime.
    """
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

        name, cuda = contender.mode or "ort-cpu", CudaOptions(**contender.options)
        return OnnxRuntimeRunner(file, threads=threads, name=name, device=device, cuda=cuda)
    if contender.runtime == "openvino":
        from van_deploy.runners.openvino import OpenVinoRunner

        precision = "bf16" if contender.precision == "bf16" else "f32"
        return OpenVinoRunner(file, threads=threads, precision=precision)
    if contender.runtime == "tensorrt":
        from van_deploy.runners.tensorrt import TensorRtRunner

        return TensorRtRunner(file, device=device, cuda_graph=contender.mode == CUDA_GRAPH)
    if contender.runtime == "inductor":
        from van_deploy.runners.inductor import InductorRunner

        on_gpu = device if device != "cpu" else "cuda:0"
        return InductorRunner(file, device=on_gpu, threads=threads)
    raise UsageError(f"There is no runtime '{contender.runtime}'.", f"Known: {[*MODULES]}.")
