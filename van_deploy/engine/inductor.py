"""Inductor packages (``.pt2``): the rewritten network, compiled ahead of time by PyTorch.

They replace engines on machines without TensorRT. ``torch.export`` traces the network with a
dynamic batch, and AOTInductor compiles it for this machine's GPU or CPU into a file that PyTorch
of the same version loads without the Python code of the network. A package is native code: see
:mod:`van_deploy.engine.sidecar`.
"""

import contextlib
import errno
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
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import BuildSettings
from van_deploy.engine.backend import Host, detect_host
from van_deploy.engine.compatibility import torch_version
from van_deploy.engine.fleet import (
    BUILT,
    REUSED,
    BuildOutcome,
    Cell,
    FleetHost,
    add_to_bundle,
    find_existing,
)
from van_deploy.engine.sidecar import PACKAGE_SCHEMA, PackageSidecar, write_sidecar
from van_deploy.environment.hardware import cpu
from van_deploy.environment.packages import pip_command
from van_deploy.errors import ConversionError, InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256
from van_deploy.provenance import code_digest
from van_deploy.schema import validate

INDUCTOR = "inductor"
PRECISIONS = ("fp32", "fp16", "bf16")
SOURCE = "fp32"


def package_settings(bundle: Bundle, settings: BuildSettings, host: Host) -> list[BuildSettings]:
    """Return the settings of each requested package: one precision, device and batch range.

    Args:
        bundle: has the FP32 graph from which the network is read.
        settings: the user's settings. The default device is this machine's GPU, or the CPU.
        host: this machine.

    Raises:
        InputError: a precision is not supported.
        MissingDependency: PyTorch, a C++ compiler or the requested GPU is missing.
        UsageError: Inductor or the fused kernels do not support the settings.
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
            f"A package for {device} is compiled on the GPU that will run it, and no NVIDIA GPU "
            "was found.",
            "Build on that machine, or for this CPU with --device cpu.",
        )
    compiler, manifest = os.environ.get("CXX", "g++"), bundle.manifest
    needed = {"PyTorch": torch_version(), f"the C++ compiler '{compiler}'": shutil.which(compiler)}
    for name in (name for name, available in needed.items() if not available):
        raise MissingDependency(
            f"Inductor needs {name}, which is not installed.",
            f"Install it: `{pip_command()} install torch`; a compiler such as Debian's g++, or "
            "name another in the environment variable CXX.",
        )
    if manifest.architecture.out_indices or manifest.sizes:
        raise UsageError(
            "Inductor packages support classifiers with one image size; "
            f"'{bundle.path}' has feature maps or dynamic sizes.",
            "Build an engine, with --backend tensorrt or tensorrt-rtx.",
        )
    if settings.max_autotune and device == "cpu":
        raise UsageError(
            "--max-autotune times the kernels of a GPU, and the package is for the CPU.",
            "Omit --max-autotune, or build on a GPU.",
        )
    fusable = device != "cpu" and "fp32" not in settings.precisions and batch.min == batch.max
    if settings.fused_kernels and not fusable:
        raise UsageError(
            "The fused kernels run on a GPU, in fp16 or bf16, and for one batch size; requested: "
            f"{', '.join(settings.precisions)} for {device} and batches {batch}.",
            "Give --precision fp16 --batch N:N:N on a GPU, or omit --fused-kernels.",
        )
    resolved = settings.model_copy(update={"device": device, "profiles": (batch,)})
    return [resolved.model_copy(update={"precisions": (p,)}) for p in settings.precisions]


def build_package(
    path: Path, settings: BuildSettings, host: Host | None = None, *, force: bool = False
) -> BuildOutcome:
    """Build a package in a bundle, or reuse the one that the bundle has.

    Args:
        path: folder of the bundle.
        settings: from :func:`package_settings`.
        host: this machine; None detects it.
        force: compile the package even if the bundle already has it.

    Raises:
        BundleError: the FP32 graph of the bundle is missing or was changed.
        ConversionError: the graph is not a folded VAN, or PyTorch cannot compile it.
        MissingDependency: the GPU is out of memory.
    """
    host, processor = host or detect_host(), cpu()
    bundle, on_gpu, (batch,) = Bundle.open(path), settings.device != "cpu", settings.profiles
    source, onnx, manifest = bundle.artifact(SOURCE), bundle.verified_path(SOURCE), bundle.manifest
    target = (host.target or "cuda") if on_gpu else platform.machine()
    cell = Cell(path, settings.precisions[0], (target,), settings.of(), FleetHost())
    options = {
        "torch": torch_version(),
        "cpu_features": [] if on_gpu else list(processor.features),
        "precision": settings.precisions[0],
        "max_autotune": settings.max_autotune,
    }
    inputs = {
        **options,
        "tf32": settings.tf32,
        "onnx": source.onnx_files,
        "target": target,
        "batch": str(batch),
        "fused_kernels": settings.fused_kernels,
        "code": code_digest("engine", "graph", "kernels", "model"),
    }
    if not force and (existing := find_existing(bundle, inputs, PackageSidecar.load)):
        return BuildOutcome(cell, REUSED, existing.name, package=existing)
    name, start = _package_name(bundle, settings, target), time.perf_counter()
    row = (manifest.architecture.in_chans, *manifest.preprocessing.sides)
    with tempfile.TemporaryDirectory(prefix="van-deploy-package-") as folder:
        file = Path(folder) / f"{name}.pt2"
        _compile(_load_network(onnx, bundle, settings), settings, row, file)
        facts = {
            **options,
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
        replaced = add_to_bundle(path, source, file, sidecar, inputs)
    return BuildOutcome(cell, BUILT, name, package=sidecar, replaced=replaced)


def _package_name(bundle: Bundle, settings: BuildSettings, target: str) -> str:
    """Return the name of a package: network, precision, target, PyTorch version, and options."""
    suffix = "-tuned" * settings.max_autotune + "-fused" * settings.fused_kernels
    served = f"{target.replace('sm_', 'sm')}-{INDUCTOR}{torch_version()}"
    return f"{bundle.name}-{settings.precisions[0]}-{served}{suffix}"


def _load_network(onnx: Path, bundle: Bundle, settings: BuildSettings) -> Any:
    """Return the folded ``nn.Module`` in its precision; last LayerNorm and head stay FP32."""
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


def _compile(network: Any, settings: BuildSettings, row: tuple[int, int, int], file: Path) -> None:
    """Compile ``network``, whose input is ``(N, *row)`` float32, and write the package."""
    import torch

    device, (batch,) = torch.device(str(settings.device)), settings.profiles
    configs: dict[str, Any] = {"cpp.dynamic_threads": True}
    if device.type == "cuda":
        # Inductor's convolution templates are disabled: see AUTOTUNE in runners/pytorch.py.
        configs = {"max_autotune": settings.max_autotune, "max_autotune_conv_backends": "ATEN"}
        configs |= {"coordinate_descent_tuning": settings.max_autotune}
    dynamic = {}
    if batch.min != batch.max:
        dynamic = {0: torch.export.Dim("batch", min=batch.min, max=batch.max)}
    rows = min(max(2, batch.opt), batch.max)
    try:
        with compile_environment(), torch.no_grad(), cudnn_tf32(settings.tf32):
            network = network.to(device).eval()
            example = torch.zeros(rows, *row, device=device)
            program = torch.export.export(network, (example,), dynamic_shapes=(dynamic,))
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs=configs
            )
    except torch.OutOfMemoryError as error:
        raise MissingDependency(
            "The GPU is out of memory (compiling the package).",
            "Close other programs that use the GPU, or give a smaller --batch.",
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if os.strerror(errno.ENOSPC) in str(error):
            raise MissingDependency(
                f"PyTorch cannot write the files of the package: {lines[0][:300]}",
                "Free some space, or set TMPDIR to a folder with room. Nothing was written.",
            ) from error
        raise ConversionError(
            f"PyTorch {torch.__version__} cannot compile the network for {settings.device}: "
            f"{lines[0][:300]}",
            "Nothing was written. Try --precision fp32; if that fails too, please report it.",
        ) from error


@contextlib.contextmanager
def cudnn_tf32(allowed: bool) -> Iterator[None]:
    """Enable or disable TF32 in cuDNN's FP32 convolutions, and restore the setting at the end."""
    import torch

    def allow(value: bool) -> None:
        with warnings.catch_warnings():  # PyTorch 2.9 warns about a newer setting
            warnings.simplefilter("ignore")
            torch.backends.cudnn.allow_tf32 = value

    before = torch.backends.cudnn.allow_tf32
    allow(allowed)
    try:
        yield
    finally:
        allow(before)


@contextlib.contextmanager
def compile_environment() -> Iterator[None]:
    """Suppress PyTorch's warnings, and set CUDA_HOME to the CUDA headers of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(p) / "cu13" for p in (spec.submodule_search_locations or ())] if spec else []
    headers = next((f for f in folders if (f / "include" / "cuda.h").exists()), None)
    has_toolkit = Path("/usr/local/cuda").exists() or shutil.which("nvcc") is not None
    if headers is not None and "CUDA_HOME" not in os.environ and not has_toolkit:
        os.environ["CUDA_HOME"] = str(headers)
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
