"""This machine as a whole: what is installed, what runs when it is tried, what it is up to.

A package's metadata says what was meant to work. ONNX Runtime lists providers whose libraries
do not load, PyTorch may be built without CUDA, and bindings import without a driver. So each is
tried, in a process of its own.
"""

from __future__ import annotations

import enum
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from van_deploy import __version__
from van_deploy.environment import hardware, packages
from van_deploy.environment.packages import pip_command, version_of
from van_deploy.errors import MissingDependency

CUDA = "CUDAExecutionProvider"
CUDA_PAGE = "https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html"
WAIT_S = 120.0

_MEMORY = """
from van_deploy.runners.cuda import require_cuda
cuda = require_cuda()
cuda.call("cudaFree", cuda.call("cudaMalloc", 1))
"""
_SESSION = f"""
import sys, onnxruntime
from van_deploy.runners.onnxruntime import provider_starts
sys.exit(not provider_starts(onnxruntime, "{CUDA}", quiet=False))
"""
_TORCH = "import torch; torch.ones(1, device='cuda').item()"
_TENSORRT = "import {} as trt; trt.{}(trt.Logger(trt.Logger.ERROR))"
TRIALS: Mapping[str, tuple[str, str, str]] = {
    "gpu": ("taking memory on the GPU", "", _MEMORY),
    "torch-gpu": ("PyTorch on the GPU", "torch", _TORCH),
    "cuda-ep": (CUDA, CUDA, _SESSION),
    "tensorrt": ("a runtime", "tensorrt", _TENSORRT.format("tensorrt", "Runtime")),
    "tensorrt-rtx": ("a builder", "tensorrt-rtx", _TENSORRT.format("tensorrt_rtx", "Builder")),
}
"""By what they are needed for: what is tried, the component or provider without which it is not
worth it, and a program that ends with 0 where it works. All but the last are tried on a GPU."""

TASKS: Mapping[str, str] = {
    "export ONNX files": "torch timm onnx onnxscript onnxsim",
    "check them against PyTorch": "torch timm onnx onnxscript onnxsim onnxruntime",
    "run them on the CPU with ONNX Runtime": "onnxruntime",
    "run them on the CPU with OpenVINO": "openvino",
    "run them on a GPU with ONNX Runtime": "onnxruntime gpu cuda-ep",
    "run PyTorch on a GPU": "torch gpu torch-gpu",
    "compile packages with Inductor": "torch c++",
    "build engines with TensorRT": "tensorrt gpu",
    "run engines of TensorRT": "tensorrt gpu",
    "build engines with TensorRT for RTX": "tensorrt-rtx",
    "run engines of TensorRT for RTX": "tensorrt-rtx rtx-gpu",
    "spread work over machines with Ray": "ray",
    "sign bundles and check signatures": "cryptography",
}
"""What somebody may want to do, and what it needs; see :meth:`Environment.lacks`."""

FAMILIES = {
    "onnxruntime": ("", "-gpu", "-openvino", "-directml"),
    "tensorrt": ("-cu12", "-cu13"),
    "tensorrt-rtx": ("-cu12", "-cu13"),
}
"""Packages that hold one and the same module: only one of each may be installed."""


class Need(str, enum.Enum):
    """What a script can require of a machine before it starts."""

    ONNXRUNTIME = "onnxruntime"
    CUDA_PROVIDER = "cuda-ep"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"
    RAY = "ray"
    GPU = "gpu"


@dataclass(frozen=True)
class Shortfall:
    """What is missing here, or does not go together.

    Attributes:
        problem: a sentence, without a full stop.
        remedy: what to do about it, a sentence.
    """

    problem: str
    remedy: str


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
        onnxruntime_cuda: the CUDA that ONNX Runtime was built for, or None for a CPU build.
        cpu: the processor.
        memory: main memory.
        driver: the NVIDIA driver and its GPUs, or None.
        trials: what was tried (names of :data:`TRIALS`), and why it failed; "" where it did not.
        clashes: what does not go together.
    """

    van_deploy: str
    python: str
    system: str
    components: tuple[packages.Component, ...]
    providers: tuple[str, ...]
    torch_cuda: str | None
    onnxruntime_cuda: str | None
    cpu: hardware.Cpu
    memory: hardware.Memory
    driver: hardware.Driver | None
    trials: Mapping[str, str]
    clashes: tuple[Shortfall, ...]

    JSON_PROPERTIES: ClassVar = ("abilities",)

    @property
    def abilities(self) -> dict[str, Shortfall | None]:
        """What could be wanted of the machine, and why it is not up to that; None if it is."""
        return {
            task: next(filter(None, map(self.lacks, needs.split())), None)
            for task, needs in TASKS.items()
        }

    def lacks(self, need: str) -> Shortfall | None:
        """Return why something is not here, or failed when tried; :data:`TASKS` shows the needs."""
        pip, listed = pip_command(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
        hidden, gpus = (self.driver.hidden, self.driver.gpus) if self.driver else (0, ())
        item = next((one for one in self.components if one.name == need), None)
        compiler, served = os.environ.get("CXX", "g++"), {None, *hardware.RTX_TARGETS}
        needs_gpu, problem = need in ("gpu", "cuda-ep", "rtx-gpu"), ""
        if need == "c++" and not shutil.which(compiler):
            problem = f"there is no C++ compiler '{compiler}'"
            remedy = "Install g++, or name one in CXX."
        elif need == "cuda-ep" and CUDA not in self.providers:
            problem = f"ONNX Runtime has no {CUDA}"
            wanted = f"{pip} install 'onnxruntime-gpu[cuda,cudnn]'"
            remedy = f"Install it: `{pip} uninstall --yes onnxruntime && {wanted}`."
        elif needs_gpu and self.driver is None:
            problem = "no NVIDIA driver answers"
            remedy = "Run this on a machine with an NVIDIA GPU and its driver."
        elif needs_gpu and not gpus and hidden:
            problem = f"CUDA_VISIBLE_DEVICES ('{listed}') hides every GPU ({hidden})"
            remedy = "Name one in it, such as CUDA_VISIBLE_DEVICES=0, or unset it."
        elif needs_gpu and not gpus:
            problem = "the NVIDIA driver sees no GPU"
            remedy = "Check `nvidia-smi` and the container's GPU access."
        elif need == "rtx-gpu" and served.isdisjoint(gpu.target for gpu in gpus):
            names = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in gpus)
            problem, remedy = f"TensorRT for RTX does not serve {names}", "Use TensorRT here."
        elif item and item.version is None:
            problem = f"{need} is not installed"
            remedy = f"Install it with `{pip} install {item.install}`."
        elif item and item.fault:
            problem = f"{need} is installed but does not load ({item.fault})"
            remedy = f"Try `{pip} install --force-reinstall {item.distribution}`."
        elif reason := self.trials.get(need) or (needs_gpu and self.trials.get("gpu")):
            trial = TRIALS[need if self.trials.get(need) else "gpu"][0]
            problem, remedy = (
                f"{trial}, tried here, failed: {reason}",
                "Mend that, or see what clashes.",
            )
        return Shortfall(problem, remedy) if problem else None


def environment_here() -> Environment:
    """Return what is installed, what the machine offers, and what works when it is tried."""
    driver, components = hardware.nvidia_driver(), packages.components_here()
    providers = packages.execution_providers()
    cudas = packages.cuda_version_of("torch"), packages.cuda_version_of("onnxruntime")
    usable = {"", *providers, *(c.name for c in components if c.version and not c.fault)}
    has_gpu = driver is not None and bool(driver.gpus)
    programs = {
        name: program
        for name, (_, needs, program) in TRIALS.items()
        if needs in usable and (has_gpu or name == "tensorrt-rtx")
    }
    return Environment(
        van_deploy=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        components=components,
        providers=providers,
        torch_cuda=cudas[0],
        onnxruntime_cuda=cudas[1],
        cpu=hardware.cpu(),
        memory=hardware.memory(),
        driver=driver,
        trials=tried(programs),
        clashes=clashes_among(driver, *cudas),
    )


def missing(environment: Environment, needs: Iterable[Need]) -> MissingDependency | None:
    """Return the error that lists what is needed and not here or not usable; None if all is."""
    lacking = dict.fromkeys(filter(None, (environment.lacks(need.value) for need in needs)))
    if not lacking:
        return None
    return MissingDependency(
        f"Required but not here: {'; '.join(lack.problem for lack in lacking)}.",
        "\n".join(lack.remedy for lack in lacking),
    )


def tried(programs: Mapping[str, str]) -> dict[str, str]:
    """Return, for each of some programs, why it failed; "" where it did not.

    They run at the same time; each gets :data:`WAIT_S` seconds.
    """

    def failure(program: str) -> str:
        command = [sys.executable, "-c", program]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        except subprocess.TimeoutExpired:
            return f"it did not answer within {WAIT_S:.0f} s"
        if ran.returncode == 0:
            return ""
        cause = re.search(r"(?:with error|van_deploy\.errors\.\w+): (.*)", ran.stderr)
        lines = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        text = re.sub(r"\x1b\[[\d;]*m", "", cause[1] if cause else lines[-1])
        return " ".join(text.split())[:300].rstrip(".")

    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(failure, programs.values()), strict=True))


def clashes_among(
    driver: hardware.Driver | None, torch_cuda: str | None, onnxruntime_cuda: str | None
) -> tuple[Shortfall, ...]:
    """Return what does not go together.

    Args:
        driver: the NVIDIA driver, if there is one.
        torch_cuda: the CUDA PyTorch was built for, such as ``13.0``.
        onnxruntime_cuda: the CUDA ONNX Runtime was built for.
    """
    pip, major, found = pip_command(), (torch_cuda or "").partition(".")[0], list[Shortfall]()
    for family, endings in FAMILIES.items():
        names = [family + ending for ending in endings if version_of(family + ending)]
        wanted, cuda, page = f"{family}-cu{major or 13}", "".join(names)[-2:], ""
        if family == "onnxruntime":
            wanted = "onnxruntime-gpu[cuda,cudnn]" if driver else family
            cuda, page = onnxruntime_cuda or "", f" ({CUDA_PAGE})"
        change = f"`{pip} uninstall --yes {' '.join(names)} && {pip} install '{wanted}'`."
        if len(names) > 1:
            problem = "both installed; they hold the same module and overwrite each other's files"
            found.append(Shortfall(f"{' and '.join(names)} are {problem}", f"Keep one: {change}"))
        elif names and cuda and major and cuda.partition(".")[0] != major:
            problem = f"{names[0]} was built for CUDA {cuda}, but PyTorch for CUDA {torch_cuda}"
            remedy = f"Take the one that is built for PyTorch's CUDA{page}: {change}"
            found.append(Shortfall(f"{problem}: one process cannot load both", remedy))
    return tuple(found)
