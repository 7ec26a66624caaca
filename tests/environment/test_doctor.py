"""What is installed, what was tried, and what a task needs, here and on other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from van_deploy.environment import packages
from van_deploy.environment.doctor import (
    CUDA,
    PROBES,
    REQUIREMENTS,
    Environment,
    check_requirements,
    run_probes,
)
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.environment.packages import (
    find_components,
    import_without_telemetry,
    pip_command,
)

L4 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100", (9, 0), 80 * 2**30),))
NO_GPUS, HIDDEN = Driver("580.65.06", (13, 0), ()), Driver("580.65.06", (13, 0), (), hidden=2)
NO_DRIVER = "no NVIDIA driver was found"
PIP = pip_command()


@pytest.fixture(scope="module")
def here() -> Environment:
    return Environment()


def varied(here: Environment, driver: Driver | None, **changes: Any) -> Environment:
    """Return the environment with another driver, CUDA's provider, and TensorRT for RTX."""
    faults = changes.pop("faults", {})
    parts = {"tensorrt-rtx": {"version": "1.7", "fault": None}, "ray": {"version": None}, **faults}
    items = tuple(replace(item, **parts.get(item.name, {})) for item in here.components)
    given = {"providers": (CUDA,), "trials": {}, **changes}
    return replace(here, driver=driver, components=items, **given)


def test_versions_are_those_of_the_modules_themselves(here: Environment) -> None:
    import onnxruntime
    import torch

    versions = {item.name: item.version for item in here.components}
    assert versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert here.providers == tuple(onnxruntime.get_available_providers())
    assert here.torch_cuda == torch.version.cuda
    assert here.onnxruntime_cuda == (getattr(onnxruntime, "cuda_version", "") or None)
    assert [item for item in here.components if item.fault] == []
    tried_here = here.trials["tensorrt-rtx"] == ""
    assert tried_here == (versions["tensorrt-rtx"] is not None), "what can run here was tried"
    assert here.clashes == ()


RUN_RTX, RUN_ORT = "run engines of TensorRT for RTX", "run them on a GPU with ONNX Runtime"


@each(
    ("wanted", "driver", "changes", "problem"),
    [
        ("onnxruntime", None, {}, None),
        ("gpu", L4, {}, None),
        ("gpu", NO_GPUS, {}, "the NVIDIA driver found no GPU"),
        ("gpu", HIDDEN, {}, "CUDA_VISIBLE_DEVICES ('7') hides every GPU (2)"),
        (
            "gpu",
            L4,
            {"trials": {"gpu": "in use"}},
            "the test of gpu on this machine failed: in use",
        ),
        ("cuda-ep", L4, {}, None),
        ("cuda-ep", None, {}, NO_DRIVER),
        ("cuda-ep", L4, {"providers": ()}, "ONNX Runtime has no CUDAExecutionProvider"),
        ("build engines with TensorRT for RTX", None, {}, None),
        (RUN_RTX, None, {}, NO_DRIVER),
        (RUN_RTX, L4, {}, None),
        (RUN_RTX, H100, {}, "TensorRT for RTX does not support NVIDIA H100 (sm_90)"),
        ("run PyTorch on a GPU", L4, {"trials": {"torch-gpu": "no CUDA"}}, "failed: no CUDA"),
        ("export ONNX files", L4, {"trials": {"torch-gpu": "no CUDA"}}, None),
        (RUN_ORT, L4, {"trials": {"cuda-ep": "libcudnn.so.9"}}, "failed: libcudnn.so.9"),
        ("compile packages with Inductor", None, {}, "there is no C++ compiler 'no-such-compiler'"),
    ],
)
def test_what_can_be_required_and_done(
    here: Environment,
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    driver: Driver | None,
    changes: dict[str, Any],
    problem: str | None,
) -> None:
    """A CPU-only PyTorch beside a GPU, a provider without its libraries: they were tried."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = varied(here, driver, **changes)
    lack = found.find_issue(wanted) if wanted in REQUIREMENTS else found.abilities[wanted]
    assert (problem is None) == (lack is None)
    assert lack is None or (str(problem) in lack.problem and lack.remedy)


def test_doctor_tells_everything_and_what_is_missing_at_once(cli: Cli, here: Environment) -> None:
    broken = {"onnxruntime": {"fault": "libcudart.so.13: not found"}}
    error = check_requirements(
        varied(here, None, faults=broken), ["ray", "gpu", "onnxruntime", "ray"]
    )
    assert error is not None
    assert error.message == (
        f"Requirements not met: ray is not installed; {NO_DRIVER}; onnxruntime is installed but "
        "cannot be loaded (libcudart.so.13: not found)."
    )
    assert error.remedy.splitlines()[0] == f"Run `{PIP} install ray`."
    lines = cli("doctor").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for item in here.components:
        assert any(item.name in line.split() for line in lines)
    result = json.loads(cli("doctor", "--require", "onnxruntime", "--json").stdout)
    assert result["abilities"]["export ONNX files"] is None
    unknown = cli("doctor", "--require", "tensorflow")
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert all(need in unknown.stderr for need in REQUIREMENTS)
    if here.find_issue("tensorrt"):
        lacking = cli("doctor", "--require", "tensorrt")
        assert (lacking.exit_code, "export ONNX files" in lacking.stdout) == (3, True)
        assert f"`{PIP} install tensorrt`." in lacking.stderr


def test_trials_say_why_they_failed(here: Environment) -> None:
    log = "E: Failed to load x with error: libcuda.so.1: missing."
    trials = {
        "fine": ("sys", "m.path"),
        "raises": ("sys", "raise TypeError('factory function returned nullptr')"),
        "logs": ("sys", f"m.exit('{log}')"),
        "dies": ("os", "m._exit(7)"),
    }
    assert run_probes(trials) == {
        "fine": "",
        "raises": "TypeError: factory function returned nullptr",
        "logs": "libcuda.so.1: missing",
        "dies": "exit code 7",
    }
    if here.driver is None:  # they fail for want of a GPU, and not of what they import
        reasons = run_probes({name: PROBES[name] for name in ("gpu", "torch-gpu", "cuda-ep")})
        assert reasons["gpu"].startswith("CUDA finds no GPU here")
        assert not any("import" in why.lower() or "module" in why for why in reasons.values())


BOTH = "onnxruntime onnxruntime-gpu"


@each(
    ("installed", "torch_cuda", "ort_cuda", "problem", "remedy"),
    [
        ("onnxruntime tensorrt-rtx-cu13", "13.0", None, "", ""),
        (BOTH, "13.0", None, "are both", "--yes onnxruntime onnxruntime-gpu && {pip} install"),
        (BOTH, None, None, "are both", "install 'onnxruntime-gpu[cuda,cudnn]'"),
        ("tensorrt-cu12", "13.0", None, "is for CUDA 12", "install 'tensorrt-cu13'"),
        ("tensorrt-rtx-cu12", "13.0", None, "CUDA 12", "install 'tensorrt-rtx-cu13'"),
        ("tensorrt tensorrt-cu12", "12.8", None, "", ""),
        ("tensorrt-cu12", None, None, "", ""),
        ("onnxruntime-gpu", "13.0", "12.8", "is for CUDA 12.8", "Keep one"),
        ("onnxruntime-gpu", "13.2", "13.0", "", ""),
        ("tensorrt-cu12 tensorrt-cu13", "13.0", None, "are both", "'tensorrt-cu13'"),
    ],
)
def test_what_does_not_go_together(
    here: Environment,
    monkeypatch: pytest.MonkeyPatch,
    installed: str,
    torch_cuda: str | None,
    ort_cuda: str | None,
    problem: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(packages, "installed_version", dict.fromkeys(installed.split(), "1.0").get)
    monkeypatch.setattr(packages, "import_error", lambda module: None)
    found = replace(here, components=find_components(), driver=L4)
    clashes = replace(found, torch_cuda=torch_cuda, onnxruntime_cuda=ort_cuda).clashes
    assert len(clashes) == bool(problem)
    for clash in clashes:
        assert problem in clash.problem
        assert remedy.format(pip=PIP) in clash.remedy


def test_openvino_is_imported_with_a_stand_in_for_its_reporter() -> None:
    """OpenVINO 2026.4 resolves www.google-analytics.com when it is imported otherwise."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    code = (
        "import sys, time\n"
        "asked = []\n"
        "sys.addaudithook(lambda e, d: asked.append(d[0]) if e == 'socket.getaddrinfo' else None)\n"
        "from van_deploy.environment.packages import import_without_telemetry\n"
        "print(bool(import_without_telemetry('openvino').__version__))\n"
        "time.sleep(0.5)\n"  # reports are sent from a thread
        "print(asked, 'openvino_telemetry' in sys.modules)\n"
    )
    words, here = [sys.executable, "-c", code], {k: v for k, v in os.environ.items() if k != "CI"}
    assert subprocess.check_output(words, text=True, env=here) == "True\n[] False\n"


def test_a_reporter_that_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    with pytest.raises(ImportError):
        import_without_telemetry("there_is_no_such_module")
    assert "openvino_telemetry" not in sys.modules
    mine = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", mine)
    assert import_without_telemetry("json").__name__ == "json"
    assert sys.modules["openvino_telemetry"] is mine


def test_ray_is_asked_not_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from van_deploy.ray_tasks import require_ray

    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    for asked in ("0", "1"):
        require_ray()
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == asked
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")  # who wants it has it
