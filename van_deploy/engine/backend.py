"""TensorRT 10, TensorRT 11 and TensorRT for RTX behind one face, and the machine they run on.

Nothing outside this module asks which of them it has in hand: what differs is an
attribute of :class:`Backend` or one of its methods. A test compares every name of the
bindings that is used with those of 10.16, 11.4 and RTX 1.7 (``tests/engine/test_backend.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.messages import BuildLog, failure, trt_logger
from van_deploy.environment.hardware import RTX_TARGETS as RTX_TARGETS  # also for callers
from van_deploy.environment.hardware import Driver, nvidia_driver
from van_deploy.environment.packages import pip_command, version_of
from van_deploy.errors import MissingDependency, UsageError

TENSORRT = "tensorrt"
RTX = "tensorrt-rtx"
TITLES: Mapping[str, str] = {TENSORRT: "TensorRT", RTX: "TensorRT for RTX"}
"""How messages call them. Their modules are called as they are, and their packages have the
CUDA behind the name."""


@dataclass(frozen=True)
class Host:
    """What decides whether a plan runs on a machine.

    Attributes:
        gpu: the GPU's name, or None where there is none.
        target: its compute capability, such as ``sm_89``, or None.
        gpu_memory_bytes: its memory, or None if unknown.
        driver: the driver's version, or None.
        cuda: the newest CUDA the driver runs, or None.
    """

    gpu: str | None = None
    target: str | None = None
    gpu_memory_bytes: int | None = None
    driver: str | None = None
    cuda: tuple[int, int] | None = None


def host_here(driver: Driver | None = None, device: int = 0) -> Host:
    """Return this machine as engines see it, with one of its GPUs.

    Args:
        driver: what was found out before; None asks the driver now.
        device: CUDA's number of the GPU. One that is not there leaves the host without a GPU.
    """
    driver = driver or nvidia_driver()
    if driver is None:
        return Host()
    if device >= len(driver.gpus):
        return Host(driver=driver.version, cuda=driver.cuda_version)
    gpu = driver.gpus[device]
    return Host(gpu.name, gpu.target, gpu.memory_bytes, driver.version, driver.cuda_version)


def device_number(device: str | None) -> int:
    """Return CUDA's number of a device such as ``cuda:1``; 0 for everything without one.

    >>> device_number("cuda:1"), device_number("cpu"), device_number(None)
    (1, 0, 0)
    """
    return int((device or "").partition(":")[2] or 0)


@dataclass(frozen=True)
class Backend:
    """One TensorRT, loaded.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        version: all four numbers, such as ``1.7.1.116``.
        cuda: the major version of CUDA it was made for, or None if its package does not say.
        module: the bindings.
    """

    name: str
    version: str
    cuda: int | None
    module: Any

    @property
    def title(self) -> str:
        """How messages call it."""
        return TITLES[self.name]

    @property
    def release(self) -> str:
        """The version people speak of: three numbers."""
        return release_of(self.version)

    @property
    def label(self) -> str:
        """Title and release, such as ``TensorRT for RTX 1.7.1``."""
        return f"{self.title} {self.release}"

    @property
    def builds_for_absent_gpus(self) -> bool:
        """Whether targets are chosen rather than found in the machine."""
        return self.name == RTX

    def builder(self, log: BuildLog) -> tuple[Any, Any]:
        """Return a builder and its logger, which has to be kept alive.

        Raises:
            VanDeployError: TensorRT makes none: there is no driver, as a rule.
        """
        return self._made("Builder", log)

    def runtime(self, log: BuildLog) -> tuple[Any, Any]:
        """Return a runtime and its logger. Lifetime and errors are :meth:`builder`'s."""
        return self._made("Runtime", log)

    def _made(self, kind: str, log: BuildLog) -> tuple[Any, Any]:
        logger = trt_logger(self.module, log)
        try:
            return getattr(self.module, kind)(logger), logger
        except TypeError as error:  # "factory function returned nullptr": it never returns None
            said = [*log.errors, str(error)]
            raise failure(f"{self.label} does not make a {kind.lower()}", said) from error

    def configure_(self, config: Any, options: BuildOptions) -> None:
        """Set everything of ``options`` but the profiles on a builder's configuration."""
        trt = self.module
        if options.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.tiling != "none":
            levels = trt.TilingOptimizationLevel
            config.tiling_optimization_level = getattr(levels, options.tiling.upper())
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling.name)
        (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatibility is not HardwareCompatibility.NONE:
            levels = trt.HardwareCompatibilityLevel
            name = options.hardware_compatibility.name
            config.hardware_compatibility_level = getattr(levels, name)
        if self.builds_for_absent_gpus:
            config.num_compute_capabilities = len(options.targets)
            for index, target in enumerate(options.targets):
                capability = getattr(trt.ComputeCapability, target.replace("sm_", "SM"))
                config.set_compute_capability(capability, index)


def engine_from_plan(
    runtime: Any, backend: Backend, plan: Path, log: BuildLog, *, host_code: bool = False
) -> Any:
    """Return the engine in a plan; its code is loaded, so its digest has been checked before.

    Args:
        runtime: from :meth:`Backend.runtime`.
        backend: of the runtime.
        plan: the file.
        log: what the runtime's logger writes into.
        host_code: let the plan bring code for the processor, as version-compatible plans do.

    Raises:
        VanDeployError: TensorRT does not load it.
    """
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise failure(f"{backend.label} does not load '{plan}'", log.errors)
    return engine


def release_of(version: str) -> str:
    """Return the first three numbers of a version.

    >>> release_of("1.7.1.116")
    '1.7.1'
    """
    return ".".join(version.split(".")[:3])


def backend_named(name: str) -> Backend:
    """Return the backend called ``name``, loaded.

    Raises:
        UsageError: there is no backend of that name.
        MissingDependency: it is not installed, or its libraries do not load.
    """
    if name not in TITLES:
        raise UsageError(f"There is no backend '{name}'.", f"Choose one of: {', '.join(TITLES)}.")
    title = TITLES[name]
    install = f"`{pip_command()} install {name}{'-cu13' * (name == RTX)}`"
    try:
        module = importlib.import_module(name.replace("-", "_"))
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{title} is not installed ({error}).", f"Install it with {install}."
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependency(
            f"{title} is installed but does not load: {error}.",
            f"A library of it is missing or too old: reinstall it with {install}, and see "
            "`van-deploy doctor` for packages of two CUDA versions.",
        ) from error
    cuda = next((major for major in (13, 12) if version_of(f"{name}-cu{major}")), None)
    return Backend(name, str(module.__version__), cuda, module)


def choose_backend(wanted: str, targets: tuple[str, ...], gpu: str | None) -> Backend:
    """Return the backend to build with.

    ``auto`` takes TensorRT where it is installed and the GPU in this machine is
    all that is asked for, and TensorRT for RTX, which needs no GPU, otherwise.

    Args:
        wanted: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        targets: compute capabilities asked for; empty for the GPU present.
        gpu: the compute capability of the GPU present, or None.

    Raises:
        MissingDependency: it is not installed.
        UsageError: there is no backend of that name.
    """
    if wanted != "auto":
        return backend_named(wanted)
    here = (gpu,) if gpu else ()
    unserved = [target for target in targets or here if target not in RTX_TARGETS]
    if not unserved and not (gpu and set(targets) <= {gpu}):
        return backend_named(RTX)
    try:
        return backend_named(TENSORRT)
    except MissingDependency as error:
        if not unserved:
            return backend_named(RTX)
        raise MissingDependency(
            f"TensorRT for RTX does not build for {', '.join(unserved)}, and TensorRT is not "
            "installed.",
            f"{error.remedy} It builds on a machine with that GPU.",
        ) from error
