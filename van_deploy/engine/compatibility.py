"""Whether a plan runs on a machine, found out before it is loaded.

TensorRT finds these things out itself, some with a message nobody understands and
some by running a plan it should not. The sidecar knows them without loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from van_deploy.config import HardwareCompatibility
from van_deploy.engine.backend import BACKENDS, RTX, Backend, backend_named, release_of
from van_deploy.engine.host import Host
from van_deploy.engine.sidecar import Sidecar
from van_deploy.errors import MissingDependency

__all__ = ["Obstacle", "built_for", "obstacles", "refuse", "require_compatible"]


@dataclass(frozen=True)
class Obstacle:
    """Why a plan does not run on a machine.

    Attributes:
        about: ``back end``, ``version``, ``gpu`` or ``driver``.
        problem: what does not fit, without a full stop.
        remedy: what to do, a sentence.
    """

    about: str
    problem: str
    remedy: str


def obstacles(sidecar: Sidecar, host: Host) -> tuple[Obstacle, ...]:
    """Return everything that keeps the plan from running on ``host``; none is good."""
    try:
        backend = backend_named(sidecar.backend)
    except MissingDependency as error:
        return (
            Obstacle("back end", error.message.rstrip("."), error.remedy),
            *_gpu(sidecar, host),
            *_driver(sidecar, host),
        )
    return (*_version(sidecar, backend), *_gpu(sidecar, host), *_driver(sidecar, host))


def require_compatible(sidecar: Sidecar, host: Host) -> None:
    """Return if the plan runs on ``host``.

    Raises:
        MissingDependency: it does not; every reason is named.
    """
    refuse(f"The engine '{sidecar.name}'", obstacles(sidecar, host))


def refuse(what: str, found: Sequence[Obstacle]) -> None:
    """Return if nothing was found that keeps something from running here.

    Raises:
        MissingDependency: something was; every reason is named.
    """
    if found:
        raise MissingDependency(
            f"{what} does not run here: " + "; ".join(one.problem for one in found) + ".",
            "\n".join(dict.fromkeys(one.remedy for one in found)),
        )


def built_for(sidecar: Sidecar) -> str:
    """Return what a plan was built for, as messages say it."""
    title = BACKENDS[sidecar.backend].title
    return f"built for {_served(sidecar)} with {title} {release_of(sidecar.backend_version)}"


def _served(sidecar: Sidecar) -> str:
    level = sidecar.options.hardware_compatibility
    if level is HardwareCompatibility.AMPERE_PLUS:
        return "sm_80 and newer"
    return " and ".join(sidecar.targets)


def _version(sidecar: Sidecar, backend: Backend) -> tuple[Obstacle, ...]:
    if backend.version == sidecar.backend_version:
        return ()
    here, there = release_of(backend.version), release_of(sidecar.backend_version)
    if sidecar.options.version_compatible and _numbers(here) >= _numbers(there):
        return ()
    if here == there:  # another build of one release
        here, there = backend.version, sidecar.backend_version
    direction = ""
    if sidecar.options.version_compatible:
        direction = " (a version-compatible plan runs on later versions, never on earlier ones)"
    return (
        Obstacle(
            "version",
            f"it was {built_for(sidecar)}; installed is {backend.title} {here}{direction}",
            f"Rebuild it here, or install {backend.title} {there}.",
        ),
    )


def _gpu(sidecar: Sidecar, host: Host) -> tuple[Obstacle, ...]:
    if host.gpu is None:
        return (
            Obstacle(
                "gpu",
                f"it was {built_for(sidecar)}; this machine has no NVIDIA GPU that answers",
                "Run it on a machine with that GPU; `van-deploy doctor` tells what is here.",
            ),
        )
    if host.target is None or _serves(sidecar, host.target):
        return ()
    rebuild = f"rebuild with `--target {host.target}`"
    if sidecar.backend != RTX:
        rebuild = "rebuild on this machine"
    return (
        Obstacle(
            "gpu",
            f"it was {built_for(sidecar)}; this machine has {host.target} ({host.gpu})",
            f"{rebuild[0].upper()}{rebuild[1:]}.",
        ),
    )


def _serves(sidecar: Sidecar, target: str) -> bool:
    if sidecar.options.hardware_compatibility is HardwareCompatibility.AMPERE_PLUS:
        return int(target.removeprefix("sm_")) >= 80
    return target in sidecar.targets


def _driver(sidecar: Sidecar, host: Host) -> tuple[Obstacle, ...]:
    if host.cuda is None or sidecar.cuda is None or host.cuda[0] >= sidecar.cuda:
        return ()
    return (
        Obstacle(
            "driver",
            f"it needs CUDA {sidecar.cuda}, and driver {host.driver} runs CUDA up to "
            f"{host.cuda[0]}.{host.cuda[1]}",
            "Update the NVIDIA driver.",
        ),
    )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
