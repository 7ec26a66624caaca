"""Checks before engines are loaded; ``tests/gpu`` runs engines."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.artifacts import ArtifactCache
from tests.each import each
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine.backend import Backend, Host, choose_backend, detect_host
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import load_sidecar, write_sidecar
from van_deploy.environment.hardware import RTX_TARGETS, nvidia_driver
from van_deploy.errors import InputError, MissingDependency, VanDeployError
from van_deploy.runners.base import check_input, select_profile
from van_deploy.runners.tensorrt import TensorRtRunner

PROFILES = (BatchRange(1, 1, 1), BatchRange(2, 4, 8))
NO_DRIVER = nvidia_driver() is None


@dataclass(frozen=True)
class Engine:
    """An engine and its backend."""

    plan: Path
    backend: Backend


@pytest.fixture(scope="module")
def engine(artifact_cache: ArtifactCache, digits_onnx: Path) -> Engine:
    """Return an FP32 engine for the GPU here, or for an L4 where there is none."""
    host = detect_host()
    try:
        backend = choose_backend("auto", () if host.target else ("sm_89",), host.target)
    except MissingDependency as error:
        pytest.skip(error.message)
    targets = (host.target or "sm_89",) if backend.cross_compiles else ()
    options = BuildOptions(profiles=PROFILES, targets=targets, tf32=False)

    def make(folder: Path) -> None:
        folder.mkdir()
        how: dict[str, Any] = {"backend": backend, "options": options, "precision": "fp32"}
        engine_from_onnx(digits_onnx, folder / "e.plan", host=host, **how)

    return Engine(artifact_cache("engine_fp32", make) / "e.plan", backend)


def test_profile_selection() -> None:
    profiles = [BatchRange(1, 1, 1), BatchRange(1, 8, 32), BatchRange(16, 64, 64)]
    batches = (1, 2, 15, 20, 32, 33, 64)
    assert [select_profile(profiles, batch) for batch in batches] == [0, 1, 1, 1, 1, 2, 2]
    for batch in (0, 9):
        with pytest.raises(InputError, match=f"a batch of {batch}; its profiles are 1:1:1, 2:4:8"):
            select_profile(PROFILES, batch)


@each(
    ("images", "row", "dtype", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), (3, -1, -1), np.float32, ""),
        (np.zeros((8, 3, 8, 8), np.float32), (3, 8, 8), np.float16, ""),
        (
            np.zeros((1, 3, 8, 8), np.float16),
            (3, 8, 8),
            np.float32,
            "float32, not (1, 3, 8, 8) float16",
        ),
        (np.zeros((1, 8, 8, 3), np.uint8), (3, 8, 8), np.uint8, "takes (N, 3, 8, 8) uint8"),
        (np.zeros((1, 3, 8), np.float32), (3, 8, 8), np.float32, "takes (N, 3, 8, 8) float32"),
        (np.zeros((1, 1, 8, 8), np.float32), (3, -1, -1), np.float32, "takes (N, 3, -1, -1)"),
        (np.zeros((9, 3, 8, 8), np.float32), (3, 8, 8), np.float32, "not serve a batch of 9"),
    ],
)
def test_input_checks_of_compiled_networks(images: Any, row: Any, dtype: Any, message: str) -> None:
    if not message:
        check_input(images, row, dtype, PROFILES)
        return
    with pytest.raises(InputError, match=re.escape(message)):
        check_input(images, row, dtype, PROFILES)


def test_unknown_swapped_and_foreign_plans_are_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "e.plan"
    plan.write_bytes(engine.plan.read_bytes()[:-1])
    with pytest.raises(InputError, match="has no sidecar"):
        TensorRtRunner(plan).__enter__()
    sidecar = load_sidecar(engine.plan)
    write_sidecar(plan, sidecar)
    with pytest.raises(InputError, match="damaged or swapped"):
        TensorRtRunner(plan, trust_engine=True).__enter__()
    other = next(target for target in RTX_TARGETS if target not in sidecar.targets)
    other_host = Host("a GPU", other, None, "999.0", (99, 0))
    monkeypatch.setattr("van_deploy.runners.tensorrt.detect_host", lambda **_: other_host)
    with pytest.raises(MissingDependency) as caught:
        TensorRtRunner(engine.plan).__enter__()
    assert f"this machine has {other} (a GPU)" in caught.value.message
    assert "ebuild" in caught.value.remedy


@pytest.mark.skipif(not NO_DRIVER, reason="there is an NVIDIA driver here")
def test_missing_gpu_is_reported(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match="no NVIDIA GPU was found"):
        TensorRtRunner(engine.plan).__enter__()
    plan = Path(shutil.copy(engine.plan, tmp_path))  # without its sidecar
    trusting = TensorRtRunner(plan, trust_engine=True, backend=engine.backend.name)
    with pytest.raises(MissingDependency, match=r"CUDA finds no GPU here|cuda-bindings"):
        trusting.__enter__()


@pytest.mark.skipif(not NO_DRIVER, reason="there is an NVIDIA driver here")
def test_failed_runtime_creation_becomes_a_project_error(engine: Engine) -> None:
    """Without a driver the bindings raise TypeError, "factory function returned nullptr"."""

    class Module(ModuleType):
        ILogger = engine.backend.module.ILogger

        @staticmethod
        def Runtime(_: object) -> Any:  # noqa: N802
            raise TypeError("pybind11::init(): factory function returned nullptr")

        Builder = Runtime

    backend = replace(engine.backend, module=Module("tensorrt"))
    for make in (backend.runtime, backend.builder):
        with pytest.raises(MissingDependency, match="no NVIDIA GPU with a recent"):
            make(BuildLog())


class FakeRuntime:
    """Records whether host code was allowed when an engine was deserialised."""

    engine_host_code_allowed = False
    allowed: bool | None = None

    def deserialize_cuda_engine(self, data: bytes) -> None:
        FakeRuntime.allowed = self.engine_host_code_allowed


@each("version_compatible", [False, True])
def test_host_code_is_allowed_only_for_version_compatible_plans(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version_compatible: bool
) -> None:
    plan = tmp_path / "e.plan"
    plan.write_bytes(engine.plan.read_bytes())
    sidecar = load_sidecar(engine.plan)
    options = sidecar.options.with_changes(version_compatible=version_compatible)
    write_sidecar(plan, sidecar.model_copy(update={"options": options}))
    here = Host("a GPU", sidecar.targets[0], None, "999.0", (99, 0))
    monkeypatch.setattr("van_deploy.runners.tensorrt.detect_host", lambda **_: here)
    monkeypatch.setattr("van_deploy.runners.tensorrt.require_cuda", lambda _: None)
    monkeypatch.setattr(Backend, "runtime", lambda *_: (FakeRuntime(), None))
    with pytest.raises(VanDeployError, match="cannot load"):
        TensorRtRunner(plan).__enter__()
    assert FakeRuntime.allowed is version_compatible
