"""Who can be timed: every artifact of a bundle in every runtime here, and why not others."""

from __future__ import annotations

import fnmatch
import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from van_deploy.bench.contender import CUDA_GRAPH, Contender, Skipped
from van_deploy.bundle import Artefact, Bundle
from van_deploy.config.sizes import ImageSize, sides_of
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.environment.packages import execution_providers
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA

REFERENCE = "pytorch"
"""Eager PyTorch, the network as it came: what ratios are given against on a CPU. Its process
keeps the memory it frees, as every other's. On a GPU they are against PyTorch's fastest mode."""

GIVES_BACK = "pytorch-default-malloc"
"""The same with the C library's own settings: what eager PyTorch costs on a CPU untuned."""

PYTORCH = {
    REFERENCE: ("eager", "fp32"),
    GIVES_BACK: ("eager", "fp32"),
    "pytorch-channels-last": ("channels-last", "fp32"),
    "pytorch-compile": ("compile", "fp32"),
    "pytorch-autocast": ("autocast", "bf16"),
}
PYTORCH_ON_GPU = {
    REFERENCE: ("eager", "fp32"),
    "pytorch-channels-last-fp16": ("channels-last", "fp16"),
    "pytorch-compile-fp16": ("compile", "fp16"),
    "pytorch-compile-bf16": ("compile", "bf16"),
}
"""Mode and precision by name."""

ORT_CUDA: Mapping[str, Mapping[str, Any]] = {
    "ort-cuda": {},
    "ort-cuda-nhwc": {"prefer_nhwc": True},
    "ort-cuda-graph": {"cuda_graph": True},
}
"""NCHW, NHWC, and NCHW as one CUDA graph: on an H200 NCHW was the faster layout for van_b0 in
FP32, TF32 and FP16 at batch 128 (docs/gpu-results.md)."""

Changes = Mapping[str, Any]
ONNX_ON_CPU: Mapping[str, Changes] = {
    "ort-cpu": {"runtime": "onnxruntime", "mode": "ort-cpu"},
    "openvino": {"runtime": "openvino"},
    "openvino-bf16": {"runtime": "openvino", "precision": "bf16"},  # of what is not quantised
    "ort-cuda": {},
}
COMPILED: Mapping[str, Mapping[str, Changes]] = {
    "engine": {
        "tensorrt": {"runtime": "tensorrt"},
        "tensorrt-graph": {"runtime": "tensorrt", "mode": CUDA_GRAPH},
    },
    "package": {"inductor": {"runtime": "inductor"}},
}
"""How an artifact runs: what to call it, and what is special of the contender."""

FOR_GPUS = {
    "fp16": "FP16 is for GPUs: CPUs cast it to FP32 and back",
    "bf16": "ONNX Runtime has no BF16 convolution for CPUs: the file is for GPUs",
}

Entry = Contender | Skipped


def gpu_answers() -> bool:
    """Return whether a driver with a GPU answers."""
    driver = nvidia_driver()
    return driver is not None and bool(driver.gpus)


def contenders_of(
    bundle: Bundle, device: str = "cpu", cuda: CudaOptions | None = None
) -> list[Entry]:
    """Return every contender of a bundle on a device, and who cannot start.

    Args:
        bundle: the digests of its files are checked.
        device: ``cpu`` or ``cuda:N``.
        cuda: what the three variants of ONNX Runtime's CUDA provider have in common.

    Raises:
        BundleError: there is no artifact, or a file is not the manifest's.
    """
    if not bundle.artefacts:
        raise BundleError(
            f"The bundle '{bundle.path}' has no artefact to time.",
            "Make one with `van-deploy export`.",
        )
    entries = list(_pytorch(bundle, device))
    on_cuda = {
        way: {"mode": "ort-cuda", "options": {**asdict(cuda or CudaOptions()), **changes}}
        for way, changes in ORT_CUDA.items()
    }
    for artefact in bundle.artefacts.values():
        profiles = artefact.engine.profiles if artefact.engine else ()
        plain = Contender(
            name=artefact.name,
            runtime="onnxruntime",
            precision=artefact.precision,
            file=str(bundle.verified(artefact.name)),
            embedded=artefact.embedded,
            sha256=artefact.sha256,
            min_batch=min((p.min for p in profiles), default=1),
            max_batch=max((p.max for p in profiles), default=None),
            device=device,
        )
        ways = COMPILED.get(artefact.kind, ONNX_ON_CPU if device == "cpu" else on_cuda)
        for way, changes in ways.items():
            name, obstacle = f"{way}/{artefact.name}", _obstacle(way, artefact, device)
            if obstacle is None:
                entries.append(replace(plain, name=name, **changes))
            elif obstacle:
                entries.append(Skipped(name, *obstacle))
    return entries


def chosen(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """Return the entries whose names match one of the patterns, in the entries' order.

    A pattern is a name, the start of one before a ``/``, or holds ``*``. No
    pattern chooses all. A runner asked for that cannot start is an error.

    Raises:
        UsageError: a pattern matches nothing.
        MissingDependency: all a pattern matches cannot start.
    """
    picked: set[str] = set()
    for pattern in patterns:
        found = [
            entry
            for entry in entries
            if pattern == entry.name.split("/")[0] or fnmatch.fnmatch(entry.name, pattern)
        ]
        if not found:
            known = ", ".join(entry.name for entry in entries)
            raise UsageError(f"There is no runner '{pattern}' here.", f"Runners: {known}.")
        stuck = [entry for entry in found if isinstance(entry, Skipped)]
        if len(stuck) == len(found):
            raise MissingDependency(
                f"The runner '{stuck[0].name}' cannot start: {stuck[0].reason}.",
                stuck[0].remedy or "Leave it out of --runners.",
            )
        picked |= {entry.name for entry in found}
    return [entry for entry in entries if not patterns or entry.name in picked]


def _pytorch(bundle: Bundle, device: str) -> Iterator[Entry]:
    for name, (mode, precision) in (PYTORCH if device == "cpu" else PYTORCH_ON_GPU).items():
        if name == GIVES_BACK and platform.libc_ver()[0] != "glibc":
            yield Skipped(name, f"with this C library nothing differs from '{REFERENCE}'")
        elif mode == "autocast" and not cpu().has_bfloat16:
            yield Skipped(name, "this processor has no bfloat16 instructions")
        else:
            yield Contender(
                name=name,
                runtime="pytorch",
                precision=precision,
                bundle=str(bundle.path),
                mode=mode,
                sha256=bundle.manifest.weights.sha256,
                keeps_memory=name != GIVES_BACK,
                device=device,
            )


def _obstacle(way: str, artefact: Artefact, device: str) -> tuple[str, ...] | None:
    """Return why an artifact does not run in some way on a device, and a remedy if there is one.

    None if it does run; nothing where that goes without saying.
    """
    targets = artefact.engine.targets if artefact.engine else ()
    for_gpu = way.startswith(("ort-cuda", "tensorrt")) or any(t.startswith("sm_") for t in targets)
    if for_gpu and device == "cpu":
        if gpu_answers():
            return "runs on a GPU", "Time it with --device cuda:0."
        return ("no NVIDIA GPU answers here",)
    if device != "cpu" and not for_gpu:
        return "compiled for a CPU", "Time it with --device cpu."
    if device != "cpu":
        no_provider = way.startswith("ort-cuda") and CUDA not in execution_providers()
        return (f"no {CUDA} in ONNX Runtime",) if no_provider else None
    if artefact.kind in COMPILED:
        return None
    if artefact.precision in FOR_GPUS:
        return (FOR_GPUS[artefact.precision],)
    target = artefact.made_with.get("settings", {}).get("target", "cpu")
    if artefact.precision == "int8" and target != "cpu":
        return (f"quantised for {target}; for a CPU use `van-deploy quantize --target cpu`",)
    if way == "openvino-bf16" and not cpu().has_bfloat16:
        return ()
    if way.startswith("openvino") and importlib.util.find_spec("openvino") is None:
        install = "Install it with `pip install 'van-deploy[openvino]'`."
        return "OpenVINO is not installed", install
    return None


def resized(contender: Contender, size: ImageSize, folder: Path) -> Contender:
    """Return a contender whose ONNX file, in ``folder``, is declared for another image size.

    After the rewrites nothing in a VAN's graph depends on the size of its input but the input's
    own declaration. PyTorch takes any size, and an engine refuses what is outside its profile.
    """
    source = Path(contender.file)
    if source.suffix != ".onnx":
        return contender
    import onnx

    from van_deploy.graph.files import save_onnx

    target = folder / source.name
    if not target.exists():
        model = onnx.load_model(source)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        axes = (1, 2) if contender.embedded == "uint8" else (2, 3)
        for axis, side in zip(axes, sides_of(size), strict=True):
            dims[axis].dim_value = side
        for value in model.graph.output:  # a backbone's maps have other sides then
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]  # shapes inferred for the old size
        save_onnx(model, target)
    return replace(contender, file=str(target))
