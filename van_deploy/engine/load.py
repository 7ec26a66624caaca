"""TensorRT's runtime and its engines, with what they say made into errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from van_deploy.engine.backend import Backend
from van_deploy.engine.catalogue import build_failure, load_failure
from van_deploy.engine.log import BuildLog, trt_logger


def builder_of(backend: Backend, log: BuildLog, source: str) -> tuple[Any, Any]:
    """Return a builder and its logger, which has to be kept alive.

    Raises:
        VanDeployError: TensorRT makes none: there is no driver, as a rule.
    """
    logger = trt_logger(backend.module, log)
    try:
        return backend.module.Builder(logger), logger
    except TypeError as error:  # "factory function returned nullptr": it never returns None
        raise build_failure(backend.label, source, [*log.errors, str(error)]) from error


def runtime_of(backend: Backend, log: BuildLog) -> tuple[Any, Any]:
    """Return a runtime and its logger, which has to be kept alive.

    Raises:
        VanDeployError: TensorRT makes none: there is no driver, as a rule.
    """
    logger = trt_logger(backend.module, log)
    try:
        return backend.module.Runtime(logger), logger
    except TypeError as error:
        raise load_failure(backend.label, "a runtime", [*log.errors, str(error)]) from error


def engine_from_plan(
    runtime: Any, backend: Backend, plan: Path, log: BuildLog, *, host_code: bool = False
) -> Any:
    """Return the engine in a plan; its code is loaded, so its digest has been checked before.

    Args:
        runtime: from :func:`runtime_of`.
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
        raise load_failure(backend.label, str(plan), log.errors)
    return engine
