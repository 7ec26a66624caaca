"""This machine as a whole: one record of everything the other modules find out."""

from __future__ import annotations

import platform
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
    execution_providers,
    installed_components,
    installed_distributions,
    torch_cuda_version,
)

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

    @property
    def has_gpu(self) -> bool:
        """Whether an NVIDIA driver answers and sees a GPU."""
        return self.driver is not None and bool(self.driver.gpus)


def environment_here(folder: Path) -> Environment:
    """Return what is installed and what the machine offers.

    Args:
        folder: where results will be written; its free space is reported.
    """
    distributions = installed_distributions()
    torch_cuda, driver = torch_cuda_version(), nvidia_driver()
    components = installed_components(distributions)
    return Environment(
        van_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        components=components,
        providers=execution_providers(),
        torch_cuda=torch_cuda,
        cpu=cpu(),
        memory=memory(),
        disk=disk(folder),
        driver=driver,
        clashes=(
            *clashes_among(distributions, torch_cuda, driver),
            *unmet_requirements(distributions),
        ),
    )
