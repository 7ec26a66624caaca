"""Checks of what a backend cannot build, and on which machines a plan or a package does not run.

TensorRT's own checks are incomplete: some errors are hard to understand, some incompatible plans
run, and some options have no effect, such as a hardware compatibility level on RTX. The options
rejected for RTX were measured with RTX 1.7.1; ``tests/engine/test_compatibility.py`` repeats the
measurement.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import RTX, TITLES, Backend, Host, load_backend, release_of
from van_deploy.engine.sidecar import PackageSidecar, Sidecar
from van_deploy.environment.hardware import RTX_TARGETS, cpu
from van_deploy.environment.packages import installed_version, pip_command
from van_deploy.errors import MissingDependency, UsageError

AMPERE_PLUS, NONE = HardwareCompatibility.AMPERE_PLUS, HardwareCompatibility.NONE


@dataclass(frozen=True)
class Obstacle:
    """One reason why a plan or a package does not run on a machine.

    Attributes:
        about: ``backend``, ``version``, ``gpu``, ``driver`` or ``processor``.
        problem: description without a full stop.
        remedy: what the user can do, a sentence.
    """

    about: str
    problem: str
    remedy: str


def find_obstacles(sidecar: Sidecar | PackageSidecar, host: Host) -> tuple[Obstacle, ...]:
    """Return every reason why the plan or package of a sidecar does not run on ``host``."""
    if isinstance(sidecar, PackageSidecar):
        return tuple(_package_obstacles(sidecar, host))
    return tuple(_plan_obstacles(sidecar, host))


def require_compatible(sidecar: Sidecar | PackageSidecar, host: Host) -> None:
    """Check that the plan or package of a sidecar runs on ``host``.

    Raises:
        MissingDependency: it does not; the message lists every reason.
    """
    kind = "package" if isinstance(sidecar, PackageSidecar) else "engine"
    if obstacles := find_obstacles(sidecar, host):
        problems = "; ".join(obstacle.problem for obstacle in obstacles)
        raise MissingDependency(
            f"The {kind} '{sidecar.name}' does not run here: {problems}.",
            "\n".join(dict.fromkeys(obstacle.remedy for obstacle in obstacles)),
        )


def torch_version() -> str:
    """Return PyTorch's version without the local part, or "" if it is not installed."""
    return (installed_version("torch") or "").partition("+")[0]


def _plan_obstacles(sidecar: Sidecar, host: Host) -> Iterator[Obstacle]:
    plus = sidecar.options.hardware_compatibility is AMPERE_PLUS
    served = "sm_80 and newer" if plus else " and ".join(sidecar.targets)
    title, required = TITLES[sidecar.backend], sidecar.backend_version
    built = f"it was built for {served} with {title} {release_of(required)}"
    try:
        installed = load_backend(sidecar.backend).version
    except MissingDependency as error:
        yield Obstacle("backend", error.message.rstrip("."), error.remedy)
    else:
        compatible = sidecar.options.version_compatible
        later = Version(installed).release[:3] >= Version(required).release[:3]
        if installed != required and not (compatible and later):
            if release_of(installed) != release_of(required):  # else the fourth number matters
                installed, required = release_of(installed), release_of(required)
            note = " (a version-compatible plan runs on later versions, never on earlier ones)"
            yield Obstacle(
                "version",
                f"{built}; installed is {title} {installed}{note * compatible}",
                f"Rebuild it here, or install {title} {required}.",
            )
    supported = not _is_before_ampere(host.target) if plus else host.target in sidecar.targets
    rtx = sidecar.backend == RTX
    rebuild = f"Rebuild with `--target {host.target}`." if rtx else "Rebuild on this machine."
    yield from _gpu_obstacles(built, host, supported, rebuild)
    if host.cuda is not None and sidecar.cuda is not None and host.cuda[0] < sidecar.cuda:
        yield Obstacle(
            "driver",
            f"it needs CUDA {sidecar.cuda}, and driver {host.driver} supports CUDA up to "
            f"{host.cuda[0]}.{host.cuda[1]}",
            "Update the NVIDIA driver.",
        )


def _gpu_obstacles(built: str, host: Host, supported: bool, rebuild: str) -> Iterator[Obstacle]:
    if host.gpu is None:
        yield Obstacle(
            "gpu",
            f"{built}; no NVIDIA GPU was found on this machine",
            "Run it on a machine with that GPU; `van-deploy doctor` lists the GPUs of this one.",
        )
    elif host.target is not None and not supported:
        yield Obstacle("gpu", f"{built}; this machine has {host.target} ({host.gpu})", rebuild)


def _package_obstacles(sidecar: PackageSidecar, host: Host) -> Iterator[Obstacle]:
    installed, served = torch_version(), ", ".join(sidecar.targets)
    rebuild = "Rebuild it on this machine."
    if installed != sidecar.torch:
        yield Obstacle(
            "version",
            f"it was compiled with PyTorch {sidecar.torch}; installed is {installed or 'none'}",
            f"Rebuild it here, or `{pip_command()} install torch=={sidecar.torch}`.",
        )
    if sidecar.device == "cuda":
        supported = host.target in sidecar.targets
        yield from _gpu_obstacles(f"it was compiled for {served}", host, supported, rebuild)
        return
    processor = cpu()
    missing = [f for f in sidecar.cpu_features if f not in processor.features]
    if platform.machine() not in sidecar.targets:
        missing = [served]
    if missing:
        yield Obstacle(
            "processor",
            f"it was compiled on {sidecar.built_on} and may use {', '.join(missing)}, "
            f"which this processor ({processor.name}) does not support",
            rebuild,
        )


def require_supported(
    backend: Backend, options: BuildOptions, host: Host, timing_cache: Path | None = None
) -> None:
    """Check that ``backend`` supports ``options`` on ``host``.

    Raises:
        UsageError: the backend does not support them on any machine, or the workspace is too large.
        MissingDependency: the build needs another machine.
    """
    title, rtx_targets = backend.title, ", ".join(RTX_TARGETS)
    others = [t for t in options.targets if host.target not in (None, t)]
    unsupported = [target for target in options.targets if target not in RTX_TARGETS]
    if not backend.cross_compiles:
        if host.gpu is None:
            raise MissingDependency(
                f"{title} builds on the GPU that will run the engine, and no NVIDIA GPU was found.",
                "Build on a machine with that GPU, or use --backend tensorrt-rtx --target "
                f"({rtx_targets}), which needs no GPU.",
            )
        if others:
            remedy = "Build on that GPU"
            if not any(map(_is_before_ampere, (*others, host.target))):
                remedy += ", omit --target and give --hardware-compatibility ampere-plus"
            remedy += "" if unsupported else ", or use --backend tensorrt-rtx"
            raise UsageError(
                f"{title} builds for the GPU in this machine ({host.gpu}, {host.target}), "
                f"not for {', '.join(others)}.",
                f"{remedy}.",
            )
        if host.gpu_memory_bytes and (options.workspace_bytes or 0) > host.gpu_memory_bytes:
            raise UsageError(
                f"A workspace of {options.workspace_bytes} bytes is larger than the "
                f"{host.gpu_memory_bytes} bytes of memory that {host.gpu} has.",
                "Give a smaller --workspace, or omit it to use the backend's own limit.",
            )
        return
    if not options.targets:
        raise UsageError(
            f"{title} needs a target GPU, and none is given.",
            f"Give one with --target; supported: {rtx_targets}.",
        )
    if unsupported:
        raise UsageError(
            f"{backend.label} does not build for {', '.join(unsupported)}; supported: "
            f"{rtx_targets}.",
            "Build with --backend tensorrt on a machine with that GPU.",
        )
    requested = {
        "--hardware-compatibility": options.hardware_compatibility is not NONE,
        "--version-compatible": options.version_compatible,
        "--timing-cache": timing_cache is not None,
    }
    for option in (name for name, is_given in requested.items() if is_given):
        raise UsageError(
            f"{title} has no {option}: its plans run on the targets they are built for, in the "
            "release that built them, and it times no kernels.",
            f"Omit {option}; join targets with +, as in --target sm_86+sm_89, and rebuild "
            "after an update.",
        )


def _is_before_ampere(target: str | None) -> bool:
    return target is not None and int(target.removeprefix("sm_")) < 80
