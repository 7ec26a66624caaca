"""This machine as a whole: one record of everything the other modules find out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from van_deploy import __version__
from van_deploy.environment.clashes import Clash, clashes_among, unmet_requirements
from van_deploy.environment.hardware import (
    Cpu,
    Disk,
    Driver,
    Memory,
    cpu,
    disk,
    memory,
    nvidia_driver,
)
from van_deploy.environment.packages import (
    Installed,
    cuda_version_of,
    execution_providers,
    installed_components,
    installed_distributions,
)
from van_deploy.environment.trials import tried

__all__ = ["Environment", "environment_here"]


@dataclass(frozen=True)
class Environment:
    """Everything ``van-deploy doctor`` knows about this machine.

    Attributes:
        van_deploy: this program's version.
        python: the interpreter's version.
        system: operating system and architecture.
        components: every package this program works with, installed or not.
        providers: ONNX Runtime's execution providers, best first; empty without it.
        torch_cuda: the CUDA that PyTorch was built for, or None for a CPU build.
        cpu: the processor.
        memory: main memory.
        disk: free space in the folder that was asked about.
        driver: the NVIDIA driver and its GPUs, or None.
        onnxruntime_cuda: the CUDA that ONNX Runtime was built for, or None for a CPU build.
        trials: what was tried (see :mod:`van_deploy.environment.trials`), and why it failed; ""
            where it did not.
        clashes: what does not go together.
    """

    van_deploy: str
    python: str
    system: str
    components: tuple[Installed, ...]
    providers: tuple[str, ...]
    torch_cuda: str | None
    cpu: Cpu
    memory: Memory
    disk: Disk
    driver: Driver | None
    onnxruntime_cuda: str | None
    trials: Mapping[str, str]
    clashes: tuple[Clash, ...]

    def installed(self, name: str) -> Installed:
        """Return the component called ``name``.

        Raises:
            KeyError: this program works with no such component.
        """
        for item in self.components:
            if item.component.name == name:
                return item
        raise KeyError(name)


def environment_here(folder: Path) -> Environment:
    """Return what is installed and what the machine offers.

    Args:
        folder: where results will be written; its free space is reported.
    """
    distributions = installed_distributions()
    torch_cuda, ort_cuda = cuda_version_of("torch"), cuda_version_of("onnxruntime")
    driver = nvidia_driver()
    components = installed_components(distributions)
    providers = execution_providers()
    return Environment(
        van_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        components=components,
        providers=providers,
        torch_cuda=torch_cuda,
        cpu=cpu(),
        memory=memory(),
        disk=disk(folder),
        driver=driver,
        onnxruntime_cuda=ort_cuda,
        trials=tried(_worth_trying(components, providers, driver)),
        clashes=(
            *clashes_among(distributions, torch_cuda, driver, ort_cuda),
            *unmet_requirements(distributions),
        ),
    )


def _worth_trying(
    components: tuple[Installed, ...], providers: tuple[str, ...], driver: Driver | None
) -> list[str]:
    """Return what is installed and could run: without a GPU nothing that needs one."""
    usable = {item.component.name for item in components if item.usable}
    names = ["ort-cpu"] * bool(providers) + ["tensorrt-rtx"] * ("tensorrt-rtx" in usable)
    if driver is None or not driver.gpus:
        return names
    names += ["gpu", *(usable & {"torch", "tensorrt"})]
    names += ["ort-cuda"] * ("CUDAExecutionProvider" in providers)
    return names + ["tensorrt-rtx-run"] * ("tensorrt-rtx" in usable)
