"""Installed things that do not go together, and what ends each clash.

Pure functions of what is installed: nothing is imported or started.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from van_deploy.environment.hardware import Driver
from van_deploy.environment.packages import COMPONENTS, ONNXRUNTIMES, pip_command

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
        *_same_module(distributions, torch_cuda, driver),
        *_other_cuda(distributions, torch_cuda, driver, onnxruntime_cuda),
    )


def _same_module(
    distributions: Mapping[str, str], torch_cuda: str | None, driver: Driver | None
) -> Iterator[Clash]:
    """Yield each module that several packages hold, and an ONNX Runtime that ignores the GPU."""
    onnxruntime = "onnxruntime" if driver is None else "onnxruntime-gpu"
    families = {ONNXRUNTIMES: onnxruntime}
    for flavour in ("tensorrt", "tensorrt-rtx"):
        wanted = f"{flavour}-cu{_major(torch_cuda) or 13}"
        families[f"{flavour}-cu12", f"{flavour}-cu13"] = wanted
    for family, wanted in families.items():
        present = [name for name in family if name in distributions]
        change = f"`{pip_command()} uninstall --yes {' '.join(present)} && {pip_command()} install"
        if len(present) > 1:
            yield Clash(
                f"{' and '.join(present)} are both installed; they hold the same module and "
                "overwrite each other's files.",
                f"Keep one: {change} {wanted}`.",
            )
        elif present == ["onnxruntime"] and driver is not None and driver.gpus:
            yield Clash(
                "There is an NVIDIA GPU, but the installed onnxruntime is the one for CPUs.",
                f"For the GPU: {change} 'onnxruntime-gpu[cuda,cudnn]'`.",
            )


def _other_cuda(
    distributions: Mapping[str, str],
    torch_cuda: str | None,
    driver: Driver | None,
    onnxruntime_cuda: str | None,
) -> Iterator[Clash]:
    """Yield what was built for another CUDA than PyTorch, and a driver too old for PyTorch's."""
    if not torch_cuda:
        return
    major, pip = _major(torch_cuda), pip_command()
    others = {"onnxruntime-gpu": onnxruntime_cuda or ""}
    for flavour in ("tensorrt", "tensorrt-rtx"):
        present = [f"{flavour}-cu{n}" for n in (12, 13) if f"{flavour}-cu{n}" in distributions]
        others |= {name: name[-2:] for name in present if len(present) == 1}
    for name, cuda in others.items():
        if cuda and _major(cuda) != major:
            yield Clash(
                f"{name} was built for CUDA {cuda}, but PyTorch for CUDA {torch_cuda}: one process "
                "cannot load both.",
                "Install the onnxruntime-gpu that is built for PyTorch's CUDA: "
                "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"
                if name == "onnxruntime-gpu"
                else f"Take the other flavour: `{pip} uninstall --yes {name} && "
                f"{pip} install {name[:-2]}{major}`.",
            )
    if driver is not None and driver.cuda_version[0] < int(major):
        yield Clash(
            f"PyTorch was built for CUDA {torch_cuda}, but NVIDIA driver {driver.version} "
            "runs CUDA up to {}.{}.".format(*driver.cuda_version),
            f"Update the driver, or install a PyTorch built for CUDA {driver.cuda_version[0]}.",
        )


def _major(version: str | None) -> str:
    return (version or "").partition(".")[0]


def unmet_requirements(distributions: Mapping[str, str]) -> tuple[Clash, ...]:
    """Return the requirements that installed packages of ours state and do not get.

    Follows the components' own requirements (protobuf, numpy and the like) as
    ``pip check`` does; extras are left out. Any ONNX Runtime stands for ``onnxruntime``.
    """
    todo = [name for component in COMPONENTS for name in component.distributions]
    found: list[Clash] = []
    for name in todo:  # which grows
        stated = importlib.metadata.requires(name) if name in distributions else None
        for needed in map(Requirement, stated or ()):
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            package = canonicalize_name(needed.name)
            names = ONNXRUNTIMES if package == "onnxruntime" else (package,)
            version = next((distributions[n] for n in names if n in distributions), None)
            if package not in todo:
                todo.append(package)
            if version is None or not needed.specifier.contains(version, prereleases=True):
                here = f"{version} is installed" if version else "is not installed"
                wanted = f"{package}{needed.specifier}"
                found.append(
                    Clash(
                        f"{name} needs {wanted}, but {package} {here}.",
                        f"Try `{pip_command()} install '{wanted}'`.",
                    )
                )
    return tuple(found)
