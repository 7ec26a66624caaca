"""All ways to run a network, with the numeric class of each."""

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

DYNAMIC, EIGHT = BatchRange(1, 4, 8), BatchRange(8, 8, 8)
TWO_PROFILES = (BatchRange(1, 1, 1), BatchRange(2, 4, 8))
Profiles = tuple[BatchRange, ...]


@dataclass(frozen=True)
class Digits:
    """The embedded network with images and logits.

    Attributes:
        bundle: with ``fp32``, ``fp16`` and ``int8`` graphs, batches 1 to 8.
        images: ``(8, C, S, S)`` float32, normalised.
        expected: float64 logits ``(8, K)``, computed on the GPU if there is one.
        noise_db: SQNR of the network's float32 logits on the CPU.
    """

    bundle: Bundle
    images: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float64]
    noise_db: float


@dataclass(frozen=True)
class Case:
    """One way to run the network.

    Attributes:
        name: test id.
        numeric: numeric class of :mod:`van_deploy.checks.gates`.
        create: returns a runner, which is a context manager; skips the test if its runtime is not
            installed.
        arguments: of ``create``, after the bundle.
        gpu: whether it runs on a GPU.
        batches: batch sizes to run, alternating between profiles and graphs.
    """

    name: str
    numeric: str
    create: Callable[..., Any]
    arguments: tuple[Any, ...]
    gpu: bool = True
    batches: tuple[int, ...] = (1, 3, 8, 3, 1)

    def open(self, bundle: Bundle) -> Any:
        """Return the runner of the network in ``bundle``."""
        return self.create(bundle, *self.arguments)


def torch_runner(bundle: Bundle, mode: str, precision: str, device: str = "cuda:0") -> Any:
    from van_deploy.runners.network import original_network
    from van_deploy.runners.pytorch import TorchRunner

    return TorchRunner(original_network(bundle).model, mode, device, precision)


def require_cuda_provider() -> None:
    """Skip the test if ONNX Runtime has no CUDA provider."""
    from van_deploy.runners.onnxruntime import CUDA, require_onnxruntime

    ort = require_onnxruntime()
    if CUDA not in ort.get_available_providers():
        pytest.skip(f"ONNX Runtime {ort.__version__} has no {CUDA}")


def ort_runner(bundle: Bundle, artifact: str, options: CudaOptions | None = None) -> Any:
    from van_deploy.runners.onnxruntime import OnnxRuntimeRunner

    if options is None:
        return OnnxRuntimeRunner(bundle.verified_path(artifact))
    require_cuda_provider()
    return OnnxRuntimeRunner(bundle.verified_path(artifact), name="ort-cuda", cuda=options)


def inductor_runner(
    bundle: Bundle, precision: str, device: str, batch: BatchRange = DYNAMIC, fused: bool = False
) -> Any:
    from van_deploy.runners.pytorch import InductorRunner

    options: Any = {"backend": "inductor", "device": device, "fused_kernels": fused}
    requested = BuildSettings(precisions=(precision,), profiles=(batch,), **options)
    (settings,) = package_settings(bundle, requested, detect_host())
    package = build_package(bundle.path, settings)
    return InductorRunner(bundle.path / "engines" / f"{package.engine}.pt2")


@lru_cache(None)
def build_plan(
    folder: Path, artifact: str, onnx: Path, tf32: bool = False, profiles: Profiles = TWO_PROFILES
) -> tuple[Path, Backend]:
    """Return a plan for this machine's GPU and its backend; skip the test without a backend."""
    host = detect_host()
    try:
        backend = choose_backend("auto", (), host.target)
    except MissingDependency as error:
        pytest.skip(error.message)
    has_target = backend.cross_compiles and host.target in RTX_TARGETS
    targets = (str(host.target),) if has_target else ()
    plan = folder / f"{artifact}{'-tf32' * tf32}.plan"
    options = BuildOptions(profiles=profiles, targets=targets, tf32=tf32)
    engine_from_onnx(onnx, plan, backend=backend, options=options, precision=artifact, host=host)
    return plan, backend


def tensorrt_runner(bundle: Bundle, artifact: str, graph: bool = False, tf32: bool = False) -> Any:
    from van_deploy.runners.tensorrt import TensorRtRunner

    folder = bundle.path.with_name("plans")
    folder.mkdir(exist_ok=True)
    plan, _ = build_plan(folder, artifact, bundle.verified_path(artifact), tf32)
    return TensorRtRunner(plan, cuda_graph=graph)


# Without cuDNN's exhaustive search, which takes seconds for each batch size.
TF32 = CudaOptions(cudnn_conv_algo_search="HEURISTIC")
NO_TF32 = replace(TF32, use_tf32=False)
NHWC = replace(TF32, prefer_nhwc=True)
CASES = (
    Case("torch-eager", "tf32", torch_runner, ("eager", "fp32")),
    Case("torch-fp16", "fp16", torch_runner, ("channels-last", "fp16")),
    Case("torch-bf16", "bf16", torch_runner, ("channels-last", "bf16")),
    Case("ort-cuda", "fp32", ort_runner, ("fp32", NO_TF32)),
    Case("ort-cuda-tf32", "tf32", ort_runner, ("fp32", TF32)),
    Case("ort-cuda-graph", "fp32", ort_runner, ("fp32", replace(NO_TF32, cuda_graph=True))),
    Case("ort-cuda-fp16", "fp16", ort_runner, ("fp16", TF32)),
    Case("ort-cuda-fp16-nhwc", "fp16", ort_runner, ("fp16", NHWC)),
    Case("ort-cuda-fp16-graph", "fp16", ort_runner, ("fp16", replace(TF32, cuda_graph=True))),
    Case("ort-cuda-int8", "int8", ort_runner, ("int8", TF32)),
    Case("inductor-fp16", "fp16", inductor_runner, ("fp16", "cuda:0")),
    Case("fused-fp16", "fp16", inductor_runner, ("fp16", "cuda:0", EIGHT, True), batches=(8,)),
    Case("tensorrt-fp32", "fp32", tensorrt_runner, ("fp32",)),
    Case("tensorrt-fp32-graph", "fp32", tensorrt_runner, ("fp32", True)),
    Case("tensorrt-tf32", "tf32", tensorrt_runner, ("fp32", False, True)),
    Case("tensorrt-fp16", "fp16", tensorrt_runner, ("fp16",)),
    Case("tensorrt-fp16-graph", "fp16", tensorrt_runner, ("fp16", True)),
    Case("tensorrt-int8", "int8", tensorrt_runner, ("int8",)),
    Case("cpu-torch-eager", "fp32", torch_runner, ("eager", "fp32", "cpu"), False),
    Case("cpu-torch-bf16", "bf16", torch_runner, ("channels-last", "bf16", "cpu"), False),
    Case("cpu-torch-compile", "fp32", torch_runner, ("compile", "fp32", "cpu"), False, (3,)),
    Case("cpu-ort", "fp32", ort_runner, ("fp32",), False),
    Case("cpu-ort-int8", "int8", ort_runner, ("int8",), False),
    Case("cpu-inductor", "fp32", inductor_runner, ("fp32", "cpu"), False),
    Case("cpu-inductor-bf16", "bf16", inductor_runner, ("bf16", "cpu"), False),
)


def params(*prefixes: str, gpu_only: bool = False) -> list[Any]:
    """Return the cases as pytest parameters, with marks.

    Args:
        prefixes: of the names; by default all.
        gpu_only: omit the cases of the CPU.
    """
    parameters = []
    for case in CASES:
        if (gpu_only and not case.gpu) or not case.name.startswith(prefixes or ("",)):
            continue
        marks = [pytest.mark.gpu] * case.gpu
        if case.name.startswith(("cpu-inductor", "cpu-torch-compile")):
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(case, id=case.name, marks=marks))
    return parameters
