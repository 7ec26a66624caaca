"""What a backend cannot build, and where a plan or a package does not run, said beforehand.

TensorRT finds these things out itself, some with a message nobody understands, some by running
a plan it should not, and many not at all: a hardware compatibility level on RTX is ignored.
Every refusal of RTX was measured on RTX 1.7.1; ``tests/engine/test_compatibility.py`` repeats
the measurement.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import (
    RTX,
    RTX_TARGETS,
    TITLES,
    Backend,
    Host,
    backend_named,
    release_of,
)
from van_deploy.engine.sidecar import PackageSidecar, Sidecar
from van_deploy.environment.hardware import cpu, memory
from van_deploy.environment.packages import pip_command, version_of
from van_deploy.errors import MissingDependency, UsageError

AMPERE_PLUS, NONE = HardwareCompatibility.AMPERE_PLUS, HardwareCompatibility.NONE


@dataclass(frozen=True)
class Obstacle:
    """Why a plan or a package does not run on a machine.

    Attributes:
        about: ``backend``, ``version``, ``gpu``, ``driver`` or ``processor``.
        problem: what does not fit, without a full stop.
        remedy: what to do, a sentence.
    """

    about: str
    problem: str
    remedy: str


def obstacles(sidecar: Sidecar | PackageSidecar, host: Host) -> tuple[Obstacle, ...]:
    """Return everything that keeps what a sidecar speaks of from running on ``host``."""
    if isinstance(sidecar, PackageSidecar):
        return tuple(_of_package(sidecar, host))
    return tuple(_of_plan(sidecar, host))


def require_compatible(sidecar: Sidecar | PackageSidecar, host: Host) -> None:
    """Return if what a sidecar speaks of runs on ``host``.

    Raises:
        MissingDependency: it does not; every reason is named.
    """
    what = "package" if isinstance(sidecar, PackageSidecar) else "engine"
    if found := obstacles(sidecar, host):
        problems = "; ".join(one.problem for one in found)
        raise MissingDependency(
            f"The {what} '{sidecar.name}' does not run here: {problems}.",
            "\n".join(dict.fromkeys(one.remedy for one in found)),
        )


def torch_version() -> str:
    """Return PyTorch's version without its local part, or "" where it is not installed."""
    return (version_of("torch") or "").partition("+")[0]


def _of_plan(sidecar: Sidecar, host: Host) -> Iterator[Obstacle]:
    plus = sidecar.options.hardware_compatibility is AMPERE_PLUS
    served = "sm_80 and newer" if plus else " and ".join(sidecar.targets)
    title, there = TITLES[sidecar.backend], sidecar.backend_version
    built = f"it was built for {served} with {title} {release_of(there)}"
    try:
        here, compatible = (
            backend_named(sidecar.backend).version,
            sidecar.options.version_compatible,
        )
    except MissingDependency as error:
        yield Obstacle("backend", error.message.rstrip("."), error.remedy)
    else:
        later = Version(here).release[:3] >= Version(there).release[:3]
        if here != there and not (compatible and later):
            if release_of(here) != release_of(there):  # not another build of one release
                here, there = release_of(here), release_of(there)
            note = " (a version-compatible plan runs on later versions, never on earlier ones)"
            yield Obstacle(
                "version",
                f"{built}; installed is {title} {here}{note * compatible}",
                f"Rebuild it here, or install {title} {there}.",
            )
    serves = not _older_than_ampere(host.target) if plus else host.target in sidecar.targets
    rtx = sidecar.backend == RTX
    rebuild = f"Rebuild with `--target {host.target}`." if rtx else "Rebuild on this machine."
    yield from _gpu(built, host, serves, rebuild)
    if host.cuda is not None and sidecar.cuda is not None and host.cuda[0] < sidecar.cuda:
        yield Obstacle(
            "driver",
            f"it needs CUDA {sidecar.cuda}, and driver {host.driver} runs CUDA up to "
            f"{host.cuda[0]}.{host.cuda[1]}",
            "Update the NVIDIA driver.",
        )


def _gpu(built: str, host: Host, serves: bool, rebuild: str) -> Iterator[Obstacle]:
    if host.gpu is None:
        yield Obstacle(
            "gpu",
            f"{built}; this machine has no NVIDIA GPU that answers",
            "Run it on a machine with that GPU; `van-deploy doctor` tells what is here.",
        )
    elif host.target is not None and not serves:
        here = f"{host.target} ({host.gpu})"
        yield Obstacle("gpu", f"{built}; this machine has {here}", rebuild)


def _of_package(sidecar: PackageSidecar, host: Host) -> Iterator[Obstacle]:
    here, served = torch_version(), ", ".join(sidecar.targets)
    rebuild = "Rebuild it on this machine."
    if here != sidecar.torch:
        yield Obstacle(
            "version",
            f"it was compiled with PyTorch {sidecar.torch}; installed is {here or 'none'}",
            f"Rebuild it here, or `{pip_command()} install torch=={sidecar.torch}`.",
        )
    if sidecar.device == "cuda":
        serves = host.target in sidecar.targets
        yield from _gpu(f"it was compiled for {served}", host, serves, rebuild)
        return
    processor = cpu()
    lacking = [f for f in sidecar.cpu_features if f not in processor.features]
    if platform.machine() not in sidecar.targets:
        lacking = [served]
    if lacking:
        yield Obstacle(
            "processor",
            f"it was compiled on {sidecar.built_on} and may use {', '.join(lacking)}, "
            f"which this processor ({processor.name}) does not have",
            rebuild,
        )


def refuse_impossible(
    backend: Backend, options: BuildOptions, host: Host, timing_cache: Path | None = None
) -> None:
    """Return if ``backend`` can do what ``options`` ask on ``host``.

    Raises:
        UsageError: it never can.
        MissingDependency: it could on another machine.
    """
    title, served = backend.title, ", ".join(RTX_TARGETS)
    others = [t for t in options.targets if host.target not in (None, t)]
    there, whose = host.gpu_memory_bytes, f"{host.gpu} has"
    if there is None:
        there, whose = memory().total_bytes, "this machine has"
    if (options.workspace_bytes or 0) > there:
        raise UsageError(
            f"A workspace of {options.workspace_bytes} bytes is larger than the {there} bytes of "
            f"memory that {whose}.",
            "Give a smaller --workspace, or leave it out for the backend's own limit.",
        )
    unserved = [target for target in options.targets if target not in RTX_TARGETS]
    if not backend.builds_for_absent_gpus:
        if host.gpu is None:
            raise MissingDependency(
                f"{title} builds on the GPU that will run the engine, and none answers here.",
                f"Build there, or without a GPU with --backend tensorrt-rtx --target ({served}).",
            )
        if others:
            ways = "Build on that GPU"
            if not any(map(_older_than_ampere, (*others, host.target))):
                ways += ", leave --target out and give --hardware-compatibility ampere-plus"
            ways += "" if unserved else ", or use --backend tensorrt-rtx"
            raise UsageError(
                f"{title} builds for the GPU in this machine ({host.gpu}, {host.target}), "
                f"not for {', '.join(others)}.",
                f"{ways}.",
            )
        return
    if not options.targets:
        raise UsageError(
            f"{title} builds for GPUs that are named, and none is.",
            f"Name one with --target; it serves {served}.",
        )
    if unserved:
        raise UsageError(
            f"{backend.label} does not build for {', '.join(unserved)}; it serves {served}.",
            "Build with --backend tensorrt on a machine with that GPU.",
        )
    asked = {
        "--hardware-compatibility": options.hardware_compatibility is not NONE,
        "--version-compatible": options.version_compatible,
        "--timing-cache": timing_cache is not None,
    }
    for option in (name for name, given in asked.items() if given):
        raise UsageError(
            f"{title} has no {option}: its plans serve the targets they are built for, in the "
            "release that built them, and it times no kernels.",
            f"Leave {option} out; join targets with +, as in --target sm_86+sm_89, and rebuild "
            "after an update.",
        )


def _older_than_ampere(target: str | None) -> bool:
    return target is not None and int(target.removeprefix("sm_")) < 80
