"""TensorRT 10, TensorRT 11 and TensorRT for RTX behind one face.

Nothing outside this module asks which of them it has in hand: what differs is an
attribute of :class:`Backend` or one of its methods. A test compares every name of the
bindings that is used with those of 10.16, 11.4 and RTX 1.7 (``tests/engine/test_backend.py``).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from van_deploy.config import BuildOptions, HardwareCompatibility, Profiling
from van_deploy.environment.packages import installed_distributions, pip_command
from van_deploy.errors import MissingDependency, UsageError

__all__ = [
    "BACKENDS",
    "RTX",
    "RTX_TARGETS",
    "TENSORRT",
    "Backend",
    "backend_named",
    "choose_backend",
    "release_of",
]

TENSORRT = "tensorrt"
RTX = "tensorrt-rtx"

RTX_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""What TensorRT for RTX 1.7 can build for: the members of its ``ComputeCapability``. On an H200
(sm_90) it built a plan without a target and did not load it (docs/gpu-results.md)."""


@dataclass(frozen=True)
class Backend:
    """One TensorRT, loaded.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        title: how messages call it.
        tag: how file names call it.
        version: all four numbers, such as ``1.7.1.116``.
        cuda: the major version of CUDA it was made for, or None if its package does not say.
        module: the bindings.
    """

    name: str
    title: str
    tag: str
    version: str
    cuda: int | None
    module: Any

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

    def network_flags(self) -> int:
        """Return the flags of ``create_network``: strongly typed, needed on 10, ignored on 11."""
        return 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

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
        config.profiling_verbosity = {
            Profiling.NONE: trt.ProfilingVerbosity.NONE,
            Profiling.LAYER_NAMES_ONLY: trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            Profiling.DETAILED: trt.ProfilingVerbosity.DETAILED,
        }[options.profiling]
        flags = trt.BuilderFlag
        if options.tf32:
            config.set_flag(flags.TF32)
        else:
            config.clear_flag(flags.TF32)
        if options.version_compatible:
            config.set_flag(flags.VERSION_COMPATIBLE)
        if options.hardware_compatibility is not HardwareCompatibility.NONE:
            name = options.hardware_compatibility.name
            level = getattr(trt.HardwareCompatibilityLevel, name)
            config.hardware_compatibility_level = level
        if self.builds_for_absent_gpus:
            self._set_targets_(config, options.targets)

    def _set_targets_(self, config: Any, targets: tuple[str, ...]) -> None:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = getattr(self.module.ComputeCapability, target.replace("sm_", "SM"))
            config.set_compute_capability(capability, index)


@dataclass(frozen=True)
class _Kind:
    """What is known of a back end before it is loaded."""

    title: str
    tag: str
    module: str
    distributions: tuple[str, ...]
    install: str


BACKENDS: Mapping[str, _Kind] = {
    TENSORRT: _Kind(
        "TensorRT",
        "trt",
        "tensorrt",
        ("tensorrt-cu13", "tensorrt-cu12", "tensorrt"),
        "tensorrt",
    ),
    RTX: _Kind(
        "TensorRT for RTX",
        "rtx",
        "tensorrt_rtx",
        ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        "tensorrt-rtx-cu13",
    ),
}


def release_of(version: str) -> str:
    """Return the first three numbers of a version.

    >>> release_of("1.7.1.116")
    '1.7.1'
    """
    return ".".join(version.split(".")[:3])


def backend_named(name: str) -> Backend:
    """Return the back end called ``name``, loaded.

    Raises:
        UsageError: there is no back end of that name.
        MissingDependency: it is not installed, or its libraries do not load.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"There is no back end '{name}'.", f"Choose one of: {', '.join(BACKENDS)}."
        )
    kind = BACKENDS[name]
    install = f"`{pip_command()} install {kind.install}`"
    try:
        module = importlib.import_module(kind.module)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{kind.title} is not installed ({error}).", f"Install it with {install}."
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependency(
            f"{kind.title} is installed but does not load: {error}.",
            f"A library of it is missing or too old: reinstall it with {install}, and see "
            "`van-deploy doctor` for packages of two CUDA versions.",
        ) from error
    distributions = installed_distributions()
    found = next((d for d in kind.distributions if d in distributions), "")
    cuda = int(found[-2:]) if found[-4:-2] == "cu" else None
    return Backend(name, kind.title, kind.tag, str(module.__version__), cuda, module)


def choose_backend(wanted: str, targets: tuple[str, ...], gpu: str | None) -> Backend:
    """Return the back end to build with.

    ``auto`` takes TensorRT where it is installed and the GPU in this machine is
    all that is asked for, and TensorRT for RTX, which needs no GPU, otherwise.

    Args:
        wanted: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        targets: compute capabilities asked for; empty for the GPU present.
        gpu: the compute capability of the GPU present, or None.

    Raises:
        MissingDependency: it is not installed.
        UsageError: there is no back end of that name.
    """
    if wanted != "auto":
        return backend_named(wanted)
    local = gpu is not None and set(targets) <= {gpu}
    if not local:
        if gpu is None and not targets:
            return backend_named(RTX)
        unserved = [target for target in targets if target not in RTX_TARGETS]
        return _tensorrt_for(unserved) if unserved else backend_named(RTX)
    try:
        return backend_named(TENSORRT)
    except MissingDependency:
        if gpu not in RTX_TARGETS:
            raise
        return backend_named(RTX)


def _tensorrt_for(targets: list[str]) -> Backend:
    """Return TensorRT, because TensorRT for RTX does not serve ``targets``."""
    try:
        return backend_named(TENSORRT)
    except MissingDependency as error:
        raise MissingDependency(
            f"TensorRT for RTX does not build for {', '.join(targets)}, and TensorRT is not "
            "installed.",
            f"{error.remedy} It builds on a machine with that GPU.",
        ) from error
