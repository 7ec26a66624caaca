"""Installed things that do not go together, and what ends each clash.

Pure functions of what is installed: nothing is imported or started.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from van_deploy.environment.hardware import Driver
from van_deploy.environment.packages import COMPONENTS, ONNXRUNTIMES, canonical_name, pip_command

__all__ = ["Clash", "clashes_among", "unmet_requirements"]


@dataclass(frozen=True)
class Clash:
    """Installed things that do not go together.

    Attributes:
        message: what they are and what comes of it.
        remedy: the command or step that ends it.
    """

    message: str
    remedy: str


def clashes_among(
    distributions: Mapping[str, str],
    torch_cuda: str | None,
    driver: Driver | None,
    onnxruntime_cuda: str | None = None,
) -> tuple[Clash, ...]:
    """Return what does not go together.

    Args:
        distributions: installed packages' canonical names and versions.
        torch_cuda: the CUDA PyTorch was built for, such as ``13.0``.
        driver: the NVIDIA driver, if there is one.
        onnxruntime_cuda: the CUDA ONNX Runtime was built for.
    """
    return (
        *_onnxruntime_clashes(distributions, driver),
        *_cuda_clashes(torch_cuda, onnxruntime_cuda),
        *_tensorrt_clashes(distributions, torch_cuda),
        *_driver_clashes(torch_cuda, driver),
    )


def unmet_requirements(distributions: Mapping[str, str]) -> tuple[Clash, ...]:
    """Return the requirements that installed packages of ours state and do not get.

    Follows the components' own requirements (protobuf, numpy and the like) as
    ``pip check`` does; extras are left out.
    """
    todo = [name for component in COMPONENTS for name in component.distributions]
    seen: set[str] = set()
    found: list[Clash] = []
    while todo:
        name = todo.pop(0)
        if name in seen or name not in distributions:
            continue
        seen.add(name)
        for needed, specifier in _requirements(name):
            todo.append(needed)
            version = _provided(needed, distributions)
            if version is None or not _allows(specifier, version):
                found.append(_unmet(name, needed, specifier, version))
    return tuple(found)


def _onnxruntime_clashes(
    distributions: Mapping[str, str], driver: Driver | None
) -> Iterator[Clash]:
    present = [name for name in ONNXRUNTIMES if name in distributions]
    if len(present) > 1:
        wanted = "onnxruntime-gpu" if driver is not None else "onnxruntime"
        pip = pip_command()
        yield Clash(
            f"{' and '.join(present)} are both installed; they hold the same module and "
            "overwrite each other's files.",
            f"Keep one: `{pip} uninstall --yes {' '.join(present)} && {pip} install {wanted}`.",
        )
    elif present == ["onnxruntime"] and driver is not None and driver.gpus:
        pip = pip_command()
        yield Clash(
            "There is an NVIDIA GPU, but the installed onnxruntime is the one for CPUs.",
            f"For the GPU: `{pip} uninstall --yes onnxruntime && "
            f"{pip} install 'onnxruntime-gpu[cuda,cudnn]'`.",
        )


def _cuda_clashes(torch_cuda: str | None, onnxruntime_cuda: str | None) -> Iterator[Clash]:
    if not torch_cuda or not onnxruntime_cuda:
        return
    if torch_cuda.partition(".")[0] != onnxruntime_cuda.partition(".")[0]:
        yield Clash(
            f"ONNX Runtime was built for CUDA {onnxruntime_cuda}, but PyTorch for CUDA "
            f"{torch_cuda}: one process cannot load both.",
            "Install the onnxruntime-gpu that is built for PyTorch's CUDA: "
            "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html",
        )


def _tensorrt_clashes(distributions: Mapping[str, str], torch_cuda: str | None) -> Iterator[Clash]:
    for flavour in ("tensorrt", "tensorrt-rtx"):
        present = [name for name in (f"{flavour}-cu12", f"{flavour}-cu13") if name in distributions]
        if len(present) > 1:
            yield Clash(
                f"{' and '.join(present)} are both installed; only one of them is loaded.",
                f"Keep one: `{pip_command()} uninstall {present[0]}`.",
            )
        elif present and torch_cuda and present[0][-2:] != torch_cuda.partition(".")[0]:
            major = torch_cuda.partition(".")[0]
            pip = pip_command()
            yield Clash(
                f"{present[0]} is for CUDA {present[0][-2:]}, but PyTorch was built for "
                f"CUDA {torch_cuda}: one process cannot use both.",
                f"Take the other flavour: `{pip} uninstall --yes {present[0]} && "
                f"{pip} install {flavour}-cu{major}`.",
            )


def _driver_clashes(torch_cuda: str | None, driver: Driver | None) -> Iterator[Clash]:
    if driver is None or torch_cuda is None:
        return
    needed = int(torch_cuda.partition(".")[0])
    if driver.cuda_version[0] < needed:
        newest = "{}.{}".format(*driver.cuda_version)
        yield Clash(
            f"PyTorch was built for CUDA {torch_cuda}, but NVIDIA driver {driver.version} "
            f"runs CUDA up to {newest}.",
            f"Update the driver, or install a PyTorch built for CUDA {driver.cuda_version[0]}.",
        )


def _requirements(distribution: str) -> Iterator[tuple[str, str]]:
    """Return canonical names and version specifiers a package needs on this machine."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(distribution) or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonical_name(requirement.name), str(requirement.specifier)


def _provided(name: str, distributions: Mapping[str, str]) -> str | None:
    """Return the version of a package, any ONNX Runtime standing for ``onnxruntime``."""
    names = ONNXRUNTIMES if name == "onnxruntime" else (name,)
    return next((distributions[n] for n in names if n in distributions), None)


def _allows(specifier: str, version: str) -> bool:
    """Return whether the version is one that the specifier admits."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _unmet(name: str, needed: str, specifier: str, version: str | None) -> Clash:
    """Return the clash of a package and what it needs."""
    here = f"{needed} {version} is installed" if version else f"{needed} is not installed"
    return Clash(
        f"{name} needs {needed}{specifier}, but {here}.",
        f"Try `{pip_command()} install '{needed}{specifier}'`.",
    )
