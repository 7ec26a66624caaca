"""One face for three backends: every name it uses is in the real bindings; options arrive."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.each import each
from tests.engine.conftest import ADA
from van_deploy.config import (
    BatchRange,
    BuildOptions,
    EngineSettings,
    HardwareCompatibility,
    Profiling,
)
from van_deploy.engine import backend as backend_module
from van_deploy.engine.backend import (
    RTX,
    TENSORRT,
    Backend,
    choose_backend,
    detect_host,
    device_index,
    load_backend,
)
from van_deploy.environment.hardware import RTX_TARGETS, Driver, Gpu
from van_deploy.errors import MissingDependency
from van_deploy.schema import validate

RECORDED = sorted((Path(__file__).parent / "bindings").glob("*.json"))
"""Each class of TensorRT's bindings with its members, and the module's under "", by version."""

PACKAGE = Path(backend_module.__file__).parents[1]
USERS = (*(PACKAGE / "engine").glob("*.py"), PACKAGE / "runners" / "tensorrt.py")
ONLY_RTX = {
    *("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
    *("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE", "cuda_graph_strategy"),
    *("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    "dynamic_shapes_kernel_specialization_strategy",
}


def test_every_name_used_is_in_tensorrt_10_and_11(rtx: Backend) -> None:
    """What RTX's bindings and the code have in common is in the others, but for RTX's own."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in USERS]
    used = {n.attr for tree in trees for n in tree if isinstance(n, ast.Attribute)}
    used |= {one.name for kind in (HardwareCompatibility, Profiling) for one in kind}
    used |= {"Builder", "Runtime", "FAST", "MODERATE", "FULL"}  # by getattr
    owners = {name: one for name, one in vars(rtx.module).items() if isinstance(one, type)}
    known = {*owners, *(name for owner in owners.values() for name in dir(owner))}
    assert {"set_flag", "STRONGLY_TYPED", "execute_async_v3", "combine"} <= used & known
    assert [path.stem for path in RECORDED] == ["10.16.1.11", "11.4.0.106"]
    for path in RECORDED:
        has = {name for members in json.loads(path.read_text()).values() for name in members}
        assert used & known - has - {"__init__"} == ONLY_RTX
    members = {name for name in dir(rtx.module.ComputeCapability) if name.startswith("SM")}
    assert members == {f"SM{target.removeprefix('sm_')}" for target in RTX_TARGETS}


def test_a_backend_that_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependency, match=r"cannot be loaded: libnvinfer\.so\.11"):
        load_backend(TENSORRT)


@each(
    ("targets", "gpu", "name"),
    [
        (("sm_89",), None, RTX),
        ((), None, RTX),
        (("sm_86", "sm_89"), "sm_89", RTX),  # one of them is not here
        ((), "sm_89", TENSORRT),
        (("sm_90",), "sm_90", TENSORRT),
        (("sm_90",), None, TENSORRT),
    ],
)
def test_what_auto_takes(
    rtx: Backend,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    gpu: str | None,
    name: str,
) -> None:
    present = ModuleType("tensorrt")
    present.__dict__["__version__"] = "11.4.0.106"
    monkeypatch.setitem(sys.modules, "tensorrt", present)
    assert choose_backend("auto", targets, gpu).name == name
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    if targets == ("sm_90",):
        with pytest.raises(MissingDependency, match="RTX does not build for sm_90") as caught:
            choose_backend("auto", targets, gpu)
        assert "pip install tensorrt`. It builds on a machine with" in caught.value.remedy
    else:
        assert choose_backend("auto", targets, gpu).name == RTX


def test_the_configuration_gets_what_is_asked(rtx: Backend) -> None:
    trt = rtx.module
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    asked = {"workspace": "256MiB", "optimization_level": 2, "profiling": "detailed"}
    asked |= {"targets": ["sm_86+sm_89"], "tf32": False}
    rtx.configure_(config, validate(EngineSettings, asked).of(("sm_86", "sm_89")))
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM89
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.builder_optimization_level == 2
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    rtx.configure_(config, BuildOptions(targets=("sm_75",)))
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM75


def test_the_host_is_one_of_the_drivers_gpus() -> None:
    gpus = (Gpu("NVIDIA L4", (8, 9), 24 << 30), Gpu("NVIDIA A100", (8, 0), None))
    driver = Driver("580.65.06", (13, 0), gpus)
    assert detect_host(driver) == ADA
    assert detect_host(driver, device_index("cuda:1")).target == "sm_80"
    assert detect_host(driver, 2).gpu is detect_host(Driver("580.65.06", (13, 0), ())).gpu is None


def test_a_table_becomes_the_options_of_each_plan_and_survives_json() -> None:
    table = {"targets": ["SM86", "8.0", "75", "sm_120+8.0"], "batch": ["1:2:4"]}
    settings = validate(EngineSettings, {**table, "workspace": "1GiB", "tf32": False})
    assert settings.targets == (("sm_86",), ("sm_80",), ("sm_75",), ("sm_80", "sm_120"))
    options = settings.of(("sm_89",), BatchRange(1, 3, 9))
    assert options.profiles == (BatchRange(1, 2, 4),)
    assert (options.workspace_bytes, options.tf32) == (1 << 30, False)
    assert validate(BuildOptions, options.as_dict()) == options
    assert EngineSettings().of((), BatchRange(1, 3, 9)).profiles == (BatchRange(1, 3, 9),)
    for written, size in {"1024": 1024, "4G": 4 << 30, "0.5 gb": 1 << 29, "1TiB": 1 << 40}.items():
        assert validate(BuildOptions, {"workspace": written}).workspace_bytes == size
