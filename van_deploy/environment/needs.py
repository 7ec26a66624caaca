"""Whether this machine has what a task needs, and what to do where it has not."""

from __future__ import annotations

import enum
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from van_deploy.errors import MissingDependency

if TYPE_CHECKING:
    from van_deploy.environment.machine import Environment


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
    """Why something cannot be done here.

    Attributes:
        problem: what is missing, without a full stop.
        remedy: what to do about it, a sentence.
    """

    problem: str
    remedy: str


@dataclass(frozen=True)
class Ability:
    """A task, and whether this machine is up to it.

    Attributes:
        task: what somebody would want to do.
        shortfall: why it cannot be done here, or None if it can.
    """

    task: str
    shortfall: Shortfall | None


Check = Callable[["Environment"], "Shortfall | None"]


@dataclass(frozen=True)
class Diagnosis:
    """A machine, and what can be done on it.

    Attributes:
        environment: what is there.
        abilities: what could be wanted of it, and why it is not up to that.
    """

    environment: Environment
    abilities: tuple[Ability, ...]


def diagnosis_of(environment: Environment) -> Diagnosis:
    """Return what can be done on a machine, beside what is there."""
    found = (
        Ability(task, next(filter(None, (check(environment) for check in checks)), None))
        for task, checks in _TASKS.items()
    )
    return Diagnosis(environment, tuple(found))


def require(environment: Environment, needs: Iterable[Need]) -> None:
    """Return if everything needed is here and usable.

    Raises:
        MissingDependency: something is not; all of it is listed.
    """
    own = {Need.CUDA_PROVIDER: _cuda_provider, Need.GPU: _gpu}
    checks = [own.get(need) or _usable(need.value) for need in needs]
    missing = dict.fromkeys(filter(None, (check(environment) for check in checks)))
    if missing:
        raise MissingDependency(
            f"Required but not here: {'; '.join(lack.problem for lack in missing)}.",
            "\n".join(lack.remedy for lack in missing),
        )


def _usable(*names: str) -> Check:
    """Return a check that these components are installed and load."""

    def check(environment: Environment) -> Shortfall | None:
        from van_deploy.environment.packages import pip_command

        item = next((i for i in map(environment.installed, names) if not i.usable), None)
        if item is None:
            return None
        name, package = item.component.name, item.distribution or item.component.install
        if item.version is None:
            return Shortfall(
                f"{name} is not installed", f"Install it with `{pip_command()} install {package}`."
            )
        return Shortfall(
            f"{name} is installed but does not load ({item.fault})",
            f"Try `{pip_command()} install --force-reinstall {package}`.",
        )

    return check


def _works(trial: str, what: str) -> Check:
    """Return a check that something was tried here and did not fail."""

    def check(environment: Environment) -> Shortfall | None:
        reason = environment.trials.get(trial, "")
        problem = f"{what}, tried here, failed: {reason}"
        return Shortfall(problem, "See what clashes, above.") if reason else None

    return check


def _gpu(environment: Environment) -> Shortfall | None:
    driver = environment.driver
    if driver is None:
        return Shortfall(
            "no NVIDIA driver answers", "Run this on a machine with an NVIDIA GPU and its driver."
        )
    if driver.gpus:
        return _works("gpu", "taking memory on the GPU")(environment)
    if driver.hidden:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Shortfall(
            f"CUDA_VISIBLE_DEVICES ('{listed}') hides every GPU ({driver.hidden})",
            "Name one in it, such as CUDA_VISIBLE_DEVICES=0, or unset it.",
        )
    return Shortfall(
        "the NVIDIA driver sees no GPU", "Check `nvidia-smi` and the container's GPU access."
    )


def _compiler(environment: Environment) -> Shortfall | None:
    name = os.environ.get("CXX", "g++")
    if shutil.which(name):
        return None
    return Shortfall(f"there is no C++ compiler '{name}'", "Install g++, or name one in CXX.")


def _cuda_provider(environment: Environment) -> Shortfall | None:
    from van_deploy.environment.packages import pip_command

    if "CUDAExecutionProvider" in environment.providers:
        return _gpu(environment) or _works("ort-cuda", "CUDAExecutionProvider")(environment)
    pip = pip_command()
    return Shortfall(
        "ONNX Runtime has no CUDAExecutionProvider",
        f"Install the GPU package: `{pip} uninstall --yes onnxruntime && "
        f"{pip} install 'onnxruntime-gpu[cuda,cudnn]'`.",
    )


def _rtx_gpu(environment: Environment) -> Shortfall | None:
    """Return why no GPU here runs engines of TensorRT for RTX."""
    from van_deploy.environment.hardware import RTX_TARGETS

    gpus = environment.driver.gpus if environment.driver else ()
    if not gpus or any(gpu.target in (None, *RTX_TARGETS) for gpu in gpus):
        return _gpu(environment)
    names = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in gpus)
    return Shortfall(f"TensorRT for RTX does not serve {names}", "Use TensorRT on this GPU.")


_EXPORT = ("torch", "timm", "onnx", "onnxscript", "onnxsim")
_TENSORRT = (_usable("tensorrt"), _gpu, _works("tensorrt", "a runtime"))
_TASKS: dict[str, tuple[Check, ...]] = {
    "export ONNX files": (_usable(*_EXPORT),),
    "check them against PyTorch": (_usable(*_EXPORT, "onnxruntime"),),
    "run them on the CPU with ONNX Runtime": (
        _usable("onnxruntime"),
        _works("ort-cpu", "a session of one operator"),
    ),
    "run them on the CPU with OpenVINO": (_usable("openvino"),),
    "run them on a GPU with ONNX Runtime": (_usable("onnxruntime"), _gpu, _cuda_provider),
    "run PyTorch on a GPU": (_usable("torch"), _gpu, _works("torch", "PyTorch on the GPU")),
    "compile packages with Inductor": (_usable("torch"), _compiler),
    "build engines with TensorRT": _TENSORRT,
    "run engines of TensorRT": _TENSORRT,
    "build engines with TensorRT for RTX": (
        _usable("tensorrt-rtx"),
        _works("tensorrt-rtx", "a builder"),
    ),
    "run engines of TensorRT for RTX": (
        _usable("tensorrt-rtx"),
        _rtx_gpu,
        _works("tensorrt-rtx-run", "a runtime"),
    ),
    "spread work over machines with Ray": (_usable("ray"),),
    "sign bundles and check signatures": (_usable("cryptography"),),
}
