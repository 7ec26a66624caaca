"""Who can race: every artefact of a bundle in every run time that is here, and why not the rest."""

from __future__ import annotations

import fnmatch
import importlib.util
import platform
from collections.abc import Iterable, Sequence

from van_deploy.bench.contender import CUDA_GRAPH, Contender, Skipped
from van_deploy.bundle import Artefact, Bundle
from van_deploy.environment.hardware import Cpu, cpu, nvidia_driver
from van_deploy.environment.packages import execution_providers
from van_deploy.errors import BundleError, MissingDependency, UsageError
from van_deploy.runners.onnxruntime import PROVIDERS

__all__ = ["GIVES_BACK", "REFERENCE", "chosen", "contenders_of"]

REFERENCE = "pytorch"
"""Eager PyTorch, the network as it came: what ratios are given against. Its process keeps
the memory it frees, as every other's: what a server should be set to, and steady from one
process to the next."""

GIVES_BACK = "pytorch-default-malloc"
"""The same with the C library's own settings: what eager PyTorch costs on a CPU untuned."""

PYTORCH_MODES = {
    "pytorch": "eager",
    GIVES_BACK: "eager",
    "pytorch-channels-last": "channels-last",
    "pytorch-compile": "compile",
    "pytorch-autocast": "autocast",
}
ON_GPUS = ("ort-cuda", "ort-tensorrt")

Entry = Contender | Skipped


def contenders_of(bundle: Bundle) -> list[Entry]:
    """Return every contender of a bundle, its files' digests checked, and who cannot start.

    Raises:
        BundleError: there is no artefact, or a file is not the manifest's.
    """
    if not bundle.artefacts:
        raise BundleError(
            f"The bundle '{bundle.path}' has no artefact to time.",
            "Make one with `van-deploy export`.",
        )
    processor, gpu = cpu(), _has_gpu()
    entries: list[Entry] = list(_pytorch(bundle, processor, gpu))
    for artefact in bundle.artefacts.values():
        path = str(bundle.verified(artefact.name))
        if artefact.kind == "engine":
            entries += _engine(artefact, path, gpu)
        else:
            entries += _graph(artefact, path, processor, gpu)
    return entries


def chosen(entries: Sequence[Entry], patterns: Sequence[str]) -> list[Entry]:
    """Return the entries whose names match one of the patterns, in the entries' order.

    A pattern is a name, the start of one before a ``/``, or holds ``*``. No
    pattern chooses all. A runner asked for that cannot start is an error.

    Raises:
        UsageError: a pattern matches nothing.
        MissingDependency: all a pattern matches cannot start.
    """
    if not patterns:
        return list(entries)
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
    return [entry for entry in entries if entry.name in picked]


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.split("/")[0] == pattern or fnmatch.fnmatch(name, pattern)


def _pytorch(bundle: Bundle, processor: Cpu, gpu: bool) -> Iterable[Entry]:
    for name, mode in PYTORCH_MODES.items():
        half = "fp16" if gpu else "bf16"
        if name == GIVES_BACK and (gpu or platform.libc_ver()[0] != "glibc"):
            reason = "on a GPU" if gpu else "with this C library"
            yield Skipped(name, f"{reason} nothing differs from '{REFERENCE}'")
            continue
        if mode == "autocast" and not gpu and not processor.has_bfloat16:
            yield Skipped(name, "this processor has no bfloat16 instructions")
            continue
        yield Contender(
            name=name,
            runtime="pytorch",
            precision=half if mode == "autocast" else "fp32",
            bundle=str(bundle.path),
            mode=mode,
            sha256=bundle.manifest.weights.sha256,
            keeps_memory=name != GIVES_BACK,
        )


def _graph(artefact: Artefact, path: str, processor: Cpu, gpu: bool) -> Iterable[Entry]:
    """Yield one ONNX artefact in each run time."""
    embedded = artefact.embedded

    def contender(name: str, runtime: str, precision: str, mode: str = "") -> Contender:
        return Contender(
            name=f"{name}/{artefact.name}",
            runtime=runtime,
            precision=precision,
            file=path,
            mode=mode,
            embedded=embedded,
            sha256=artefact.sha256,
        )

    reason = _not_for_cpus(artefact)
    if reason:
        yield Skipped(f"ort-cpu/{artefact.name}", reason)
        yield Skipped(f"openvino/{artefact.name}", reason)
    else:
        yield contender("ort-cpu", "onnxruntime", artefact.precision, "ort-cpu")
        if importlib.util.find_spec("openvino") is None:
            remedy = "Install it with `pip install 'van-deploy[openvino]'`."
            yield Skipped(f"openvino/{artefact.name}", "OpenVINO is not installed", remedy)
        else:
            yield contender("openvino", "openvino", artefact.precision)
            if processor.has_bfloat16:  # what is not quantised runs in it
                yield contender("openvino-bf16", "openvino", "bf16")
    providers = execution_providers() if gpu else ()
    for name in ON_GPUS:
        provider = PROVIDERS[name][0]
        if provider in providers:
            yield contender(name, "onnxruntime", artefact.precision, name)
        else:
            missing = f"no {provider} in ONNX Runtime" if gpu else "no NVIDIA GPU answers here"
            yield Skipped(f"{name}/{artefact.name}", missing)


def _not_for_cpus(artefact: Artefact) -> str:
    """Return why an ONNX artefact is not worth timing on a CPU, or "" if it is."""
    if artefact.precision == "fp16":
        return "FP16 is for GPUs: CPUs cast it to FP32 and back"
    if artefact.precision == "bf16":
        return "ONNX Runtime has no BF16 convolution for CPUs: the file is for GPUs"
    target = artefact.made_with.get("settings", {}).get("target", "cpu")
    if artefact.precision == "int8" and target != "cpu":
        return f"quantised for {target}; for a CPU use `van-deploy quantize --target cpu`"
    return ""


def _engine(artefact: Artefact, path: str, gpu: bool) -> Iterable[Entry]:
    """Yield an engine launched kernel by kernel and as one CUDA graph."""
    smallest, largest = _served(artefact)
    for name, mode in (("tensorrt", ""), ("tensorrt-graph", CUDA_GRAPH)):
        if not gpu:
            yield Skipped(f"{name}/{artefact.name}", "no NVIDIA GPU answers here")
            continue
        yield Contender(
            name=f"{name}/{artefact.name}",
            runtime="tensorrt",
            precision=artefact.precision,
            file=path,
            mode=mode,
            sha256=artefact.sha256,
            min_batch=smallest,
            max_batch=largest,
        )


def _served(artefact: Artefact) -> tuple[int, int | None]:
    """Return the least and the largest batch of an engine's profiles, as far as they are known."""
    profiles = artefact.engine.profiles if artefact.engine else ()
    if not profiles:
        return 1, None
    return min(p.min for p in profiles), max(p.max for p in profiles)


def _has_gpu() -> bool:
    driver = nvidia_driver()
    return driver is not None and bool(driver.gpus)
