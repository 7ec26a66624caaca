"""What a back end cannot do, said before it is tried.

TensorRT answers many of these requests with silence: a hardware compatibility
level on RTX is ignored, a timing cache does nothing. Here each is refused with its
reason. Every refusal of RTX was measured on RTX 1.7.1; ``tests/engine/test_refusals.py``
repeats the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import RTX_TARGETS, Backend
from van_deploy.engine.host import Host
from van_deploy.environment.hardware import memory
from van_deploy.errors import MissingDependency, UsageError, VanDeployError

__all__ = ["refuse_impossible"]


def refuse_impossible(
    backend: Backend, options: BuildOptions, host: Host, timing_cache: Path | None = None
) -> None:
    """Return if ``backend`` can do what ``options`` ask on ``host``.

    Raises:
        UsageError: it never can.
        MissingDependency: it could on another machine.
    """
    for refusal in _refusals(backend, options, host, timing_cache):
        raise refusal


def _refusals(
    backend: Backend, options: BuildOptions, host: Host, timing_cache: Path | None
) -> Iterator[VanDeployError]:
    if backend.builds_for_absent_gpus:
        yield from _rtx(backend, options, timing_cache)
    else:
        yield from _tensorrt(backend, options, host)
    yield from _workspace(options, host)


def _rtx(
    backend: Backend, options: BuildOptions, timing_cache: Path | None
) -> Iterator[VanDeployError]:
    served = ", ".join(RTX_TARGETS)
    if not options.targets:
        yield UsageError(
            f"{backend.title} builds for GPUs that are named, and none is.",
            f"Name one with --target; it serves {served}.",
        )
    for target in options.targets:
        if target not in RTX_TARGETS:
            yield UsageError(
                f"{backend.label} does not build for {target}; it serves {served}.",
                "Build with --backend tensorrt on a machine with that GPU.",
            )
    if options.hardware_compatibility is not HardwareCompatibility.NONE:
        yield UsageError(
            f"{backend.title} ignores a hardware compatibility level: its plans serve the "
            "targets they are built for.",
            "Leave --hardware-compatibility out and join targets with +, as in "
            "--target sm_86+sm_89.",
        )
    if options.version_compatible:
        yield UsageError(
            f"{backend.title} has no version-compatible plans: its package has no lean library, "
            "and its plans never cross its releases.",
            "Leave --version-compatible out and rebuild after an update.",
        )
    if timing_cache is not None:
        yield UsageError(
            f"{backend.title} accepts a timing cache and does nothing with it.",
            "Leave --timing-cache out; it builds without timing kernels.",
        )


def _tensorrt(backend: Backend, options: BuildOptions, host: Host) -> Iterator[VanDeployError]:
    if host.gpu is None:
        yield MissingDependency(
            f"{backend.title} builds on the GPU that will run the engine, and none answers here.",
            "Build there, or without a GPU with --backend tensorrt-rtx --target "
            f"({', '.join(RTX_TARGETS)}).",
        )
    elif host.target is not None and set(options.targets) - {host.target}:
        others = [t for t in options.targets if t != host.target]
        ways = "Build on that GPU"
        if not any(map(_older_than_ampere, (*others, host.target))):
            ways += ", leave --target out and give --hardware-compatibility ampere-plus"
        if set(options.targets) <= set(RTX_TARGETS):
            ways += ", or use --backend tensorrt-rtx"
        yield UsageError(
            f"{backend.title} builds for the GPU in this machine ({host.gpu}, {host.target}), "
            f"not for {', '.join(others)}.",
            f"{ways}.",
        )
    if host.cuda is not None and backend.cuda is not None and host.cuda[0] < backend.cuda:
        yield MissingDependency(
            f"{backend.label} was made for CUDA {backend.cuda}, and driver {host.driver} runs "
            f"CUDA up to {host.cuda[0]}.{host.cuda[1]}.",
            f"Update the driver, or install the package for CUDA {host.cuda[0]}.",
        )
    level = options.hardware_compatibility
    if level is HardwareCompatibility.AMPERE_PLUS and _older_than_ampere(host.target):
        yield UsageError(
            f"An ampere-plus plan cannot be built on {host.gpu} ({host.target}).",
            "Build on a GPU with sm_80 or newer, or leave --hardware-compatibility out.",
        )


def _workspace(options: BuildOptions, host: Host) -> Iterator[VanDeployError]:
    wanted = options.workspace_bytes
    if wanted is None:
        return
    there, whose = host.gpu_memory_bytes, f"{host.gpu} has"
    if there is None:
        there, whose = memory().total_bytes, "this machine has"
    if there is not None and wanted > there:
        yield UsageError(
            f"A workspace of {_gib(wanted)} is larger than the {_gib(there)} of memory {whose}.",
            "Give a smaller --workspace, or leave it out for the back end's own limit.",
        )


def _older_than_ampere(target: str | None) -> bool:
    return target is not None and int(target.removeprefix("sm_")) < 80


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
