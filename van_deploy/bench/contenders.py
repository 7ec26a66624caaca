"""Who can be timed: every artifact of a bundle in every runtime here, and why not others."""

from __future__ import annotations

import fnmatch
import importlib.util
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from van_deploy.bench.contender import CUDA_GRAPH, Contender, Skipped
from van_deploy.bundle import Artefact, Bundle
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.environment.packages import execution_providers
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.runners.base import CudaOptions
from van_deploy.runners.onnxruntime import CUDA

__all__ = ["GIVES_BACK", "REFERENCE", "chosen", "contenders_of", "gpu_answers"]

REFERENCE = "pytorch"
"""Eager PyTorch, the network as it came: what ratios are given against on a CPU. Its process
keeps the memory it frees, as every other's. On a GPU they are against PyTorch's fastest mode."""

GIVES_BACK = "pytorch-default-malloc"
"""The same with the C library's own settings: what eager PyTorch costs on a CPU untuned."""

ON_CPU = {
    REFERENCE: ("eager", "fp32"),
    GIVES_BACK: ("eager", "fp32"),
    "pytorch-channels-last": ("channels-last", "fp32"),
    "pytorch-compile": ("compile", "fp32"),
    "pytorch-autocast": ("autocast", "bf16"),
}
ON_GPU = {
    REFERENCE: ("eager", "fp32"),
    "pytorch-channels-last-fp16": ("channels-last", "fp16"),
    "pytorch-compile-fp16": ("compile", "fp16"),
    "pytorch-compile-bf16": ("compile", "bf16"),
}
ORT_CUDA: Mapping[str, Mapping[str, Any]] = {
    "ort-cuda": {},
    "ort-cuda-nhwc": {"prefer_nhwc": True},
    "ort-cuda-graph": {"cuda_graph": True},
}
"""NCHW, NHWC, and NCHW as one CUDA graph: on an H200 NCHW was the faster layout for van_b0 in
FP32, TF32 and FP16 at batch 128 (docs/gpu-results.md)."""
NO_GPU = "no NVIDIA GPU answers here"

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
    on_gpu = device != "cpu"
    entries = list(_pytorch(bundle, device))
    for artefact in bundle.artefacts.values():
        plain = Contender(
            name=artefact.name,
            runtime="",
            precision=artefact.precision,
            file=str(bundle.verified(artefact.name)),
            embedded=artefact.embedded,
            sha256=artefact.sha256,
            device=device,
        )
        if artefact.kind in ("engine", "package"):
            entries += _compiled(artefact, plain, on_gpu)
        elif on_gpu:
            entries += _cuda(plain, cuda or CudaOptions())
        else:
            entries += _on_cpu(artefact, plain)
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
        found = [entry for entry in entries if _matches(entry.name, pattern)]
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


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.split("/")[0] == pattern or fnmatch.fnmatch(name, pattern)


def _pytorch(bundle: Bundle, device: str) -> Iterator[Entry]:
    for name, (mode, precision) in (ON_CPU if device == "cpu" else ON_GPU).items():
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


def _on_cpu(artefact: Artefact, plain: Contender) -> Iterator[Entry]:
    """Yield one ONNX artifact in each runtime for CPUs."""
    openvino = Skipped(
        f"openvino/{artefact.name}",
        "OpenVINO is not installed",
        "Install it with `pip install 'van-deploy[openvino]'`.",
    )
    if reason := _not_for_cpus(artefact):
        yield Skipped(f"ort-cpu/{artefact.name}", reason)
        yield replace(openvino, reason=reason, remedy="")
    else:
        ort = replace(plain, runtime="onnxruntime", mode="ort-cpu")
        yield replace(ort, name=f"ort-cpu/{artefact.name}")
        if importlib.util.find_spec("openvino") is None:
            yield openvino
        else:
            yield replace(plain, runtime="openvino", name=openvino.name)
            if cpu().has_bfloat16:  # what is not quantised runs in it
                name = f"openvino-bf16/{artefact.name}"
                yield replace(plain, runtime="openvino", name=name, precision="bf16")
    yield Skipped(f"ort-cuda/{artefact.name}", *_only_on_gpus())


def _cuda(plain: Contender, cuda: CudaOptions) -> Iterator[Entry]:
    """Yield one ONNX artifact on the CUDA provider, in the three ways worth comparing."""
    if CUDA not in execution_providers():
        yield Skipped(f"ort-cuda/{plain.name}", f"no {CUDA} in ONNX Runtime")
        return
    for name, changes in ORT_CUDA.items():
        yield replace(
            plain,
            name=f"{name}/{plain.name}",
            runtime="onnxruntime",
            mode="ort-cuda",
            options=asdict(replace(cuda, **changes)),
        )


def _not_for_cpus(artefact: Artefact) -> str:
    """Return why an ONNX artifact is not worth timing on a CPU, or "" if it is."""
    if artefact.precision == "fp16":
        return "FP16 is for GPUs: CPUs cast it to FP32 and back"
    if artefact.precision == "bf16":
        return "ONNX Runtime has no BF16 convolution for CPUs: the file is for GPUs"
    target = artefact.made_with.get("settings", {}).get("target", "cpu")
    if artefact.precision == "int8" and target != "cpu":
        return f"quantised for {target}; for a CPU use `van-deploy quantize --target cpu`"
    return ""


def _compiled(artefact: Artefact, plain: Contender, on_gpu: bool) -> Iterator[Entry]:
    """Yield an Inductor package, or an engine launched kernel by kernel and as one CUDA graph."""
    targets = artefact.engine.targets if artefact.engine else ()
    for_cpu = artefact.kind == "package" and not any(t.startswith("sm_") for t in targets)
    profiles = artefact.engine.profiles if artefact.engine else ()
    served = replace(
        plain,
        min_batch=min((p.min for p in profiles), default=1),
        max_batch=max((p.max for p in profiles), default=None),
    )
    ways = {"tensorrt": "", "tensorrt-graph": CUDA_GRAPH}
    if artefact.kind == "package":
        ways = {"inductor": ""}
    for name, mode in ways.items():
        label, runtime = f"{name}/{artefact.name}", name.partition("-")[0]
        if for_cpu and on_gpu:
            yield Skipped(label, "compiled for a CPU", "Time it with --device cpu.")
        elif on_gpu or for_cpu:
            yield replace(served, name=label, runtime=runtime, mode=mode)
        else:
            yield Skipped(label, *_only_on_gpus())


def _only_on_gpus() -> tuple[str, str]:
    return ("runs on a GPU", "Time it with --device cuda:0.") if gpu_answers() else (NO_GPU, "")
