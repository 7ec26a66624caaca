"""Inspect this machine: installed packages, hardware, and what van-deploy can do with them.

Package metadata is not sufficient: ONNX Runtime lists providers whose libraries cannot be loaded,
PyTorch may be built without CUDA, and bindings can be imported without a driver. Each is therefore
probed in its own process.
"""

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
PROBE_TIMEOUT_S = 120.0

_ALLOCATE = "cuda = m.require_cuda(); cuda.call('cudaFree', cuda.call('cudaMalloc', 1))"
_CREATE_SESSION = "assert m.is_cuda_usable(m.require_onnxruntime(), quiet=False)"
# Probes by requirement: a module, imported as ``m``, and code that must succeed.
PROBES: Mapping[str, tuple[str, str]] = {
    "gpu": ("van_deploy.runners.cuda", _ALLOCATE),
    "torch-gpu": ("torch", "m.ones(1, device='cuda').item()"),
    "cuda-ep": ("van_deploy.runners.onnxruntime", _CREATE_SESSION),
    "tensorrt": ("tensorrt", "m.Runtime(m.Logger(m.Logger.ERROR))"),
    "tensorrt-rtx": ("tensorrt_rtx", "m.Builder(m.Logger(m.Logger.ERROR))"),
}

# Tasks of van-deploy and their requirements; see :meth:`Environment.find_issue`.
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

# Packages that only install another package, with which they do not conflict.
METAPACKAGES = ("tensorrt", "tensorrt-rtx")

# Requirements that ``doctor --require`` accepts.
REQUIREMENTS = ("onnxruntime", "cuda-ep", "tensorrt", "tensorrt-rtx", "openvino", "ray", "gpu")


@dataclass(frozen=True)
class Issue:
    """A missing or broken requirement, or a conflict between packages.

    Attributes:
        problem: a sentence without a full stop.
        remedy: what the user can do, a sentence.
    """

    problem: str
    remedy: str


@dataclass(frozen=True)
class Environment:
    """Result of ``van-deploy doctor``; fields that are not given describe this machine.

    Attributes:
        van_deploy: version of van-deploy.
        python: version of Python.
        system: operating system and architecture.
        components: all packages that van-deploy uses, installed or not.
        providers: ONNX Runtime's execution providers by priority; empty if it is not installed.
        torch_cuda: CUDA version of PyTorch, or None for a CPU build.
        onnxruntime_cuda: CUDA version of ONNX Runtime, or None for a CPU build.
        cpu: the CPU.
        memory: main memory.
        driver: the NVIDIA driver and its GPUs, or None.
        trials: errors of the probes by name (see :data:`PROBES`); "" after a success.
    """

    van_deploy: str = __version__
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.machine()}"
    components: tuple[packages.Component, ...] = field(default_factory=packages.find_components)
    providers: tuple[str, ...] = field(default_factory=packages.execution_providers)
    torch_cuda: str | None = field(default_factory=packages.torch_cuda)
    onnxruntime_cuda: str | None = field(default_factory=packages.onnxruntime_cuda)
    cpu: hardware.Cpu = field(default_factory=hardware.cpu)
    memory: hardware.Memory = field(default_factory=hardware.memory)
    driver: hardware.Driver | None = field(default_factory=hardware.nvidia_driver)
    trials: Mapping[str, str] = field(default_factory=lambda: probe_errors())

    JSON_PROPERTIES: ClassVar = ("abilities", "clashes")

    @property
    def abilities(self) -> dict[str, Issue | None]:
        """The tasks, and for each the first issue that prevents it, or None."""
        return {
            task: next(filter(None, map(self.find_issue, requirements.split())), None)
            for task, requirements in TASKS.items()
        }

    @property
    def clashes(self) -> tuple[Issue, ...]:
        """Conflicts between installed packages."""
        pip, issues = pip_command(), list[Issue]()
        major = (self.torch_cuda or "").partition(".")[0]
        for item in self.components:
            names = [name for name in item.installed if name not in METAPACKAGES]
            package, cuda = f"{item.name}-cu{major or 13}", "".join(names).partition("-cu")[2]
            if item.name == "onnxruntime":
                package = ONNXRUNTIME_GPU if self.driver else item.name
                cuda = self.onnxruntime_cuda or ""
            if len(names) > 1:
                problem = "are both installed and overwrite each other's files"
            elif names and cuda and major and cuda.partition(".")[0] != major:
                problem = f"is for CUDA {cuda}, PyTorch for CUDA {self.torch_cuda}"
            else:
                continue
            change = f"{pip} uninstall --yes {' '.join(names)} && {pip} install '{package}'"
            remedy = f"Keep one package, with the CUDA version of PyTorch: `{change}`."
            issues.append(Issue(f"{' and '.join(names)} {problem}", remedy))
        return tuple(issues)

    def find_issue(self, name: str) -> Issue | None:
        """Return why a requirement (see :data:`TASKS`) is not met, or None if it is."""
        pip, compiler = pip_command(), os.environ.get("CXX", "g++")
        item = next((one for one in self.components if one.name == name), None)
        if name == "c++" and not shutil.which(compiler):
            return Issue(f"there is no C++ compiler '{compiler}'", "Install g++, or set CXX.")
        if name == "cuda-ep" and CUDA not in self.providers:
            change = f"{pip} uninstall --yes onnxruntime && {pip} install '{ONNXRUNTIME_GPU}'"
            return Issue(f"ONNX Runtime has no {CUDA}", f"Install it: `{change}`.")
        if item and item.version is None:
            return Issue(f"{name} is not installed", f"Run `{pip} install {item.install}`.")
        if item and item.fault:
            remedy = f"Try `{pip} install --force-reinstall {item.distribution}`."
            return Issue(f"{name} is installed but cannot be loaded ({item.fault})", remedy)
        if name in ("gpu", "cuda-ep", "rtx-gpu") and (problem := self._gpu_problem(name)):
            return Issue(problem, NO_GPU)
        if error := self.trials.get(name):
            remedy = "Fix that error, or a package conflict that `van-deploy doctor` lists."
            return Issue(f"the test of {name} on this machine failed: {error}", remedy)
        return None

    def _gpu_problem(self, name: str) -> str:
        """Return why no GPU meets a requirement; "" if one does."""
        if self.driver is None:
            return "no NVIDIA driver was found"
        gpus, hidden = self.driver.gpus, self.driver.hidden
        if not gpus and hidden:
            if (devices := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
                return f"CUDA can use none of the {hidden} GPUs that the NVIDIA driver lists"
            return f"CUDA_VISIBLE_DEVICES ('{devices}') hides every GPU ({hidden})"
        if name == "rtx-gpu" and not any(g.target in (None, *hardware.RTX_TARGETS) for g in gpus):
            models = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in gpus)
            return f"TensorRT for RTX does not support {models}"
        return "" if gpus else "the NVIDIA driver found no GPU"


def check_requirements(environment: Environment, names: Iterable[str]) -> MissingDependency | None:
    """Return an error that lists all requirements that are not met, or None.

    Raises:
        UsageError: a name is not in :data:`REQUIREMENTS`.
    """
    known = ", ".join(REQUIREMENTS)
    if unknown := set(names) - set(REQUIREMENTS):
        raise UsageError(f"There is no requirement '{min(unknown)}'.", f"Choose one of: {known}.")
    issues = dict.fromkeys(filter(None, map(environment.find_issue, names)))
    problems = "; ".join(issue.problem for issue in issues)
    remedies = "\n".join(issue.remedy for issue in issues)
    return MissingDependency(f"Requirements not met: {problems}.", remedies) if issues else None


def probe_errors() -> dict[str, str]:
    """Run all of :data:`PROBES` with a GPU, otherwise that of a builder, and return the errors."""
    driver = hardware.nvidia_driver()
    names = PROBES if driver and driver.gpus else ("tensorrt-rtx",)
    return run_probes({name: PROBES[name] for name in names})


def run_probes(probes: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Run probes in parallel processes; return the error of each by name, "" after a success.

    Each has a time limit of :data:`PROBE_TIMEOUT_S` seconds.
    """

    def run_probe(probe: tuple[str, str]) -> str:
        command = [sys.executable, "-c", "import {} as m; {}".format(*probe)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"it took more than {PROBE_TIMEOUT_S:.0f} s"
        if done.returncode == 0:
            return ""
        cause = re.search(r"(?:with error|van_deploy\.errors\.\w+): (.*)", done.stderr)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        text = re.sub(r"\x1b\[[\d;]*m", "", cause[1] if cause else lines[-1])
        return " ".join(text.split())[:300].rstrip(".")

    with ThreadPoolExecutor() as pool:
        return dict(zip(probes, pool.map(run_probe, probes.values()), strict=True))
