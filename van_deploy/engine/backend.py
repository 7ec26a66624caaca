"""One interface to TensorRT 10, TensorRT 11 and TensorRT for RTX, and the host they run on.

Other modules do not distinguish the backends: the differences are attributes and methods of
:class:`Backend`. A test compares every name used from the bindings with those of 10.16, 11.4 and
RTX 1.7 (``tests/engine/test_backend.py``).
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.messages import BuildLog, error_from_log, trt_logger
from van_deploy.environment.hardware import RTX_TARGETS, Driver, nvidia_driver
from van_deploy.environment.packages import installed_version, pip_command
from van_deploy.errors import MissingDependency, UsageError

TENSORRT = "tensorrt"
RTX = "tensorrt-rtx"
# Names in messages, by the name of the backend, which is that of its Python module.
TITLES: Mapping[str, str] = {TENSORRT: "TensorRT", RTX: "TensorRT for RTX"}


@dataclass(frozen=True)
class Host:
    """The properties of a machine that determine whether a plan runs on it.

    Attributes:
        gpu: name of the GPU, or None without a GPU.
        target: its compute capability, such as ``sm_89``, or None.
        gpu_memory_bytes: its memory, or None if unknown.
        driver: version of the driver, or None.
        cuda: newest CUDA version the driver supports, or None.
    """

    gpu: str | None = None
    target: str | None = None
    gpu_memory_bytes: int | None = None
    driver: str | None = None
    cuda: tuple[int, int] | None = None


def detect_host(driver: Driver | None = None, device: int = 0) -> Host:
    """Return this machine with one of its GPUs.

    Args:
        driver: of this machine; None queries it.
        device: CUDA index of the GPU; an index without a GPU returns a host without a GPU.
    """
    driver = driver or nvidia_driver()
    if driver is None:
        return Host()
    if device >= len(driver.gpus):
        return Host(driver=driver.version, cuda=driver.cuda_version)
    gpu = driver.gpus[device]
    return Host(gpu.name, gpu.target, gpu.memory_bytes, driver.version, driver.cuda_version)


@dataclass(frozen=True)
class Backend:
    """A TensorRT that is installed and imported.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        version: four numbers, such as ``1.7.1.116``.
        cuda: major version of CUDA it was built for, or None if its package does not say.
        module: the Python bindings.
    """

    name: str
    version: str
    cuda: int | None
    module: Any

    @property
    def title(self) -> str:
        """Name in messages."""
        return TITLES[self.name]

    @property
    def release(self) -> str:
        """The first three numbers of the version."""
        return release_of(self.version)

    @property
    def label(self) -> str:
        """Title and release, such as ``TensorRT for RTX 1.7.1``."""
        return f"{self.title} {self.release}"

    @property
    def cross_compiles(self) -> bool:
        """Whether it builds for GPUs that are not in this machine."""
        return self.name == RTX

    def builder(self, log: BuildLog) -> tuple[Any, Any]:
        """Return a builder and its logger; keep a reference to the logger.

        Raises:
            VanDeployError: TensorRT creates none, usually because there is no driver.
        """
        return self._create("Builder", log)

    def runtime(self, log: BuildLog) -> tuple[Any, Any]:
        """Return a runtime and its logger, with the lifetime and errors of :meth:`builder`."""
        return self._create("Runtime", log)

    def _create(self, kind: str, log: BuildLog) -> tuple[Any, Any]:
        logger = trt_logger(self.module, log)
        try:
            return getattr(self.module, kind)(logger), logger
        except TypeError as error:  # "factory function returned nullptr"; it never returns None
            what = f"{self.label} cannot create a {kind.lower()}"
            raise error_from_log(what, [*log.errors, str(error)]) from error

    def configure_(self, config: Any, options: BuildOptions) -> None:
        """Apply ``options``, except the profiles, to a builder configuration."""
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
        if self.cross_compiles:
            config.num_compute_capabilities = len(options.targets)
            for index, target in enumerate(options.targets):
                capability = getattr(trt.ComputeCapability, target.replace("sm_", "SM"))
                config.set_compute_capability(capability, index)


def engine_from_plan(
    runtime: Any, backend: Backend, plan: Path, log: BuildLog, *, host_code: bool = False
) -> Any:
    """Return the deserialised engine of a plan. This runs its code: verify its digest first.

    Args:
        runtime: from :meth:`Backend.runtime`.
        backend: of the runtime.
        plan: path of the plan.
        log: of the runtime's logger.
        host_code: permit code for the CPU in the plan, which version-compatible plans contain.

    Raises:
        VanDeployError: TensorRT cannot load the plan.
    """
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise error_from_log(f"{backend.label} cannot load '{plan}'", log.errors)
    return engine


def release_of(version: str) -> str:
    """Return the first three numbers of a version.

    >>> release_of("1.7.1.116")
    '1.7.1'
    """
    return ".".join(version.split(".")[:3])


def load_backend(name: str) -> Backend:
    """Import and return the backend ``name``.

    Raises:
        UsageError: no backend has that name.
        MissingDependency: it is not installed, or its libraries cannot be loaded.
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
            f"{title} is installed but cannot be loaded: {error}.",
            f"One of its libraries is missing or too old: reinstall it with {install}, and run "
            "`van-deploy doctor` to find packages of two CUDA versions.",
        ) from error
    cuda = next((major for major in (13, 12) if installed_version(f"{name}-cu{major}")), None)
    return Backend(name, str(module.__version__), cuda, module)


def choose_backend(requested: str, targets: tuple[str, ...], gpu: str | None) -> Backend:
    """Return the backend to build with.

    ``auto`` selects TensorRT if it is installed and this machine's GPU is the only target, and
    otherwise TensorRT for RTX, which needs no GPU.

    Args:
        requested: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        targets: the compute capabilities; empty for this machine's GPU.
        gpu: compute capability of this machine's GPU, or None.

    Raises:
        MissingDependency: the backend is not installed.
        UsageError: no backend has that name.
    """
    if requested != "auto":
        return load_backend(requested)
    needed = targets or ((gpu,) if gpu else ())
    unsupported = [target for target in needed if target not in RTX_TARGETS]
    if not unsupported and not (gpu and set(targets) <= {gpu}):
        return load_backend(RTX)
    try:
        return load_backend(TENSORRT)
    except MissingDependency as error:
        if not unsupported:
            return load_backend(RTX)
        raise MissingDependency(
            f"TensorRT for RTX does not build for {', '.join(unsupported)}, and TensorRT is not "
            "installed.",
            f"{error.remedy} It builds on a machine with that GPU.",
        ) from error
