"""Checks before engines are loaded; ``tests/gpu`` runs engines."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.each import each
from tests.plans import PlanMaker
from van_deploy.config import BatchRange
from van_deploy.engine.backend import RTX, Backend, Host, load_backend
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import sidecar_path
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import InputError, MissingDependency, VanDeployError
from van_deploy.runners.base import check_input, select_profile
from van_deploy.runners.tensorrt import TensorRtRunner

PROFILES = (BatchRange(1, 1, 1), BatchRange(2, 4, 8))
L4 = Host("a GPU", "sm_89", None, "999.0", (99, 0))


@pytest.fixture(scope="module")
def backend() -> Backend:
    """Return TensorRT for RTX, which needs no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return load_backend(RTX)


def plan_of(backend: Backend, with_plans: PlanMaker, **changes: Any) -> Path:
    """Return a stand-in for a plan of a backend, for an L4."""
    bundle = with_plans(backend=backend.name, backend_version=backend.version, **changes)
    return bundle.path / "engines/plan-sm_89.plan"


def test_profile_selection() -> None:
    profiles = [BatchRange(1, 1, 1), BatchRange(1, 8, 32), BatchRange(16, 64, 64)]
    batches = (1, 2, 15, 20, 32, 33, 64)
    assert [select_profile(profiles, batch) for batch in batches] == [0, 1, 1, 1, 1, 2, 2]
    with pytest.raises(InputError, match="a batch of 0; its profiles are 1:1:1, 2:4:8"):
        select_profile(PROFILES, 0)


@each(
    ("shape", "dtype", "row", "required", "message"),
    [
        ((1, 3, 8, 8), "float32", (3, -1, -1), "float32", ""),
        ((8, 3, 8, 8), "float32", (3, 8, 8), "float16", ""),
        ((1, 3, 8, 8), "float16", (3, 8, 8), "float32", "float32, not (1, 3, 8, 8) float16"),
        ((1, 8, 8, 3), "uint8", (3, 8, 8), "uint8", "takes (N, 3, 8, 8) uint8"),
        ((1, 3, 8), "float32", (3, 8, 8), "float32", "takes (N, 3, 8, 8) float32"),
        ((1, 1, 8, 8), "float32", (3, -1, -1), "float32", "takes (N, 3, -1, -1)"),
        ((9, 3, 8, 8), "float32", (3, 8, 8), "float32", "not serve a batch of 9"),
    ],
)
def test_input_checks_of_compiled_networks(
    shape: Any, dtype: str, row: Any, required: str, message: str
) -> None:
    arguments: Any = (np.zeros(shape, dtype), row, np.dtype(required), PROFILES)
    if not message:
        check_input(*arguments)
        return
    with pytest.raises(InputError, match=re.escape(message)):
        check_input(*arguments)


def test_foreign_swapped_and_unknown_plans_are_refused(
    backend: Backend, with_plans: PlanMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(backend, with_plans)

    def refused(message: str, kind: Any = InputError, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            TensorRtRunner(plan, **options).__enter__()

    other = replace(L4, target="sm_120")
    monkeypatch.setattr("van_deploy.runners.tensorrt.detect_host", lambda **_: other)
    refused(r"this machine has sm_120 \(a GPU\)", MissingDependency)
    sidecar_path(plan).unlink()
    refused("has no sidecar")
    if nvidia_driver() is None:
        refused("CUDA finds no GPU here|cuda-bindings", MissingDependency, trust_engine=True)


@pytest.mark.skipif(nvidia_driver() is not None, reason="there is an NVIDIA driver here")
def test_failed_runtime_creation_becomes_a_project_error(backend: Backend) -> None:
    """Without a driver the bindings raise TypeError, "factory function returned nullptr"."""

    def create(_: object) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = SimpleNamespace(ILogger=backend.module.ILogger, Runtime=create, Builder=create)
    failing = replace(backend, module=module)
    for make in (failing.runtime, failing.builder):
        with pytest.raises(MissingDependency, match="no NVIDIA GPU with a recent"):
            make(BuildLog())


def test_tensor_types_are_those_of_numpy(backend: Backend, tmp_path: Path) -> None:
    runner: Any = TensorRtRunner(tmp_path / "e.plan")
    runner.trt, kinds = backend.module, backend.module.DataType
    runner._engine = SimpleNamespace(get_tensor_dtype=kinds.__members__.get)
    assert runner._dtype("HALF") == np.float16
    with pytest.raises(InputError, match="'BF16' of the engine is bf16, which NumPy does not have"):
        runner._dtype("BF16")


@each("version_compatible", [False, True])
def test_host_code_is_allowed_only_for_version_compatible_plans(
    backend: Backend,
    with_plans: PlanMaker,
    monkeypatch: pytest.MonkeyPatch,
    version_compatible: bool,
) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _: None)
    plan = plan_of(backend, with_plans, options={"version_compatible": version_compatible})
    monkeypatch.setattr("van_deploy.runners.tensorrt.detect_host", lambda **_: L4)
    monkeypatch.setattr("van_deploy.runners.tensorrt.require_cuda", lambda _: None)
    monkeypatch.setattr(Backend, "runtime", lambda *_: (runtime, None))
    with pytest.raises(VanDeployError, match="cannot load"):
        TensorRtRunner(plan).__enter__()
    assert runtime.engine_host_code_allowed is version_compatible
