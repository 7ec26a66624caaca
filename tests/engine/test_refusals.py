"""What each back end cannot do is refused with its reason, and the reasons are true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.each import each
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine import refusals
from van_deploy.engine.backend import RTX, TENSORRT, Backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.host import Host
from van_deploy.engine.refusals import refuse_impossible
from van_deploy.environment.hardware import nvidia_driver
from van_deploy.errors import MissingDependency, UsageError, VanDeployError

NO_GPU = Host()
ADA = Host("NVIDIA L4", "sm_89", 24 << 30, "580.65.06", (13, 0))
TURING = Host("Tesla T4", "sm_75", 16 << 30, "580.65.06", (13, 0))
SM89 = BuildOptions(targets=("sm_89",))
ABSENT = Backend(TENSORRT, "TensorRT", "trt", "11.4.0.106", 13, None)
"""TensorRT as far as refusals look at it: they never call the bindings."""
RTX_ABSENT = Backend(RTX, "TensorRT for RTX", "rtx", "1.7.1.116", 13, None)


def refused(backend: Backend, options: BuildOptions, host: Host, **more: Any) -> VanDeployError:
    with pytest.raises(VanDeployError) as caught:
        refuse_impossible(backend, options, host, **more)
    return caught.value


@each("host", [NO_GPU, ADA])
def test_a_plain_request_passes(host: Host) -> None:
    refuse_impossible(RTX_ABSENT, SM89, host)


def test_tensorrt_passes_on_its_gpu() -> None:
    refuse_impossible(ABSENT, BuildOptions(), ADA)
    refuse_impossible(ABSENT, SM89, ADA)


@each(
    ("change", "message", "kind"),
    [
        ({"targets": ()}, "builds for GPUs that are named, and none is", UsageError),
        ({"targets": ("sm_90",)}, "does not build for sm_90; it serves sm_75", UsageError),
        (
            {"hardware_compatibility": HardwareCompatibility.AMPERE_PLUS},
            "ignores a hardware compatibility level",
            UsageError,
        ),
        ({"version_compatible": True}, "has no lean library", UsageError),
        ({"workspace_bytes": 1 << 50}, "larger than the", UsageError),
    ],
)
def test_rtx_refuses(change: dict[str, Any], message: str, kind: type[VanDeployError]) -> None:
    error = refused(RTX_ABSENT, SM89.changed(**change), NO_GPU)
    assert message in error.message
    assert type(error) is kind
    assert error.remedy


def test_rtx_refuses_a_timing_cache(tmp_path: Path) -> None:
    error = refused(RTX_ABSENT, SM89, NO_GPU, timing_cache=tmp_path / "cache")
    assert error.message == "TensorRT for RTX accepts a timing cache and does nothing with it."


def test_tensorrt_needs_the_gpu() -> None:
    error = refused(ABSENT, BuildOptions(), NO_GPU)
    assert error.message == (
        "TensorRT builds on the GPU that will run the engine, and none answers here."
    )
    assert "--backend tensorrt-rtx --target" in error.remedy
    assert error.exit_code == 3


def test_tensorrt_builds_for_the_gpu_present_only() -> None:
    error = refused(ABSENT, BuildOptions(targets=("sm_86",)), ADA)
    assert error.message == (
        "TensorRT builds for the GPU in this machine (NVIDIA L4, sm_89), not for sm_86."
    )


def test_an_old_driver() -> None:
    old = replace(ADA, driver="535.129.03", cuda=(12, 2))
    error = refused(ABSENT, BuildOptions(), old)
    assert error.message == (
        "TensorRT 11.4.0 was made for CUDA 13, and driver 535.129.03 runs CUDA up to 12.2."
    )


def test_ampere_plus_needs_ampere() -> None:
    options = BuildOptions(hardware_compatibility=HardwareCompatibility.AMPERE_PLUS)
    assert "cannot be built on Tesla T4 (sm_75)" in refused(ABSENT, options, TURING).message
    refuse_impossible(ABSENT, options, ADA)


def test_workspace_is_compared_with_the_gpus_memory() -> None:
    error = refused(ABSENT, BuildOptions(workspace_bytes=25 << 30), ADA)
    assert error.message == (
        "A workspace of 25.0 GiB is larger than the 24.0 GiB of memory NVIDIA L4 has."
    )
    refuse_impossible(ABSENT, BuildOptions(workspace_bytes=24 << 30), ADA)


@pytest.mark.skipif(nvidia_driver() is not None, reason="measures RTX on a machine with no GPU")
@pytest.mark.parametrize("option", ["version_compatible"])
def test_what_rtx_is_refused_it_really_cannot_do(
    rtx: Backend,
    digits_onnx: Path,
    tmp_path: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refusals, "_refusals", lambda *_: iter(()))
    monkeypatch.setattr("van_deploy.engine.build.refuse_impossible", lambda *_: None)
    change: dict[str, Any] = {option: True}
    asked = SM89.changed(**change)
    with pytest.raises(MissingDependency):
        engine_from_onnx(
            digits_onnx,
            tmp_path / "e.plan",
            backend=rtx,
            options=asked,
            precision="fp32",
        )
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_recommends_nothing_that_it_then_refuses() -> None:
    """A level covers other GPUs only where no target is named, and RTX only those it serves."""
    named = refused(ABSENT, BuildOptions(targets=("sm_90",)), ADA)
    assert named.remedy == (
        "Build on that GPU, leave --target out and give --hardware-compatibility ampere-plus."
    )
    refuse_impossible(
        ABSENT, BuildOptions(hardware_compatibility=HardwareCompatibility.AMPERE_PLUS), ADA
    )
    older = refused(ABSENT, BuildOptions(targets=("sm_75",)), ADA)
    assert older.remedy == "Build on that GPU, or use --backend tensorrt-rtx."
