"""This machine as a whole: what is installed, what runs when it is tried, what it is up to.

A package's metadata says what was meant to work. ONNX Runtime lists providers whose libraries
do not load, PyTorch may be built without CUDA, and bindings import without a driver. So each is
tried, in a process of its own.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

from van_deploy import __version__
from van_deploy.environment import hardware, packages
from van_deploy.environment.packages import pip_command
from van_deploy.errors import MissingDependency, UsageError

CUDA = "CUDAExecutionProvider"
ONNXRUNTIME_GPU = "onnxruntime-gpu[cuda,cudnn]"
NO_GPU = "Run this where `nvidia-smi` lists a GPU that CUDA_VISIBLE_DEVICES does not hide."
WAIT_S = 120.0

_MEMORY = "cuda = m.require_cuda(); cuda.call('cudaFree', cuda.call('cudaMalloc', 1))"
_SESSION = "assert m.is_provider_usable(m.require_onnxruntime(), m.CUDA, quiet=False)"
# By what they are needed for: a module ``m``, and what is tried of it.
TRIALS: Mapping[str, tuple[str, str]] = {
    "gpu": ("van_deploy.runners.cuda", _MEMORY),
    "torch-gpu": ("torch", "m.ones(1, device='cuda').item()"),
    "cuda-ep": ("van_deploy.runners.onnxruntime", _SESSION),
    "tensorrt": ("tensorrt", "m.Runtime(m.Logger(m.Logger.ERROR))"),
    "tensorrt-rtx": ("tensorrt_rtx", "m.Builder(m.Logger(m.Logger.ERROR))"),
}

# What somebody may want to do, and what it needs; see :meth:`Environment.lacks`.
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
    "run engines of TensorRT for RTX": "tensorrt-rtx gpu rtx-gpu",
    "spread work over machines with Ray": "ray",
    "sign bundles and check signatures": "cryptography",
}

# What only brings another package, beside which it is no second one of a kind.
METAPACKAGES = ("tensorrt", "tensorrt-rtx")

# What a script can require of a machine before it starts.
NEEDS = ("onnxruntime", "cuda-ep", "tensorrt", "tensorrt-rtx", "openvino", "ray", "gpu")


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
    """Everything ``van-deploy doctor`` knows: of this machine, but for what is given.

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
    """

    van_deploy: str = __version__
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.machine()}"
    components: tuple[packages.Component, ...] = field(default_factory=packages.components_here)
    providers: tuple[str, ...] = field(default_factory=packages.execution_providers)
    torch_cuda: str | None = field(default_factory=packages.torch_cuda)
    onnxruntime_cuda: str | None = field(default_factory=packages.onnxruntime_cuda)
    cpu: hardware.Cpu = field(default_factory=hardware.cpu)
    memory: hardware.Memory = field(default_factory=hardware.memory)
    driver: hardware.Driver | None = field(default_factory=hardware.nvidia_driver)
    trials: Mapping[str, str] = field(default_factory=lambda: trials_here())

    JSON_PROPERTIES: ClassVar = ("abilities", "clashes")

    @property
    def abilities(self) -> dict[str, Shortfall | None]:
        """What could be wanted of the machine, and why it is not up to that; None if it is."""
        return {
            task: next(filter(None, map(self.lacks, needs.split())), None)
            for task, needs in TASKS.items()
        }

    @property
    def clashes(self) -> tuple[Shortfall, ...]:
        """What does not go together."""
        pip, found = pip_command(), list[Shortfall]()
        major = (self.torch_cuda or "").partition(".")[0]
        for item in self.components:
            names = [name for name in item.installed if name not in METAPACKAGES]
            wanted, cuda = f"{item.name}-cu{major or 13}", "".join(names).partition("-cu")[2]
            if item.name == "onnxruntime":
                wanted = ONNXRUNTIME_GPU if self.driver else item.name
                cuda = self.onnxruntime_cuda or ""
            if len(names) > 1:
                problem = "are both installed and overwrite each other's files"
            elif names and cuda and major and cuda.partition(".")[0] != major:
                problem = f"is for CUDA {cuda}, PyTorch for {self.torch_cuda}: load one, not both"
            else:
                continue
            change = f"{pip} uninstall --yes {' '.join(names)} && {pip} install '{wanted}'"
            remedy = f"Keep one, of the CUDA that PyTorch has: `{change}`."
            found.append(Shortfall(f"{' and '.join(names)} {problem}", remedy))
        return tuple(found)

    def lacks(self, need: str) -> Shortfall | None:
        """Return why something is not here, or failed when tried; :data:`TASKS` shows the needs."""
        pip, compiler = pip_command(), os.environ.get("CXX", "g++")
        item = next((one for one in self.components if one.name == need), None)
        if need == "c++" and not shutil.which(compiler):
            return Shortfall(f"there is no C++ compiler '{compiler}'", "Install g++, or set CXX.")
        if need == "cuda-ep" and CUDA not in self.providers:
            change = f"{pip} uninstall --yes onnxruntime && {pip} install '{ONNXRUNTIME_GPU}'"
            return Shortfall(f"ONNX Runtime has no {CUDA}", f"Install it: `{change}`.")
        if item and item.version is None:
            return Shortfall(f"{need} is not installed", f"Run `{pip} install {item.install}`.")
        if item and item.fault:
            remedy = f"Try `{pip} install --force-reinstall {item.distribution}`."
            return Shortfall(f"{need} is installed but does not load ({item.fault})", remedy)
        if need in ("gpu", "cuda-ep", "rtx-gpu") and (problem := self._gpu_problem(need)):
            return Shortfall(problem, NO_GPU)
        if reason := self.trials.get(need):
            problem = f"{need}, tried here, failed: {reason}"
            return Shortfall(problem, "Mend that, or see what clashes.")
        return None

    def _gpu_problem(self, need: str) -> str:
        """Return why there is no GPU for a need; "" where there is one."""
        if self.driver is None:
            return "no NVIDIA driver answers"
        gpus, hidden = self.driver.gpus, self.driver.hidden
        if not gpus and hidden:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            return f"CUDA_VISIBLE_DEVICES ('{listed}') hides every GPU ({hidden})"
        if need == "rtx-gpu" and not any(g.target in (None, *hardware.RTX_TARGETS) for g in gpus):
            names = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in gpus)
            return f"TensorRT for RTX does not serve {names}"
        return "" if gpus else "the NVIDIA driver sees no GPU"


def missing(environment: Environment, needs: Iterable[str]) -> MissingDependency | None:
    """Return the error that lists what is needed and not here or not usable; None if all is.

    Raises:
        UsageError: a need is none of :data:`NEEDS`.
    """
    if unknown := set(needs) - set(NEEDS):
        raise UsageError(f"There is no '{min(unknown)}' to require.", f"Known: {', '.join(NEEDS)}.")
    lacking = dict.fromkeys(filter(None, map(environment.lacks, needs)))
    problems = "; ".join(lack.problem for lack in lacking)
    remedies = "\n".join(lack.remedy for lack in lacking)
    return MissingDependency(f"Required but not here: {problems}.", remedies) if lacking else None


def trials_here() -> dict[str, str]:
    """Return why each of :data:`TRIALS` failed: all where there is a GPU, else only a builder."""
    driver = hardware.nvidia_driver()
    names = TRIALS if driver and driver.gpus else ("tensorrt-rtx",)
    return tried({name: TRIALS[name] for name in names})


def tried(programs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return, for each module and what is tried of it, why it failed; "" where it did not.

    They run at the same time; each gets :data:`WAIT_S` seconds.
    """

    def failure(program: tuple[str, str]) -> str:
        command = [sys.executable, "-c", "import {} as m; {}".format(*program)]
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
