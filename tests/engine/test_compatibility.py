"""Where a plan does not run and what a backend cannot build, said with reasons that are true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.each import each
from tests.engine.conftest import ADA, SM89, TENSORRT_11, Plan, built
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import RTX, Backend
from van_deploy.engine.compatibility import obstacles, refuse_impossible, require_compatible
from van_deploy.engine.host import Host, device_number, host_here
from van_deploy.engine.sidecar import Sidecar
from van_deploy.environment.hardware import Driver, Gpu, nvidia_driver
from van_deploy.errors import MissingDependency, UsageError, VanDeployError

NO_GPU = Host()
A100 = Host("NVIDIA A100", "sm_80", 80 << 30, "580.65.06", (13, 0))
TURING = Host("Tesla T4", "sm_75", 16 << 30, "580.65.06", (13, 0))
OLD = replace(ADA, driver="535.129.03", cuda=(11, 8))
RTX_17 = Backend(RTX, "TensorRT for RTX", "rtx", "1.7.1.116", 13, None)
PLUS = {"hardware_compatibility": HardwareCompatibility.AMPERE_PLUS}


def but(sidecar: Sidecar, **values: object) -> Sidecar:
    return sidecar.model_copy(update=values)


def of_tensorrt(sidecar: Sidecar, version: str = "11.4.0.106", **options: object) -> Sidecar:
    asked = BuildOptions().changed(**options)
    return but(sidecar, backend="tensorrt", backend_version=version, options=asked)


BUILT = "it was built for sm_89 with {label}"
BUILT_11 = "it was built for sm_89 with TensorRT 11.4.0"
VC = {"version_compatible": True}


@each(
    ("changes", "host", "problem", "remedy"),
    [
        ({}, ADA, None, ""),
        ({"targets": ("sm_80", "sm_89")}, A100, None, ""),
        (
            *({}, A100, BUILT + "; this machine has sm_80 (NVIDIA A100)"),
            "Rebuild with `--target sm_80`.",
        ),
        ({}, NO_GPU, BUILT + "; this machine has no NVIDIA GPU that answers", "Run it on a mach"),
        (
            {"backend_version": "1.2.0.54"},
            ADA,
            "it was built for sm_89 with TensorRT for RTX 1.2.0; installed is {label}",
            "Rebuild it here, or install TensorRT for RTX 1.2.0.",
        ),
        (
            {"backend_version": "{release}.1"},  # another build of one release
            ADA,
            BUILT + "; installed is TensorRT for RTX {version}",
            "Rebuild it here, or install TensorRT for RTX {release}.1.",
        ),
        (
            *({}, OLD, "it needs CUDA {cuda}, and driver 535.129.03 runs CUDA up to 11.8"),
            "Update the NVIDIA driver.",
        ),
        ({"tensorrt": "11.4.0.106", **PLUS}, A100, None, ""),
        (
            {"tensorrt": "11.4.0.106", **PLUS},
            TURING,
            "it was built for sm_80 and newer with TensorRT 11.4.0; "
            "this machine has sm_75 (Tesla T4)",
            "Rebuild on this machine.",
        ),
        (
            *({"tensorrt": "11.4.0.106"}, A100),
            *(BUILT_11 + "; this machine has sm_80 (NVIDIA A100)", "Rebuild on this machine."),
        ),
        ({"tensorrt": "10.16.1.11", **VC}, ADA, None, ""),
        ({"tensorrt": "11.5.0.1", **VC}, ADA, "never on earlier ones)", "install TensorRT 11.5.0."),
        ({"tensorrt": "10.16.1.11"}, ADA, "; installed is TensorRT 11.4.0", "install TensorRT 10."),
    ],
)
def test_where_a_plan_runs(
    rtx: Backend,
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    host: Host,
    problem: str | None,
    remedy: str,
) -> None:
    """TensorRT's own rules with a stand-in where only its version is looked at."""
    given, sidecar = dict(changes), plan.sidecar
    facts = {"label": rtx.label, "version": rtx.version, "cuda": str(rtx.cuda)}
    facts["release"] = rtx.release
    if version := given.pop("tensorrt", None):
        stand_in = "van_deploy.engine.compatibility.backend_named"
        monkeypatch.setattr(stand_in, lambda _: TENSORRT_11)
        sidecar = of_tensorrt(sidecar, version, **given)
    else:
        given = {k: v.format(**facts) if isinstance(v, str) else v for k, v in given.items()}
        sidecar = but(sidecar, **given)
    found = obstacles(sidecar, host)
    monkeypatch.undo()
    assert len(found) == (problem is not None)
    for obstacle in found:
        assert str(problem).format(**facts) in obstacle.problem
        assert remedy.format(**facts) in obstacle.remedy


def test_every_reason_is_given_at_once(plan: Plan) -> None:
    older = but(plan.sidecar, backend_version="1.2.0.54")
    with pytest.raises(MissingDependency) as caught:
        require_compatible(older, replace(A100, cuda=(11, 8)))
    assert caught.value.message.startswith(f"The engine '{older.name}' does not run here: ")
    assert caught.value.message.count(";") >= 3
    assert len(caught.value.remedy.splitlines()) == 3
    require_compatible(plan.sidecar, ADA)


def test_a_backend_that_is_not_installed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    first, *_ = obstacles(of_tensorrt(plan.sidecar), ADA)
    assert first.about == "backend"
    assert first.problem.startswith("TensorRT is not installed")


def test_the_host_is_one_of_the_drivers_gpus() -> None:
    gpus = (Gpu("NVIDIA L4", (8, 9), 24 << 30), Gpu("NVIDIA A100", (8, 0), None))
    driver = Driver("580.65.06", (13, 0), gpus)
    assert host_here(driver) == ADA
    assert host_here(driver, device_number("cuda:1")).target == "sm_80"
    assert host_here(driver, 2).gpu is host_here(Driver("580.65.06", (13, 0), ())).gpu is None
    assert host_here(Driver("470.1", (11, 4), (Gpu("old", None, None),))).target is None


@each(
    ("options", "host", "message", "kind"),
    [
        (
            *({"targets": ()}, NO_GPU),
            "TensorRT builds on the GPU that will run the engine, and none answers here.",
            MissingDependency,
        ),
        (
            *({"targets": ()}, replace(OLD, cuda=(12, 2))),
            "TensorRT 11.4.0 was made for CUDA 13, and driver 535.129.03 runs CUDA up to 12.2.",
            MissingDependency,
        ),
        (
            *({**PLUS, "targets": ()}, TURING),
            "An ampere-plus plan cannot be built on Tesla T4 (sm_75).",
            UsageError,
        ),
        (
            *({"workspace_bytes": 25 << 30}, ADA),
            "A workspace of 25.0 GiB is larger than the 24.0 GiB of memory NVIDIA L4 has.",
            UsageError,
        ),
    ],
)
def test_what_tensorrt_refuses(
    options: dict[str, Any], host: Host, message: str, kind: type[VanDeployError]
) -> None:
    """What RTX refuses is in ``tests/cli/test_build.py``."""
    with pytest.raises(kind) as caught:
        refuse_impossible(TENSORRT_11, SM89.changed(**options), host)
    assert caught.value.message == message
    assert caught.value.remedy


def test_what_is_possible_is_not_refused() -> None:
    for backend, options, host in (
        *((RTX_17, SM89, NO_GPU), (RTX_17, SM89, ADA), (TENSORRT_11, SM89, ADA)),
        (TENSORRT_11, BuildOptions().changed(**PLUS), ADA),
        (TENSORRT_11, BuildOptions(workspace_bytes=24 << 30), ADA),
    ):
        refuse_impossible(backend, options, host)


@each(
    ("target", "remedy"),
    [
        (
            "sm_90",
            "Build on that GPU, leave --target out and give --hardware-compatibility ampere-plus.",
        ),
        ("sm_75", "Build on that GPU, or use --backend tensorrt-rtx."),
    ],
)
def test_tensorrt_recommends_nothing_that_it_then_refuses(target: str, remedy: str) -> None:
    """A level covers other GPUs only where no target is named, and RTX only those it serves."""
    with pytest.raises(UsageError) as caught:
        refuse_impossible(TENSORRT_11, BuildOptions(targets=(target,)), ADA)
    assert caught.value.message == (
        f"TensorRT builds for the GPU in this machine (NVIDIA L4, sm_89), not for {target}."
    )
    assert caught.value.remedy == remedy


@pytest.mark.skipif(nvidia_driver() is not None, reason="measures RTX on a machine with no GPU")
def test_what_rtx_is_refused_it_really_cannot_do(
    rtx: Backend, digits_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.engine.build.refuse_impossible", lambda *_: None)
    with pytest.raises(MissingDependency):
        built(digits_onnx, tmp_path / "e.plan", rtx, SM89.changed(version_compatible=True))
    assert list(tmp_path.iterdir()) == []
