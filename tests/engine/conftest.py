"""The real TensorRT for RTX, small networks, a plan, and a function that builds plans."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto

from van_deploy.config import BatchRange, BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import RTX, TENSORRT, Backend, Host, load_backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.sidecar import Sidecar
from van_deploy.model.preprocess import OFFICIAL

SM89 = BuildOptions(targets=("sm_89",), profiles=(BatchRange(1, 2, 4),))
ADA = Host("NVIDIA L4", "sm_89", 24 << 30, "580.65.06", (13, 0))
AMPERE_PLUS: dict[str, Any] = {"hardware_compatibility": HardwareCompatibility.AMPERE_PLUS}
# Backends without bindings, for checks of options and for names.
RTX_17 = Backend(RTX, "1.7.1.116", 13, None)
TENSORRT_11 = Backend(TENSORRT, "11.4.0.106", 13, None)

Build = Callable[..., Sidecar]


@dataclass(frozen=True)
class Plan:
    """A plan of the embedded network, its sidecar, and the progress calls of its build."""

    path: Path
    sidecar: Sidecar
    progress: list[tuple[str, int, int | None]]


@pytest.fixture(scope="session")
def rtx() -> Backend:
    """Return TensorRT for RTX, which builds on any machine."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed (pip install tensorrt-rtx-cu13)")
    return load_backend(RTX)


@pytest.fixture(scope="session")
def build(rtx: Backend, digits_onnx: Path) -> Build:
    """Return a function that builds a plan, by default of the embedded network for an L4."""

    def build_plan(
        plan: Path, options: BuildOptions = SM89, source: Path = digits_onnx, **more: Any
    ) -> Sidecar:
        required: dict[str, Any] = {"backend": rtx, "options": options, "precision": "fp32"}
        return engine_from_onnx(source, plan, **required, **more)

    return build_plan


@pytest.fixture(scope="session")
def plan(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan for an L4, with sidecar and log; tests must not change it."""
    path = tmp_path_factory.mktemp("plan") / "van_digits-fp32-sm89-rtx1.7.1.plan"
    calls: list[tuple[str, int, int | None]] = []
    sidecar = build(path, preprocessing=OFFICIAL, progress=lambda *call: calls.append(call))
    return Plan(path, sidecar, calls)


@pytest.fixture
def graph(digits_onnx: Path) -> ModelProto:
    """Return the graph of the embedded network, which tests may change."""
    return onnx.load(digits_onnx)
