"""Whether an Inductor package runs on a machine, and what it is, without loading it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from van_deploy.engine.compatibility import Obstacle, refuse
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import PackageSidecar, verified_package
from van_deploy.environment.hardware import cpu
from van_deploy.environment.packages import installed_distributions, pip_command

__all__ = [
    "PackageDescription",
    "describe_package",
    "package_obstacles",
    "require_package",
    "torch_version",
]


def package_obstacles(sidecar: PackageSidecar, host: Host) -> tuple[Obstacle, ...]:
    """Return everything that keeps the package from running on ``host``; none is good."""
    found = []
    here = torch_version()
    if here != sidecar.torch:
        installed = f"installed is {here}" if here else "none is installed"
        found.append(
            Obstacle(
                "version",
                f"it was compiled with PyTorch {sidecar.torch}; {installed}",
                f"Rebuild it here, or `{pip_command()} install torch=={sidecar.torch}`.",
            )
        )
    served = ", ".join(sidecar.targets)
    if sidecar.device == "cuda" and host.gpu is None:
        found.append(
            Obstacle(
                "gpu",
                f"it was compiled for {served}; this machine has no NVIDIA GPU that answers",
                "Run it on a machine with that GPU, or build one for this processor with "
                "--device cpu.",
            )
        )
    elif sidecar.device == "cuda" and host.target not in (None, *sidecar.targets):
        found.append(
            Obstacle(
                "gpu",
                f"it was compiled for {served}; this machine has {host.target} ({host.gpu})",
                "Rebuild it on this machine.",
            )
        )
    elif sidecar.device == "cpu":
        lacking = [f for f in sidecar.cpu_features if f not in cpu().features]
        if platform.machine() not in sidecar.targets:
            lacking = [served]
        if lacking:
            found.append(
                Obstacle(
                    "processor",
                    f"it was compiled on {sidecar.built_on} and may use {', '.join(lacking)}, "
                    f"which this processor ({cpu().name}) does not have",
                    "Rebuild it on this machine.",
                )
            )
    return tuple(found)


@dataclass(frozen=True)
class PackageDescription:
    """A package, without loading it.

    Attributes:
        file: the package.
        sidecar: what was recorded when it was compiled.
        obstacles: why it does not run here; empty if it does.
        kind: says what this describes.
    """

    file: Path
    sidecar: PackageSidecar
    obstacles: tuple[Obstacle, ...]
    kind: Literal["package"] = "package"


def describe_package(path: Path) -> PackageDescription:
    """Return what is known about the package at ``path``, its digest checked.

    Raises:
        InputError: package or sidecar is missing, damaged, edited or swapped.
    """
    sidecar = verified_package(path)
    return PackageDescription(path, sidecar, package_obstacles(sidecar, host_here()))


def require_package(package: Path, host: Host | None = None) -> PackageSidecar:
    """Return the sidecar of a package that may be loaded here.

    Raises:
        InputError: package or sidecar is missing, damaged, edited or swapped.
        MissingDependency: PyTorch, GPU or processor are others than it was compiled for.
    """
    sidecar = verified_package(package)
    refuse(f"The package '{sidecar.name}'", package_obstacles(sidecar, host or host_here()))
    return sidecar


def torch_version() -> str:
    """Return PyTorch's version without its local part, or "" where it is not installed."""
    return installed_distributions().get("torch", "").partition("+")[0]
