"""Whether a plan runs on a machine, without loading it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.test_sidecar import sidecar_for
from van_deploy.config import BuildOptions, HardwareCompatibility
from van_deploy.engine.backend import Backend
from van_deploy.engine.compatibility import obstacles, require_compatible
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import Sidecar
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.errors import MissingDependency

ADA = Host("NVIDIA L4", "sm_89", 24 << 30, "580.65.06", (13, 0))
A100 = Host("NVIDIA A100", "sm_80", 80 << 30, "580.65.06", (13, 0))


def but(sidecar: Sidecar, **values: object) -> Sidecar:
    return sidecar.model_copy(update=values)


@pytest.fixture
def sidecar(rtx: Backend, tmp_path: Path) -> Sidecar:
    plan = tmp_path / "e.plan"
    plan.write_bytes(b"stands for a plan")
    return but(sidecar_for(plan), backend_version=rtx.version, cuda=rtx.cuda)


def problems(sidecar: Sidecar, host: Host) -> list[str]:
    return [obstacle.problem for obstacle in obstacles(sidecar, host)]


def of_tensorrt(sidecar: Sidecar, **options: object) -> Sidecar:
    return but(
        sidecar,
        backend="tensorrt",
        backend_version="11.4.0.106",
        built_on="NVIDIA L4",
        options=BuildOptions().changed(**options),
    )


def test_it_runs_where_everything_fits(sidecar: Sidecar) -> None:
    assert obstacles(sidecar, ADA) == ()
    require_compatible(sidecar, ADA)


def test_another_gpu(sidecar: Sidecar, rtx: Backend) -> None:
    (obstacle,) = obstacles(sidecar, A100)
    assert obstacle.problem == (
        f"it was built for sm_89 with {rtx.label}; this machine has sm_80 (NVIDIA A100)"
    )
    assert obstacle.remedy == "Rebuild with `--target sm_80`."


def test_a_plan_for_several(sidecar: Sidecar) -> None:
    both = but(sidecar, targets=("sm_80", "sm_89"))
    assert problems(both, A100) == problems(both, ADA) == []


def test_no_gpu(sidecar: Sidecar) -> None:
    (obstacle,) = obstacles(sidecar, Host())
    assert obstacle.about == "gpu"
    assert obstacle.problem.endswith("this machine has no NVIDIA GPU that answers")


def test_another_release(sidecar: Sidecar, rtx: Backend) -> None:
    (obstacle,) = obstacles(but(sidecar, backend_version="1.2.0.54"), ADA)
    assert obstacle.problem == (
        "it was built for sm_89 with TensorRT for RTX 1.2.0; "
        f"installed is TensorRT for RTX {rtx.release}"
    )
    assert obstacle.remedy == "Rebuild it here, or install TensorRT for RTX 1.2.0."


def test_another_build_of_one_release(sidecar: Sidecar, rtx: Backend) -> None:
    (obstacle,) = obstacles(but(sidecar, backend_version=f"{rtx.release}.1"), ADA)
    assert f"installed is TensorRT for RTX {rtx.version}" in obstacle.problem


def test_an_old_driver(sidecar: Sidecar) -> None:
    old = replace(ADA, driver="535.129.03", cuda=(11, 8))
    assert problems(sidecar, old) == [
        f"it needs CUDA {sidecar.cuda}, and driver 535.129.03 runs CUDA up to 11.8"
    ]


def test_every_reason_is_given_at_once(sidecar: Sidecar) -> None:
    with pytest.raises(MissingDependency) as caught:
        require_compatible(but(sidecar, backend_version="1.2.0.54"), replace(A100, cuda=(11, 8)))
    assert caught.value.message.startswith(f"The engine '{sidecar.name}' does not run here: ")
    assert caught.value.message.count(";") >= 3
    assert len(caught.value.remedy.splitlines()) == 3


class TestTensorRT:
    """TensorRT's own rules, with a stand-in where only its version is looked at."""

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = Backend("tensorrt", "TensorRT", "trt", "11.4.0.106", 13, None)
        monkeypatch.setattr("van_deploy.engine.compatibility.backend_named", lambda _: here)

    def test_ampere_plus(self, sidecar: Sidecar) -> None:
        plus = of_tensorrt(sidecar, hardware_compatibility=HardwareCompatibility.AMPERE_PLUS)
        assert problems(plus, A100) == []
        (turing,) = problems(plus, replace(ADA, gpu="Tesla T4", target="sm_75"))
        assert turing == (
            "it was built for sm_80 and newer with TensorRT 11.4.0; "
            "this machine has sm_75 (Tesla T4)"
        )

    def test_a_plan_is_rebuilt_on_the_machine(self, sidecar: Sidecar) -> None:
        (obstacle,) = obstacles(of_tensorrt(sidecar), A100)
        assert obstacle.remedy == "Rebuild on this machine."

    def test_version_compatible_runs_on_later_versions_only(self, sidecar: Sidecar) -> None:
        older = of_tensorrt(sidecar, version_compatible=True)
        assert problems(but(older, backend_version="10.16.1.11"), ADA) == []
        (problem,) = problems(but(older, backend_version="11.5.0.1"), ADA)
        assert problem.endswith("never on earlier ones)")
        plain = but(of_tensorrt(sidecar), backend_version="10.16.1.11")
        assert len(problems(plain, ADA)) == 1


def test_a_back_end_that_is_not_installed(
    sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    first, *_ = obstacles(of_tensorrt(sidecar), ADA)
    assert first.about == "back end"
    assert first.problem.startswith("TensorRT is not installed")


def test_the_host_is_the_drivers_first_gpu() -> None:
    gpus = (Gpu("NVIDIA L4", (8, 9), 24 << 30), Gpu("NVIDIA A100", (8, 0), None))
    assert host_here(Driver("580.65.06", (13, 0), gpus)) == ADA
    assert host_here(Driver("580.65.06", (13, 0), ())).gpu is None
    assert host_here(Driver("470.1", (11, 4), (Gpu("old", None, None),))).target is None
