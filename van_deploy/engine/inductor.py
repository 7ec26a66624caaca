"""Inductor packages (``.pt2``): the rewritten network, compiled ahead of time by PyTorch.

What TensorRT is not there for. ``torch.export`` records the network with a dynamic batch and
AOTInductor compiles it, for the GPU or the processor it is built on, into a file that PyTorch
of the same version loads without the network's Python code. It is native code: see
:mod:`van_deploy.engine.sidecar`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import Artefact, Bundle, Origin
from van_deploy.config import BatchRange, BuildSettings
from van_deploy.engine.bundled import ENGINES, enter_files
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.package import torch_version
from van_deploy.engine.sidecar import (
    PACKAGE_SCHEMA,
    PackageSidecar,
    sidecar_path,
    verified_package,
    write_sidecar,
)
from van_deploy.environment.hardware import cpu
from van_deploy.environment.packages import pip_command
from van_deploy.errors import (
    BundleError,
    ConversionError,
    InputError,
    MissingDependency,
    UsageError,
)
from van_deploy.files import content_key, file_sha256
from van_deploy.manifest import EngineFacts
from van_deploy.schema import validated

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "INDUCTOR",
    "PRECISIONS",
    "PackageRequest",
    "build_package",
    "cudnn_tf32",
    "package_request",
    "quietly",
    "refuse_for_packages",
]

INDUCTOR = "inductor"
PRECISIONS = ("fp32", "fp16", "bf16")
SOURCE = "fp32"
ONLY_TENSORRT = {
    *("targets", "hardware_compatibility", "version_compatible", "workspace_bytes"),
    *("optimization_level", "profiling", "timing_cache", "check_reproducible"),
}


@dataclass(frozen=True)
class PackageRequest:
    """One package to be built from a bundle.

    Attributes:
        bundle: the bundle's folder.
        precision: what it will compute in: one of :data:`PRECISIONS`.
        device: ``cpu``, or ``cuda:N`` for CUDA's device of that number.
        batch: the batch sizes it will serve.
        tf32: let FP32 convolutions compute in TF32.
        max_autotune: choose kernels by timing them, which takes minutes.
        fused_kernels: run on the kernels of :mod:`van_deploy.kernels`: on a GPU, in FP16 or
            BF16, for one batch size.
    """

    bundle: Path
    precision: str
    device: str
    batch: BatchRange
    tf32: bool = True
    max_autotune: bool = False
    fused_kernels: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it is for a GPU."""
        return self.device != "cpu"

    def name(self, model: str, target: str) -> str:
        """Return what the package is called, such as ``van_b1-fp16-sm90-inductor2.11.0``."""
        marks = "-tuned" * self.max_autotune + "-fused" * self.fused_kernels
        served = target.replace("sm_", "sm")
        return f"{model}-{self.precision}-{served}-{INDUCTOR}{torch_version()}{marks}"


def package_request(
    bundle: Bundle,
    precision: str,
    device: str | None,
    host: Host,
    batch: BatchRange | None = None,
    **options: Any,
) -> PackageRequest:
    """Return what building a package comes to.

    Args:
        bundle: with the FP32 graph that the network is read from.
        precision: what it will compute in.
        device: ``cpu``, ``cuda:N``, or None for the GPU here if there is one, else the CPU.
        host: this machine.
        batch: the batch sizes to serve; None takes the bundle's own.
        options: ``tf32``, ``max_autotune`` and ``fused_kernels``.

    Raises:
        InputError: nothing is compiled in that precision.
        MissingDependency: PyTorch or a compiler is missing; the GPU asked for is not here.
        UsageError: the fused kernels cannot run it.
    """
    if precision not in PRECISIONS:
        raise InputError(
            f"An Inductor package computes in {', '.join(PRECISIONS)}, not in '{precision}'.",
            "Give one of them with --precision; INT8 is for TensorRT and ONNX Runtime.",
        )
    device = device or ("cpu" if host.gpu is None else "cuda:0")
    if device != "cpu" and host.gpu is None:
        raise MissingDependency(
            f"A package for {device} is compiled on the GPU that will run it, and none answers "
            "here.",
            "Build there, or for this processor with --device cpu.",
        )
    if torch_version() == "":
        raise MissingDependency(
            "PyTorch is not installed, and Inductor is a part of it.",
            f"Install it with `{pip_command()} install torch`.",
        )
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise MissingDependency(
            f"Inductor compiles C++, and there is no '{compiler}' here.",
            "Install one (such as Debian's g++), or name it in the environment variable CXX.",
        )
    batch = batch or bundle.manifest.batch
    request = PackageRequest(bundle.path, precision, device, batch, **options)
    if request.fused_kernels and (
        not request.on_gpu or precision == "fp32" or batch.min != batch.max
    ):
        raise UsageError(
            f"The fused kernels run on a GPU, in fp16 or bf16, and for one batch size; {precision} "
            f"for {device} and batches {batch} is asked for.",
            "Give --precision fp16 --batch N:N:N on a GPU, or leave --fused-kernels out.",
        )
    return request


def refuse_for_packages(settings: BuildSettings) -> None:
    """Return if nothing is asked that only TensorRT has.

    Raises:
        UsageError: something is.
    """
    asked = sorted(settings.model_fields_set & ONLY_TENSORRT)
    if asked:
        option = f"--{asked[0].removesuffix('s').replace('_', '-')}"
        raise UsageError(
            f"{option} is TensorRT's, and an Inductor package is asked for.", f"Leave {option} out."
        )
    if len(settings.profiles) > 1:
        raise UsageError(
            "An Inductor package serves one range of batches, and several are given.",
            "Give one, such as --batch 1:8:32.",
        )


def build_package(
    request: PackageRequest, host: Host | None = None, *, force: bool = False
) -> tuple[PackageSidecar, bool]:
    """Return the package asked for, and whether the bundle held it already.

    Args:
        request: from :func:`package_request`.
        host: this machine; None looks.
        force: compile it even if it is there.

    Raises:
        BundleError: the bundle's FP32 graph is missing or was changed.
        ConversionError: the graph is not of a folded network, or PyTorch cannot compile it.
        MissingDependency: the GPU is out of memory.
    """
    host = host or host_here()
    bundle = Bundle.open(request.bundle)
    source, onnx = bundle.artefact(SOURCE), bundle.verified(SOURCE)
    processor = cpu()
    features = () if request.on_gpu else processor.features
    target = (host.target or "cuda") if request.on_gpu else platform.machine()
    name = request.name(bundle.name, target)
    ingredients = {
        "onnx": source.files,
        "torch": torch_version(),
        "target": target,
        "cpu_features": list(features),
        "precision": request.precision,
        "batch": str(request.batch),
        "tf32": request.tf32,
        "max_autotune": request.max_autotune,
        "fused_kernels": request.fused_kernels,
    }
    present = None if force else _present(bundle, name, content_key(ingredients))
    if present is not None:
        return present, True
    manifest = bundle.manifest
    if manifest.architecture.out_indices or manifest.sizes:
        what = "feature maps" if manifest.architecture.out_indices else "dynamic sizes"
        raise UsageError(
            "Inductor packages are of classifiers at one image size; "
            f"'{bundle.path}' is of {what}.",
            "Build an engine, with --backend tensorrt or tensorrt-rtx.",
        )
    shape = (manifest.architecture.in_chans, *manifest.preprocessing.sides)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="van-deploy-package-") as folder:
        file = Path(folder) / f"{name}.pt2"
        _compile(_network(onnx, bundle, request), request, shape, file)
        facts = {
            "schema": PACKAGE_SCHEMA,
            "name": name,
            "file_sha256": file_sha256(file),
            "file_bytes": file.stat().st_size,
            "onnx_file": source.file,
            "onnx_sha256": source.sha256,
            "torch": torch_version(),
            "device": "cuda" if request.on_gpu else "cpu",
            "targets": (target,),
            "cpu_features": features,
            "built_on": host.gpu if request.on_gpu else processor.name,
            "precision": request.precision,
            "tf32": request.tf32 and request.on_gpu,
            "max_autotune": request.max_autotune,
            "batch": request.batch,
            "input_shape": (-1, *shape),
            "build_seconds": round(time.perf_counter() - start, 3),
        }
        sidecar = write_sidecar(file, validated(PackageSidecar, facts))
        inside = f"{ENGINES}/{file.name}"
        artefact = Artefact(
            name=name,
            kind="package",
            precision=sidecar.precision,
            file=inside,
            files={inside: ""},
            made_from=Origin(name=SOURCE, sha256=source.sha256),
            made_with=ingredients,
            engine=EngineFacts(
                backend=f"{INDUCTOR} {sidecar.torch}",
                targets=sidecar.targets,
                profiles=(sidecar.batch,),
                parser_layers=0,
            ),
        )
        enter_files(request.bundle, artefact, (file, sidecar_path(file)))
    return sidecar, False


def _present(bundle: Bundle, name: str, key: str) -> PackageSidecar | None:
    artefact = bundle.artefacts.get(name)
    if artefact is None or artefact.key != key:
        return None
    try:
        return verified_package(bundle.verified(name))
    except (BundleError, InputError):
        return None


def _network(onnx: Path, bundle: Bundle, request: PackageRequest) -> nn.Module:
    """Return the folded network in its precision; the last norm and the head stay in FP32."""
    import torch
    from onnx import load
    from torch import nn

    from van_deploy.graph.rebuilt import van_from_onnx

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(self.dtype)

    network = van_from_onnx(load(onnx), bundle.manifest.architecture).model
    if request.precision == "fp32":
        return network
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[request.precision]
    if request.fused_kernels:
        from van_deploy.kernels.network import FusedVan

        return nn.Sequential(Cast(dtype), FusedVan(network, dtype))
    network = network.to(dtype)
    norm = network.get_submodule("norm4").float()
    network.add_module("norm4", nn.Sequential(Cast(torch.float32), norm))
    network.head.float()
    return nn.Sequential(Cast(dtype), network)


def _compile(
    network: nn.Module, request: PackageRequest, row: tuple[int, int, int], file: Path
) -> None:
    """Write the package of ``network``, whose input is ``(N, *row)`` float32."""
    import torch

    device = torch.device(request.device)
    batch = request.batch
    configs: dict[str, Any] = {"cpp.dynamic_threads": True}
    if request.on_gpu:
        # Without Inductor's templates for convolutions: see AUTOTUNE in runners/pytorch.py.
        configs = {"max_autotune": request.max_autotune, "max_autotune_conv_backends": "ATEN"}
        configs |= {"coordinate_descent_tuning": request.max_autotune}
    dynamic = {}
    if batch.min != batch.max:
        dynamic = {0: torch.export.Dim("batch", min=batch.min, max=batch.max)}
    rows = min(max(2, batch.opt), batch.max)
    try:
        with quietly(), torch.no_grad(), cudnn_tf32(request.tf32):
            network = network.to(device).eval()
            example = torch.zeros(rows, *row, device=device)
            program = torch.export.export(network, (example,), dynamic_shapes=(dynamic,))
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs=configs
            )
    except torch.OutOfMemoryError as error:
        raise MissingDependency(
            "The GPU is out of memory (compiling the package).",
            "Close what else uses the GPU, or give a smaller --batch.",
        ) from error
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConversionError(
            f"PyTorch {torch.__version__} cannot compile the network for {request.device}: "
            f"{said[0][:300]}",
            "Nothing was written. Try --precision fp32; if that does not help, please report it.",
        ) from error


@contextlib.contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """Let cuDNN's FP32 convolutions compute in TF32, or not, and put it back at the end."""
    import torch

    def allow(value: bool) -> None:
        with warnings.catch_warnings():  # PyTorch 2.9 names a newer setting
            warnings.simplefilter("ignore")
            torch.backends.cudnn.allow_tf32 = value

    before = torch.backends.cudnn.allow_tf32
    allow(allowed)
    try:
        yield
    finally:
        allow(before)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep PyTorch's warnings to itself, and show it CUDA's headers in NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) / "cu13" for p in (spec.submodule_search_locations or ())] if spec else []
    found = next((place for place in places if (place / "include" / "cuda.h").exists()), None)
    lacking = "CUDA_HOME" not in os.environ and shutil.which("nvcc") is None
    if lacking and found is not None and not Path("/usr/local/cuda").exists():
        os.environ["CUDA_HOME"] = str(found)
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
