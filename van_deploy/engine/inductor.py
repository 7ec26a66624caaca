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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import Bundle
from van_deploy.config import BuildSettings
from van_deploy.engine.backend import Host, host_here
from van_deploy.engine.bundled import enter, existing
from van_deploy.engine.compatibility import torch_version
from van_deploy.engine.sidecar import (
    PACKAGE_SCHEMA,
    PackageSidecar,
    verified_package,
    write_sidecar,
)
from van_deploy.environment.hardware import cpu
from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256
from van_deploy.schema import validate

if TYPE_CHECKING:
    from torch import nn

INDUCTOR = "inductor"
PRECISIONS = ("fp32", "fp16", "bf16")
SOURCE = "fp32"


def packages_asked(bundle: Bundle, settings: BuildSettings, host: Host) -> list[BuildSettings]:
    """Return the settings of each package asked for: of one precision, device and batch range.

    Args:
        bundle: with the FP32 graph that the network is read from.
        settings: what the user asks. Without a device it is the GPU here, or else the CPU.
        host: this machine.

    Raises:
        InputError: nothing is compiled in a precision.
        MissingDependency: PyTorch or a compiler is missing; the GPU asked for is not here.
        UsageError: something is asked that Inductor or the fused kernels cannot do.
    """
    device = settings.device or ("cpu" if host.gpu is None else "cuda:0")
    batch = (settings.profiles or (bundle.manifest.batch,))[0]
    for precision in set(settings.precisions) - set(PRECISIONS):
        raise InputError(
            f"An Inductor package computes in {', '.join(PRECISIONS)}, not in '{precision}'.",
            "Give one of them with --precision; INT8 is for TensorRT and ONNX Runtime.",
        )
    if device != "cpu" and host.gpu is None:
        raise MissingDependency(
            f"A package for {device} is compiled on the GPU that will run it, and none answers "
            "here.",
            "Build there, or for this processor with --device cpu.",
        )
    compiler, manifest = os.environ.get("CXX", "g++"), bundle.manifest
    needed = {"PyTorch": torch_version(), f"the C++ compiler '{compiler}'": shutil.which(compiler)}
    for name in (name for name, found in needed.items() if not found):
        raise MissingDependency(
            f"Inductor needs {name}, which is not here.",
            f"Install it: `{pip_command()} install torch`; a compiler such as Debian's g++, or "
            "name another in the environment variable CXX.",
        )
    if manifest.architecture.out_indices or manifest.sizes:
        raise UsageError(
            "Inductor packages are of classifiers at one image size; "
            f"'{bundle.path}' is of feature maps or dynamic sizes.",
            "Build an engine, with --backend tensorrt or tensorrt-rtx.",
        )
    fusable = device != "cpu" and "fp32" not in settings.precisions and batch.min == batch.max
    if settings.fused_kernels and not fusable:
        raise UsageError(
            "The fused kernels run on a GPU, in fp16 or bf16, and for one batch size; "
            f"{', '.join(settings.precisions)} for {device} and batches {batch} is asked for.",
            "Give --precision fp16 --batch N:N:N on a GPU, or leave --fused-kernels out.",
        )
    one = {"device": device, "profiles": (batch,)}
    return [settings.model_copy(update={**one, "precisions": (p,)}) for p in settings.precisions]


def build_package(
    path: Path, settings: BuildSettings, host: Host | None = None, *, force: bool = False
) -> tuple[PackageSidecar, bool]:
    """Return the package asked for, and whether the bundle held it already.

    Args:
        path: the bundle.
        settings: from :func:`packages_asked`.
        host: this machine; None looks.
        force: compile it even if it is there.

    Raises:
        BundleError: the bundle's FP32 graph is missing or was changed.
        ConversionError: the graph is not of a folded network, or PyTorch cannot compile it.
        MissingDependency: the GPU is out of memory.
    """
    host, processor = host or host_here(), cpu()
    bundle, on_gpu, (batch,) = Bundle.open(path), settings.device != "cpu", settings.profiles
    source, onnx, manifest = bundle.artifact(SOURCE), bundle.verified_path(SOURCE), bundle.manifest
    target = (host.target or "cuda") if on_gpu else platform.machine()
    decided = {
        "torch": torch_version(),
        "cpu_features": [] if on_gpu else list(processor.features),
        "precision": settings.precisions[0],
        "max_autotune": settings.max_autotune,
    }
    made_with = {
        **decided,
        "tf32": settings.tf32,
        "onnx": source.files,
        "target": target,
        "batch": str(batch),
        "fused_kernels": settings.fused_kernels,
    }
    if not force and (present := existing(bundle, made_with, verified_package)):
        return present, True
    name, start = _name(bundle, settings, target), time.perf_counter()
    row = (manifest.architecture.in_chans, *manifest.preprocessing.sides)
    with tempfile.TemporaryDirectory(prefix="van-deploy-package-") as folder:
        file = Path(folder) / f"{name}.pt2"
        _compile(_network(onnx, bundle, settings), settings, row, file)
        facts = {
            **decided,
            "schema": PACKAGE_SCHEMA,
            "name": name,
            "file_sha256": file_sha256(file),
            "file_bytes": file.stat().st_size,
            "onnx_file": source.file,
            "onnx_sha256": source.sha256,
            "device": "cuda" if on_gpu else "cpu",
            "targets": (target,),
            "built_on": host.gpu if on_gpu else processor.name,
            "tf32": settings.tf32 and on_gpu,
            "batch": batch,
            "input_shape": (-1, *row),
            "build_seconds": round(time.perf_counter() - start, 3),
        }
        sidecar = write_sidecar(file, validate(PackageSidecar, facts))
        enter(path, source, file, sidecar, made_with)
    return sidecar, False


def _name(bundle: Bundle, settings: BuildSettings, target: str) -> str:
    """Return what a package is called: network, precision, target, PyTorch, and how."""
    marks = "-tuned" * settings.max_autotune + "-fused" * settings.fused_kernels
    served = f"{target.replace('sm_', 'sm')}-{INDUCTOR}{torch_version()}"
    return f"{bundle.name}-{settings.precisions[0]}-{served}{marks}"


def _network(onnx: Path, bundle: Bundle, settings: BuildSettings) -> nn.Module:
    """Return the folded network in its precision; the last norm and the head stay in FP32."""
    import torch
    from onnx import load
    from torch import nn

    from van_deploy.graph.export import van_from_onnx

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(self.dtype)

    network = van_from_onnx(load(onnx), bundle.manifest.architecture).model
    if settings.precisions == ("fp32",):
        return network
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[settings.precisions[0]]
    if settings.fused_kernels:
        from van_deploy.kernels.network import FusedVan

        return nn.Sequential(Cast(dtype), FusedVan(network, dtype))
    network = network.to(dtype)
    norm = network.get_submodule("norm4").float()
    network.add_module("norm4", nn.Sequential(Cast(torch.float32), norm))
    network.head.float()
    return nn.Sequential(Cast(dtype), network)


def _compile(
    network: nn.Module, settings: BuildSettings, row: tuple[int, int, int], file: Path
) -> None:
    """Write the package of ``network``, whose input is ``(N, *row)`` float32."""
    import torch

    device, (batch,) = torch.device(str(settings.device)), settings.profiles
    configs: dict[str, Any] = {"cpp.dynamic_threads": True}
    if device.type == "cuda":
        # Without Inductor's templates for convolutions: see AUTOTUNE in runners/pytorch.py.
        configs = {"max_autotune": settings.max_autotune, "max_autotune_conv_backends": "ATEN"}
        configs |= {"coordinate_descent_tuning": settings.max_autotune}
    dynamic = {}
    if batch.min != batch.max:
        dynamic = {0: torch.export.Dim("batch", min=batch.min, max=batch.max)}
    rows = min(max(2, batch.opt), batch.max)
    try:
        with quietly(), torch.no_grad(), cudnn_tf32(settings.tf32):
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
            f"PyTorch {torch.__version__} cannot compile the network for {settings.device}: "
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
