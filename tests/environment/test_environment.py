"""Packages and hardware of this machine, probes, requirements of tasks and package conflicts."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT, Cli
from tests.each import each
from van_deploy.environment import doctor, hardware, packages
from van_deploy.environment.doctor import CUDA, REQUIREMENTS, Environment
from van_deploy.environment.hardware import Cpu, Driver, Gpu, cpu, memory, nvidia_driver
from van_deploy.environment.hardware import peak_memory_bytes as peak_bytes
from van_deploy.environment.packages import import_without_telemetry, pip_command

L4 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA L4", (8, 9), 24 * 2**30),))
H100 = Driver("580.65.06", (13, 0), (Gpu("NVIDIA H100", (9, 0), 80 * 2**30),))
NO_GPUS, HIDDEN = Driver("580.65.06", (13, 0), ()), Driver("580.65.06", (13, 0), (), hidden=2)
NO_DRIVER = "no NVIDIA driver was found"
PIP = pip_command()


@pytest.fixture(scope="module")
def env() -> Environment:
    return Environment()


def with_driver(env: Environment, driver: Driver | None, **changes: Any) -> Environment:
    """Return an environment with another driver, CUDA's provider, RTX, and without Ray."""
    faults = changes.pop("faults", {})
    parts = {"tensorrt-rtx": {"version": "1.7", "fault": None}, "ray": {"version": None}, **faults}
    items = tuple(replace(item, **parts.get(item.name, {})) for item in env.components)
    fields = {"providers": (CUDA,), "trials": {}, **changes}
    return replace(env, driver=driver, components=items, **fields)


def test_package_that_ends_the_interpreter_is_named(tmp_path: Path) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "torch.py").write_text(crash)  # the first package that doctor imports
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    words = [sys.executable, "-m", "van_deploy", "doctor"]
    done = subprocess.run(words, env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGSEGV
    assert f'File "{tmp_path}/torch.py", line 1 in <module>' in done.stderr


def test_versions_are_those_of_the_imported_modules(env: Environment) -> None:
    import onnxruntime
    import torch

    versions = {item.name: item.version for item in env.components}
    assert versions["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert env.providers == tuple(onnxruntime.get_available_providers())
    assert env.torch_cuda == torch.version.cuda
    assert env.onnxruntime_cuda == (getattr(onnxruntime, "cuda_version", "") or None)
    assert [*(item for item in env.components if item.fault), *env.clashes] == []
    assert (env.trials["tensorrt-rtx"] == "") == (versions["tensorrt-rtx"] is not None)


def test_packages_that_cannot_be_imported_are_faults(
    env: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PyTorch that does not load is a fault too, and no damage ends ``doctor``."""
    monkeypatch.setitem(sys.modules, "timm", None)
    broken = replace(env, components=packages.find_components())
    issue = broken.abilities["export ONNX files"]
    assert issue is not None
    assert issue.problem.startswith("timm is installed but cannot be loaded (import of timm halted")
    monkeypatch.syspath_prepend(tmp_path)
    damages = ("raise ValueError('numpy.dtype size changed')", "x = (", "raise SystemExit(3)", "\0")
    for number, damage in enumerate(damages):
        (tmp_path / f"damaged{number}.py").write_text(damage)
        assert packages.import_error(f"damaged{number}")
    (tmp_path / "damaged-1.dist-info").mkdir()
    (tmp_path / "damaged-1.dist-info/METADATA").write_bytes(b"\xff")
    assert packages.installed_version("damaged") is None


RUN_RTX, RUN_ORT = "run engines of TensorRT for RTX", "run them on a GPU with ONNX Runtime"


NEEDS = [
    ("onnxruntime", None, {}, None),
    ("gpu", L4, {}, None),
    ("gpu", NO_GPUS, {}, "the NVIDIA driver found no GPU"),
    ("gpu", HIDDEN, {}, "CUDA_VISIBLE_DEVICES ('7') hides every GPU (2)"),
    ("gpu", L4, {"trials": {"gpu": "in use"}}, "test of gpu on this machine failed: in use"),
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
]


@each("name, driver, changes, problem", NEEDS)
def test_requirements(env: Environment, monkeypatch: pytest.MonkeyPatch, **case: Any) -> None:
    """Probes reveal a PyTorch without CUDA on a GPU machine, and a provider without libraries."""
    name, driver, changes, problem = case.values()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("CXX", "no-such-compiler")
    changed = with_driver(env, driver, **changes)
    issue = changed.find_issue(name) if name in REQUIREMENTS else changed.abilities[name]
    assert (problem is None) == (issue is None)
    assert issue is None or (str(problem) in issue.problem and issue.remedy)


def test_doctor_reports_everything_and_all_missing_requirements(cli: Cli, env: Environment) -> None:
    faults = {"onnxruntime": {"fault": "libcudart.so.13: not found"}}
    broken = with_driver(env, None, faults=faults)
    error = doctor.check_requirements(broken, ["ray", "gpu", "onnxruntime", "ray"])
    assert error is not None
    assert error.message == (
        f"Requirements not met: ray is not installed; {NO_DRIVER}; onnxruntime is installed but "
        "cannot be loaded (libcudart.so.13: not found)."
    )
    assert error.remedy.splitlines()[0] == f"Run `{PIP} install ray`."
    table = cli.passes("doctor")
    assert max(map(len, table.splitlines())) <= 100
    assert {item.name for item in env.components} <= set(table.split())
    abilities = cli.document("doctor --require onnxruntime")["abilities"]
    assert abilities["export ONNX files"] is None
    assert ", ".join(REQUIREMENTS) in cli.fails(2, "doctor --require tensorflow")
    if env.find_issue("tensorrt"):
        failed = cli("doctor --require tensorrt")
        assert (failed.exit_code, "export ONNX files" in failed.stdout) == (3, True)
        assert f"`{PIP} install tensorrt`." in failed.stderr


def test_probes_report_why_they_failed(env: Environment) -> None:
    log = "E: Failed to load x with error: libcuda.so.1: missing."
    cases = {
        ("sys", "m.path"): "",
        ("sys", "raise TypeError('returned nullptr')"): "TypeError: returned nullptr",
        ("sys", f"m.exit('{log}')"): "libcuda.so.1: missing",
        ("os", "m._exit(7)"): "exit code 7",
    }
    probes = {reason: probe for probe, reason in cases.items()}
    assert doctor.run_probes(probes) == {reason: reason for reason in probes}
    if env.driver is None:  # no import error
        names = ("gpu", "torch-gpu", "cuda-ep")
        reasons = doctor.run_probes({name: doctor.PROBES[name] for name in names})
        assert reasons["gpu"].startswith("CUDA finds no GPU here")
        assert not any("import" in why.lower() or "module" in why for why in reasons.values())


def test_gpus_are_not_hidden_where_cuda_does_not_start(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server of several H100 whose fabric manager does not run."""
    from cuda.bindings import driver

    def start(error: Any) -> tuple[Gpu, ...]:
        monkeypatch.setattr(driver, "cuInit", lambda _: (error,))
        monkeypatch.setattr(driver, "cuDeviceGetCount", lambda: (error, None))
        return hardware._visible_to_cuda([*H100.gpus])

    assert start(driver.CUresult.CUDA_ERROR_SYSTEM_NOT_READY) == H100.gpus
    assert start(driver.CUresult.CUDA_ERROR_NO_DEVICE) == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    issue = with_driver(env, HIDDEN).find_issue("gpu")
    assert issue is not None
    assert issue.problem == "CUDA can use none of the 2 GPUs that the NVIDIA driver lists"


BOTH = "onnxruntime onnxruntime-gpu"


INSTALLED = [
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
]


@each("installed, torch_cuda, ort_cuda, problem, remedy", INSTALLED)
def test_conflicts(env: Environment, monkeypatch: pytest.MonkeyPatch, **case: Any) -> None:
    installed, torch_cuda, ort_cuda, problem, remedy = case.values()
    monkeypatch.setattr(packages, "installed_version", dict.fromkeys(installed.split(), "1.0").get)
    monkeypatch.setattr(packages, "import_error", lambda module: None)
    changed = replace(env, components=packages.find_components(), driver=L4)
    clashes = replace(changed, torch_cuda=torch_cuda, onnxruntime_cuda=ort_cuda).clashes
    assert len(clashes) == bool(problem)
    for clash in clashes:
        assert problem in clash.problem
        assert remedy.format(pip=PIP) in clash.remedy


def test_openvino_is_imported_without_telemetry() -> None:
    """OpenVINO 2026.4 resolves www.google-analytics.com when it is imported otherwise."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    code = """
import sys, time
hosts = []
sys.addaudithook(lambda e, d: hosts.append(d[0]) if e == 'socket.getaddrinfo' else None)
from van_deploy.environment.packages import import_without_telemetry
print(bool(import_without_telemetry('openvino').__version__))
time.sleep(0.5)  # reports are sent from a thread
print(hosts, 'openvino_telemetry' in sys.modules)
"""
    command = [sys.executable, "-c", code]
    variables = {k: v for k, v in os.environ.items() if k != "CI"}
    assert subprocess.check_output(command, text=True, env=variables) == "True\n[] False\n"


def test_telemetry_that_was_imported_before_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("openvino_telemetry")
    for before in (None, module):
        monkeypatch.delitem(sys.modules, module.__name__, raising=False)
        if before:
            monkeypatch.setitem(sys.modules, module.__name__, before)
        with pytest.raises(ImportError):
            import_without_telemetry("there_is_no_such_module")
        assert sys.modules.get(module.__name__) is before


def test_usage_statistics_of_ray_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from van_deploy.ray_tasks import require_ray

    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    for value in ("0", "1"):
        require_ray()
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == value
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")  # a value set by the user is kept


def test_cpu_and_memory_of_this_process() -> None:
    processor, size = cpu(), memory()
    assert processor.name
    assert 2**28 < size.available_bytes <= size.total_bytes < 2**50
    assert 2**24 < peak_bytes() < size.total_bytes
    if sys.platform == "linux":
        flags, allowed = Path("/proc/cpuinfo").read_text().split(), os.sched_getaffinity(0)
        assert set(processor.features) <= set(flags)
        assert ("avx2" in processor.features) == ("avx2" in flags)
        os.sched_setaffinity(0, {min(allowed)})
        restricted = cpu()
        os.sched_setaffinity(0, allowed)
        assert restricted.cores_allowed == 1 <= processor.cores_allowed <= processor.cores
    for features, has in (("avx2 avx512_vnni", False), ("amx_bf16", True), ("asimddp bf16", True)):
        assert Cpu("a processor", 2, 2, tuple(features.split())).has_bfloat16 is has


@pytest.mark.gpu
def test_driver_agrees_with_nvidia_smi() -> None:
    driver = nvidia_driver()
    assert driver is not None
    query = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    expected = subprocess.check_output(["nvidia-smi", *query], text=True).splitlines()
    found = ((g.name, *(g.compute_capability or ()), driver.version) for g in driver.gpus)
    assert expected == ["{}, {}.{}, {}".format(*facts) for facts in found]
