"""What a task needs, judged on this machine and on variations of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.environment.machine import Environment, environment_here, tried
from van_deploy.environment.needs import Need, diagnosis_of, require
from van_deploy.environment.packages import (
    cuda_version_of,
    execution_providers,
    imported_quietly,
    pip_command,
)
from van_deploy.errors import MissingDependency

L4 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100", (9, 0), 80 * 2**30),))
NO_GPUS, HIDDEN = Driver("580.65.06", (13, 0), ()), Driver("580.65.06", (13, 0), (), hidden=2)
CUDA = ("CUDAExecutionProvider",)
RTX = {"distribution": "tensorrt-rtx-cu13", "version": "1.7.1.116", "fault": None}
ABSENT = {"distribution": None, "version": None, "fault": None}
NO_DRIVER = "no NVIDIA driver answers"
PIP = pip_command()


@pytest.fixture(scope="module")
def here() -> Environment:
    return environment_here(Path.cwd())


def varied(
    environment: Environment, driver: Driver | None, components: dict[str, Any], **changes: Any
) -> Environment:
    """Return the environment with another driver and some components replaced."""
    now = tuple(
        dataclasses.replace(item, **components.get(item.component.name, {}))
        for item in environment.components
    )
    return dataclasses.replace(environment, driver=driver, components=now, **changes)


def test_versions_are_those_of_the_modules_themselves(here: Environment) -> None:
    import onnxruntime
    import torch

    version = here.installed("torch").version
    assert version in (torch.__version__, torch.__version__.partition("+")[0])
    assert here.installed("onnxruntime").version == onnxruntime.__version__
    assert here.providers == tuple(onnxruntime.get_available_providers()) == execution_providers()
    assert cuda_version_of("torch") == torch.version.cuda
    assert cuda_version_of("onnxruntime") == (getattr(onnxruntime, "cuda_version", "") or None)
    assert [item for item in here.components if item.fault] == []
    assert here.trials["ort-cpu"] == "", "what can run here was tried"
    assert here.trials.get("tensorrt-rtx", "") == ""
    assert ("tensorrt-rtx" in here.trials) == here.installed("tensorrt-rtx").usable


RUN_RTX, RUN_ORT = "run engines of TensorRT for RTX", "run them on a GPU with ONNX Runtime"


@each(
    ("wanted", "driver", "changes", "problem"),
    [
        (Need.ONNXRUNTIME, None, {}, None),
        (Need.GPU, L4, {}, None),
        (Need.GPU, NO_GPUS, {}, "the NVIDIA driver sees no GPU"),
        (Need.GPU, HIDDEN, {}, "CUDA_VISIBLE_DEVICES ('7') hides every GPU (2)"),
        (
            Need.GPU,
            L4,
            {"trials": {"gpu": "in use"}},
            "taking memory on the GPU, tried here, failed",
        ),
        (Need.CUDA_PROVIDER, L4, {}, None),
        (Need.CUDA_PROVIDER, None, {}, NO_DRIVER),
        (Need.CUDA_PROVIDER, L4, {"providers": ()}, "ONNX Runtime has no CUDAExecutionProvider"),
        ("build engines with TensorRT for RTX", None, {}, None),
        (RUN_RTX, None, {}, NO_DRIVER),
        (RUN_RTX, L4, {}, None),
        (RUN_RTX, H100, {}, "TensorRT for RTX does not serve NVIDIA H100 (sm_90)"),
        (
            *("run PyTorch on a GPU", L4, {"trials": {"torch": "not compiled with CUDA"}}),
            "PyTorch on the GPU, tried here, failed: not compiled with CUDA",
        ),
        (
            *(RUN_ORT, L4, {"trials": {"ort-cuda": "libcudnn.so.9: missing"}}),
            "CUDAExecutionProvider, tried here, failed: libcudnn.so.9: missing",
        ),
    ],
)
def test_what_can_be_required_and_done(
    here: Environment,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Need | str,
    driver: Driver | None,
    changes: dict[str, Any],
    problem: str | None,
) -> None:
    """A CPU-only PyTorch beside a GPU, a provider without its libraries: they were tried."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    given = {"providers": CUDA, "trials": {}, **changes}
    found = varied(here, driver, {"tensorrt-rtx": RTX}, **given)
    if isinstance(wanted, Need):
        refused = contextlib.nullcontext() if problem is None else pytest.raises(MissingDependency)
        with refused as caught:
            require(found, [wanted])
        told = caught.value.message if caught else None
        assert caught is None or caught.value.remedy
    else:
        shortfalls = {able.task: able.shortfall for able in diagnosis_of(found).abilities}
        told = getattr(shortfalls[wanted], "problem", None)
    assert (problem is None) == (told is None)
    assert problem is None or problem in str(told)


def test_everything_missing_is_told_at_once(here: Environment) -> None:
    broken = {"onnxruntime": {"fault": "libcudart.so.13: not found"}}
    environment = varied(here, None, {"ray": ABSENT, **broken})
    with pytest.raises(MissingDependency) as caught:
        require(environment, [Need.RAY, Need.GPU, Need.ONNXRUNTIME, Need.RAY])
    assert caught.value.message == (
        f"Required but not here: ray is not installed; {NO_DRIVER}; onnxruntime is installed but "
        "does not load (libcudart.so.13: not found)."
    )
    assert caught.value.remedy.splitlines()[:2] == [
        f"Install it with `{PIP} install ray`.",
        "Run this on a machine with an NVIDIA GPU and its driver.",
    ]


def test_doctor_fits_100_columns_and_names_every_component(cli: Cli, here: Environment) -> None:
    lines = cli("doctor").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for item in here.components:
        assert any(item.component.name in line.split() for line in lines)


def test_doctor_requires(cli: Cli, here: Environment) -> None:
    result = cli("doctor", "--require", "onnxruntime", "--json")
    assert result.exit_code == 0
    components = json.loads(result.stdout)["environment"]["components"]
    found = {item["component"]["name"]: item for item in components}
    assert found["onnxruntime"]["fault"] is None
    unknown = cli("doctor", "--require", "tensorflow")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert all(f"'{need.value}'" in unknown.stderr for need in Need)
    absent = [n for n in ("tensorrt", "openvino", "ray") if here.installed(n).version is None]
    if absent:
        lacking = cli("doctor", "--require", absent[0])
        assert lacking.exit_code == 3
        assert lacking.stderr == (
            f"error: Required but not here: {absent[0]} is not installed.\n"
            f"  Install it with `{PIP} install {absent[0]}`.\n"
        )
        assert re.search("here +task", lacking.stdout)


def test_trials_say_why_they_failed() -> None:
    programs = {
        "fine": "pass",
        "raises": "raise TypeError('factory function returned nullptr')",
        "logs": "import sys; sys.exit('E: Failed to load x with error: libcuda.so.1: missing.')",
        "dies": "import os; os._exit(7)",
    }
    assert tried(programs) == {
        "fine": "",
        "raises": "TypeError: factory function returned nullptr",
        "logs": "libcuda.so.1: missing",
        "dies": "exit code 7",
    }


def test_openvino_is_imported_with_a_stand_in_for_its_reporter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenVINO 2026.4 resolves www.google-analytics.com when it is imported otherwise."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    code = (
        "import sys\n"
        "asked = []\n"
        "sys.addaudithook(lambda e, d: asked.append(d[0]) if e == 'socket.getaddrinfo' else None)\n"
        "from van_deploy.environment.packages import imported_quietly\n"
        "import time\n"
        "print(bool(imported_quietly('openvino').__version__))\n"
        "time.sleep(0.5)\n"  # reports are sent from a thread
        "print(asked, 'openvino_telemetry' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout == "True\n[] False\n"


def test_a_reporter_that_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError):
        imported_quietly("there_is_no_such_module")
    assert "openvino_telemetry" not in sys.modules
    mine = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", mine)
    assert imported_quietly("json").__name__ == "json"
    assert sys.modules["openvino_telemetry"] is mine


def test_ray_is_asked_not_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from van_deploy.ray_tasks import require_ray

    if find_spec("ray") is None:
        pytest.skip("ray is not installed (pip install 'van-deploy[ray]')")
    for before, after in ((None, "0"), ("1", "1")):
        monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
        if before:
            monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", before)
        require_ray()
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == after
