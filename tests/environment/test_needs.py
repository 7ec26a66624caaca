"""What a task needs, judged on this machine and on variations of it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from tests.conftest import Cli
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.environment.machine import Environment, environment_here
from van_deploy.environment.needs import Need, abilities, require
from van_deploy.environment.packages import (
    Installed,
    cuda_version_of,
    execution_providers,
    pip_command,
)
from van_deploy.environment.trials import tried
from van_deploy.errors import MissingDependency

L4 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100", (9, 0), 80 * 2**30),))
PIP = pip_command()


@pytest.fixture(scope="module")
def here() -> Environment:
    return environment_here(Path.cwd())


def varied(environment: Environment, driver: Driver | None, **state: Installed) -> Environment:
    """Return the environment with another driver and some components replaced."""
    components = tuple(
        state.get(item.component.name.replace("-", "_"), item) for item in environment.components
    )
    return dataclasses.replace(environment, driver=driver, components=components)


def problem(environment: Environment, task: str) -> str | None:
    shortfall = {ability.task: ability.shortfall for ability in abilities(environment)}[task]
    return shortfall.problem if shortfall else None


def test_versions_are_those_of_the_modules_themselves(here: Environment) -> None:
    import onnxruntime
    import torch

    assert here.installed("torch").version == torch.__version__.partition("+")[0] or (
        here.installed("torch").version == torch.__version__
    )
    assert here.installed("onnxruntime").version == onnxruntime.__version__
    assert here.providers == tuple(onnxruntime.get_available_providers())
    assert cuda_version_of("torch") == torch.version.cuda
    assert cuda_version_of("onnxruntime") == (getattr(onnxruntime, "cuda_version", "") or None)
    assert "CPUExecutionProvider" in execution_providers()


def test_no_component_is_installed_and_broken(here: Environment) -> None:
    assert [item for item in here.components if item.fault] == []


def test_an_unknown_component_is_a_key_error(here: Environment) -> None:
    with pytest.raises(KeyError, match="tensorflow"):
        here.installed("tensorflow")


def test_everything_missing_is_told_at_once(here: Environment) -> None:
    absent = Installed(here.installed("ray").component, None, None, None)
    with pytest.raises(MissingDependency) as caught:
        require(varied(here, None, ray=absent), [Need.RAY, Need.GPU, Need.RAY])
    assert str(caught.value) == (
        "Required but not here: ray is not installed; no NVIDIA driver answers.\n"
        f"Install it with `{PIP} install ray`.\n"
        "Run this on a machine with an NVIDIA GPU and its driver."
    )


def test_what_is_here_can_be_required(here: Environment) -> None:
    require(here, [Need.ONNXRUNTIME])
    require(varied(here, L4), [Need.GPU])


def test_a_package_that_does_not_load_does_not_count(here: Environment) -> None:
    broken = dataclasses.replace(here.installed("onnxruntime"), fault="libcudart.so.13: not found")
    with pytest.raises(MissingDependency, match="installed but does not load"):
        require(varied(here, None, onnxruntime=broken), [Need.ONNXRUNTIME])


def test_a_driver_without_gpus_is_no_gpu(here: Environment) -> None:
    with pytest.raises(MissingDependency, match="the NVIDIA driver sees no GPU"):
        require(varied(here, Driver("580.65.06", (13, 0), ())), [Need.GPU])


def test_cuda_provider_needs_the_package_and_the_gpu(here: Environment) -> None:
    with_provider = dataclasses.replace(here, providers=("CUDAExecutionProvider",))
    require(varied(with_provider, L4), [Need.CUDA_PROVIDER])
    with pytest.raises(MissingDependency, match="no NVIDIA driver answers"):
        require(varied(with_provider, None), [Need.CUDA_PROVIDER])
    without = dataclasses.replace(here, providers=("CPUExecutionProvider",))
    with pytest.raises(MissingDependency, match=r"onnxruntime-gpu\[cuda,cudnn\]"):
        require(varied(without, L4), [Need.CUDA_PROVIDER])


def test_tensorrt_for_rtx_builds_without_a_gpu_and_runs_on_those_it_serves(
    here: Environment,
) -> None:
    component = here.installed("tensorrt-rtx").component
    rtx = Installed(component, "tensorrt-rtx-cu13", "1.7.1.116", None)
    task = "run engines of TensorRT for RTX"
    without_gpu = varied(here, None, tensorrt_rtx=rtx)
    assert problem(without_gpu, "build engines with TensorRT for RTX") is None
    assert problem(without_gpu, task) == "no NVIDIA driver answers"
    assert problem(varied(here, L4, tensorrt_rtx=rtx), task) is None
    assert problem(varied(here, H100, tensorrt_rtx=rtx), task) == (
        "TensorRT for RTX does not serve NVIDIA H100 (SM90)"
    )


def test_doctor_requires(cli: Cli) -> None:
    result = cli("doctor", "--require", "onnxruntime", "--json")
    assert result.exit_code == 0
    components = json.loads(result.stdout)["environment"]["components"]
    found = {item["component"]["name"]: item for item in components}
    assert found["onnxruntime"]["fault"] is None


def test_doctor_exits_with_3_for_what_is_missing(cli: Cli, here: Environment) -> None:
    missing = [n for n in Need if n.value in {"tensorrt", "openvino", "ray"}]
    absent = [n.value for n in missing if here.installed(n.value).version is None]
    if not absent:
        pytest.skip("every optional package is installed here")
    result = cli("doctor", "--require", absent[0])
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: Required but not here: {absent[0]} is not installed.\n"
        f"  Install it with `{PIP} install {absent[0]}`.\n"
    )
    assert re.search("here +task", result.stdout)


def test_doctor_refuses_an_unknown_requirement_with_the_list(cli: Cli) -> None:
    result = cli("doctor", "--require", "tensorflow")
    assert (result.exit_code, result.stdout) == (2, "")
    for need in Need:
        assert f"'{need.value}'" in result.stderr


def test_doctor_fits_100_columns_and_names_every_component(cli: Cli, here: Environment) -> None:
    lines = cli("doctor").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for item in here.components:
        assert any(item.component.name in line.split() for line in lines)


def test_what_failed_when_tried_cannot_be_done(here: Environment) -> None:
    """A CPU-only PyTorch beside a GPU, a provider without its libraries, a GPU in use."""
    trials = {
        "torch": "AssertionError: Torch not compiled with CUDA enabled",
        "ort-cuda": "libcudnn.so.9: cannot open shared object file: No such file or directory",
    }
    gpu = dataclasses.replace(varied(here, L4), providers=("CUDAExecutionProvider",), trials=trials)
    assert problem(gpu, "run PyTorch on a GPU") == (
        "PyTorch on the GPU, tried here, failed: "
        "AssertionError: Torch not compiled with CUDA enabled"
    )
    assert "libcudnn.so.9" in str(problem(gpu, "run them on a GPU with ONNX Runtime"))
    taken = dataclasses.replace(gpu, trials={"gpu": "The GPU cuda:0 is in use"})
    with pytest.raises(MissingDependency, match="taking memory on the GPU, tried here, failed"):
        require(taken, [Need.GPU])


def test_gpus_that_are_hidden_are_said_to_be(
    here: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    hidden = dataclasses.replace(L4, gpus=(), hidden=2)
    with pytest.raises(MissingDependency) as caught:
        require(varied(here, hidden), [Need.GPU])
    assert caught.value.message == (
        "Required but not here: CUDA_VISIBLE_DEVICES ('7') hides every GPU (2)."
    )


def test_trials_say_why_they_failed() -> None:
    programs = {
        "fine": "pass",
        "raises": "raise TypeError('factory function returned nullptr')",
        "logs": "import sys; sys.exit('E: Failed to load x with error: libcuda.so.1: missing.')",
        "dies": "import os; os._exit(7)",
    }
    assert tried(programs, programs) == {
        "fine": "",
        "raises": "TypeError: factory function returned nullptr",
        "logs": "libcuda.so.1: missing",
        "dies": "exit code 7",
    }


def test_what_can_run_here_was_tried(here: Environment) -> None:
    assert here.trials["ort-cpu"] == ""
    if here.installed("tensorrt-rtx").usable:
        assert here.trials["tensorrt-rtx"] == ""
