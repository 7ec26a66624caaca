"""This machine as a whole: what is installed, what it offers, and what runs when it is tried.

A package's metadata says what was meant to work. ONNX Runtime lists providers whose libraries
do not load, PyTorch may be built without CUDA, and bindings import without a driver. So each is
tried, in a process of its own.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from van_deploy import __version__
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
    Clash,
    Installed,
    clashes_among,
    cuda_version_of,
    execution_providers,
    installed_components,
    installed_distributions,
    unmet_requirements,
)

WAIT_S = 120.0
_PROVIDER = """
import sys, onnxruntime
from van_deploy.runners.onnxruntime import provider_starts
sys.exit(not provider_starts(onnxruntime, "{}ExecutionProvider", quiet=False))
"""


class Trial(NamedTuple):
    """Something to try.

    Attributes:
        needs: the component or execution provider without which it is not worth it; "" for none.
        on_gpu: whether it needs a GPU, too.
        program: Python that ends with 0 where it works.
    """

    needs: str
    on_gpu: bool
    program: str


TRIALS: Mapping[str, Trial] = {
    "gpu": Trial(
        "",
        True,
        "from van_deploy.runners.cuda import require_cuda\n"
        "cuda = require_cuda()\ncuda.call('cudaFree', cuda.call('cudaMalloc', 1))",
    ),
    "torch": Trial("torch", True, "import torch\ntorch.ones(1, device='cuda').item()"),
    "ort-cpu": Trial("CPUExecutionProvider", False, _PROVIDER.format("CPU")),
    "ort-cuda": Trial("CUDAExecutionProvider", True, _PROVIDER.format("CUDA")),
    **{
        name: Trial(
            package,
            on_gpu,
            f"import {package.replace('-', '_')} as trt\ntrt.{made}(trt.Logger(trt.Logger.ERROR))",
        )
        for name, package, on_gpu, made in (
            ("tensorrt", "tensorrt", True, "Runtime"),
            ("tensorrt-rtx", "tensorrt-rtx", False, "Builder"),
            ("tensorrt-rtx-run", "tensorrt-rtx", True, "Runtime"),
        )
    },
}
"""They take a byte on the GPU, open a session of one operator, make a builder or a runtime."""


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
        trials: what was tried (names of :data:`TRIALS`), and why it failed; "" where it did not.
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
        """Return the component called ``name``."""
        return next(item for item in self.components if item.component.name == name)


def environment_here(folder: Path) -> Environment:
    """Return what is installed and what the machine offers.

    Args:
        folder: where results will be written; its free space is reported.
    """
    distributions = installed_distributions()
    torch_cuda, ort_cuda = cuda_version_of("torch"), cuda_version_of("onnxruntime")
    driver, providers = nvidia_driver(), execution_providers()
    components = installed_components(distributions)
    usable = {"", *providers, *(item.component.name for item in components if item.usable)}
    on_gpu = driver is not None and bool(driver.gpus)
    worth = [n for n, trial in TRIALS.items() if trial.needs in usable and on_gpu >= trial.on_gpu]
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
        trials=tried({name: TRIALS[name].program for name in worth}),
        clashes=(
            *clashes_among(distributions, torch_cuda, driver, ort_cuda),
            *unmet_requirements(distributions),
        ),
    )


def tried(programs: Mapping[str, str]) -> dict[str, str]:
    """Return, for each of some programs, why it failed; "" where it did not.

    They run at the same time; each gets :data:`WAIT_S` seconds.
    """
    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(_failure, programs.values()), strict=True))


def _failure(program: str) -> str:
    try:
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {WAIT_S:.0f} s"
    if ran.returncode == 0:
        return ""
    cause = re.search(r"with error: (.*)", ran.stderr)
    lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
    text = cause[1] if cause else lines[-1]
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", text).split())[:300].rstrip(".")
