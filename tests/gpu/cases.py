"""Every way a network can run, as one list: how it is opened, and the class it is judged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from van_deploy.bundle import Bundle
from van_deploy.config import BatchRange, BuildOptions, BuildSettings
from van_deploy.engine.backend import Backend, choose_backend, detect_host
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.inductor import build_package, package_settings
from van_deploy.environment.hardware import RTX_TARGETS
from van_deploy.errors import MissingDependency
from van_deploy.runners.base import CudaOptions

BATCHES, EIGHT = BatchRange(1, 4, 8), BatchRange(8, 8, 8)


@dataclass(frozen=True)
class Digits:
    """The embedded network, its images, and what it says of them.

    Attributes:
        bundle: with ``fp32``, ``fp16`` and ``int8`` graphs, batches 1 to 8.
        images: ``(8, C, S, S)`` float32, normalised.
        expected: its float64 logits ``(8, K)``; on the GPU where there is one.
        noise_db: SQNR of its own float32 logits on the CPU.
    """

    bundle: Bundle
    images: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float64]
    noise_db: float


@dataclass(frozen=True)
class Case:
    """One way to run the network.

    Attributes:
        name: of the test.
        numeric: the class of :mod:`van_deploy.checks.gates` it is judged in.
        open: returns a runner, to be opened with ``with``; the test is skipped where what runs
            it is not installed.
        gpu: whether it runs on a GPU.
        batches: to run; going back and forth between profiles and graphs.
    """

    name: str
    numeric: str
    open: Callable[[Bundle], Any]
    gpu: bool = True
    batches: tuple[int, ...] = (1, 3, 8, 3, 1)


def _torch(mode: str, precision: str = "fp32", device: str = "cuda:0") -> Callable[[Bundle], Any]:
    def opened(bundle: Bundle) -> Any:
        from van_deploy.runners.network import original_network
        from van_deploy.runners.pytorch import TorchRunner

        return TorchRunner(original_network(bundle).model, mode, device, precision)

    return opened


def need_cuda_provider() -> None:
    """Skip the test where ONNX Runtime has no CUDA."""
    from van_deploy.runners.onnxruntime import CUDA, require_onnxruntime

    ort = require_onnxruntime()
    if CUDA not in ort.get_available_providers():
        pytest.skip(f"ONNX Runtime {ort.__version__} has no {CUDA}")


def _ort(artifact: str, options: CudaOptions | None = None) -> Callable[[Bundle], Any]:
    def opened(bundle: Bundle) -> Any:
        from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

        if options is None:
            return OnnxRuntimeRunner(bundle.verified_path(artifact))
        need_cuda_provider()
        return OnnxRuntimeRunner(bundle.verified_path(artifact), name="ort-cuda", cuda=options)

    return opened


def _inductor(
    precision: str, device: str, batches: BatchRange = BATCHES, *, fused: bool = False
) -> Callable[[Bundle], Any]:
    def opened(bundle: Bundle) -> Any:
        from van_deploy.runners.pytorch import InductorRunner

        how: Any = {"backend": "inductor", "device": device, "fused_kernels": fused}
        settings = BuildSettings(precisions=(precision,), profiles=(batches,), **how)
        (asked,) = package_settings(bundle, settings, detect_host())
        package, _ = build_package(bundle.path, asked)
        return InductorRunner(bundle.path / "engines" / f"{package.name}.pt2")

    return opened


@lru_cache(None)
def plan_of(
    folder: Path,
    artifact: str,
    onnx: Path,
    tf32: bool = False,
    profiles: tuple[BatchRange, ...] = (BatchRange(1, 1, 1), BatchRange(2, 4, 8)),
) -> tuple[Path, Backend]:
    """Return a plan for the GPU here and what built it, or skip the test where nothing does."""
    host = detect_host()
    try:
        backend = choose_backend("auto", (), host.target)
    except MissingDependency as error:
        pytest.skip(error.message)
    named = backend.cross_compiles and host.target in RTX_TARGETS
    targets = (str(host.target),) if named else ()
    plan = folder / f"{artifact}{'-tf32' * tf32}.plan"
    options = BuildOptions(profiles=profiles, targets=targets, tf32=tf32)
    engine_from_onnx(onnx, plan, backend=backend, options=options, precision=artifact, host=host)
    return plan, backend


def _tensorrt(artifact: str, *, graph: bool, tf32: bool = False) -> Callable[[Bundle], Any]:
    def opened(bundle: Bundle) -> Any:
        from van_deploy.runners.tensorrt import TensorRtRunner

        folder = bundle.path.with_name("plans")
        folder.mkdir(exist_ok=True)
        plan, _ = plan_of(folder, artifact, bundle.verified_path(artifact), tf32)
        return TensorRtRunner(plan, cuda_graph=graph)

    return opened


# Not cuDNN's exhaustive search: it takes seconds for each batch size.
TF32 = CudaOptions(cudnn_conv_algo_search="HEURISTIC")
EXACT = replace(TF32, use_tf32=False)
NHWC = replace(TF32, prefer_nhwc=True)
CASES = (
    Case("torch-eager", "tf32", _torch("eager")),
    Case("torch-fp16", "fp16", _torch("channels-last", "fp16")),
    Case("torch-bf16", "bf16", _torch("channels-last", "bf16")),
    Case("ort-cuda", "fp32", _ort("fp32", EXACT)),
    Case("ort-cuda-tf32", "tf32", _ort("fp32", TF32)),
    Case("ort-cuda-graph", "fp32", _ort("fp32", replace(EXACT, cuda_graph=True))),
    Case("ort-cuda-fp16", "fp16", _ort("fp16", TF32)),
    Case("ort-cuda-fp16-nhwc", "fp16", _ort("fp16", NHWC)),
    Case("ort-cuda-fp16-graph", "fp16", _ort("fp16", replace(TF32, cuda_graph=True))),
    Case("ort-cuda-int8", "int8", _ort("int8", TF32)),
    Case("inductor-fp16", "fp16", _inductor("fp16", "cuda:0")),
    Case("fused-fp16", "fp16", _inductor("fp16", "cuda:0", EIGHT, fused=True), batches=(8,)),
    Case("tensorrt-fp32", "fp32", _tensorrt("fp32", graph=False)),
    Case("tensorrt-fp32-graph", "fp32", _tensorrt("fp32", graph=True)),
    Case("tensorrt-tf32", "tf32", _tensorrt("fp32", graph=False, tf32=True)),
    Case("tensorrt-fp16", "fp16", _tensorrt("fp16", graph=False)),
    Case("tensorrt-fp16-graph", "fp16", _tensorrt("fp16", graph=True)),
    Case("tensorrt-int8", "int8", _tensorrt("int8", graph=False)),
    Case("cpu-torch-eager", "fp32", _torch("eager", device="cpu"), gpu=False),
    Case("cpu-torch-bf16", "bf16", _torch("channels-last", "bf16", "cpu"), gpu=False),
    Case("cpu-torch-compile", "fp32", _torch("compile", device="cpu"), gpu=False, batches=(3,)),
    Case("cpu-ort", "fp32", _ort("fp32"), gpu=False),
    Case("cpu-ort-int8", "int8", _ort("int8"), gpu=False),
    Case("cpu-inductor-bf16", "bf16", _inductor("bf16", "cpu"), gpu=False),
)


def params(*starts: str, gpu_only: bool = False) -> list[Any]:
    """Return the cases, those for a GPU marked so.

    Args:
        starts: how their names begin; all without one.
        gpu_only: leave the CPU's out.
    """
    found = []
    for case in CASES:
        if (gpu_only and not case.gpu) or not case.name.startswith(starts or ("",)):
            continue
        marks = [pytest.mark.gpu] * case.gpu
        if not case.gpu and case.name.startswith(("cpu-inductor", "cpu-torch-compile")):
            marks.append(pytest.mark.slow)
        found.append(pytest.param(case, id=case.name, marks=marks))
    return found
