"""The interface to TensorRT 10, 11 and RTX: names of the real bindings, options, and selection."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.each import each
from tests.engine.conftest import ADA
from van_deploy import config
from van_deploy.config import BuildOptions, EngineSettings
from van_deploy.engine import backend
from van_deploy.engine.backend import RTX, TENSORRT, Backend, detect_host
from van_deploy.environment.hardware import RTX_TARGETS, Driver, Gpu
from van_deploy.errors import MissingDependency
from van_deploy.schema import validate

# Each class of the bindings of a TensorRT version with its members; "" is the module.
BINDINGS = sorted((Path(__file__).parent / "bindings").glob("*.json"))

PACKAGE = Path(backend.__file__).parents[1]
MODULES = (*(PACKAGE / "engine").glob("*.py"), PACKAGE / "runners" / "tensorrt.py")
ONLY_RTX = {
    *("ComputeCapability", "num_compute_capabilities", "set_compute_capability"),
    *("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE", "cuda_graph_strategy"),
    *("DynamicShapesKernelSpecializationStrategy", "EAGER"),
    "dynamic_shapes_kernel_specialization_strategy",
}


def test_all_used_names_exist_in_tensorrt_10_and_11(rtx: Backend) -> None:
    """Names that both RTX's bindings and the code have exist in the others, except RTX's own."""
    trees = [ast.walk(ast.parse(path.read_text())) for path in MODULES]
    used = {n.attr for tree in trees for n in tree if isinstance(n, ast.Attribute)}
    used |= {one.name for kind in (config.HardwareCompatibility, config.Profiling) for one in kind}
    used |= {"Builder", "Runtime", "FAST", "MODERATE", "FULL"}  # by getattr
    classes = {name: one for name, one in vars(rtx.module).items() if isinstance(one, type)}
    known = {*classes, *(name for one in classes.values() for name in dir(one))}
    assert {"set_flag", "STRONGLY_TYPED", "execute_async_v3", "combine"} <= used & known
    assert [path.stem for path in BINDINGS] == ["10.16.1.11", "11.4.0.106"]
    for path in BINDINGS:
        names = {name for members in json.loads(path.read_text()).values() for name in members}
        assert used & known - names - {"__init__"} == ONLY_RTX
    members = {name for name in dir(rtx.module.ComputeCapability) if name.startswith("SM")}
    assert members == {f"SM{target.removeprefix('sm_')}" for target in RTX_TARGETS}


def test_backend_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependency, match=r"cannot be loaded: libnvinfer\.so\.11"):
        backend.load_backend(TENSORRT)


BACKENDS = [
    (("sm_89",), None, RTX),
    ((), None, RTX),
    (("sm_86", "sm_89"), "sm_89", RTX),  # one of them is not in this machine
    ((), "sm_89", TENSORRT),
    (("sm_90",), "sm_90", TENSORRT),
    (("sm_90",), None, TENSORRT),
]


@each("targets, gpu, name", BACKENDS)
def test_automatic_backend(rtx: Backend, monkeypatch: pytest.MonkeyPatch, **case: Any) -> None:
    targets, gpu, name = case.values()
    tensorrt = ModuleType("tensorrt")
    tensorrt.__dict__["__version__"] = "11.4.0.106"
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    assert backend.choose_backend("auto", targets, gpu).name == name
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    if targets == ("sm_90",):
        with pytest.raises(MissingDependency, match="RTX does not build for sm_90") as caught:
            backend.choose_backend("auto", targets, gpu)
        assert "pip install tensorrt`. It builds on a machine with" in caught.value.remedy
    else:
        assert backend.choose_backend("auto", targets, gpu).name == RTX


def test_options_are_applied_to_the_builder_configuration(rtx: Backend) -> None:
    trt = rtx.module
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    table = {"workspace": "0.25 gb", "optimization_level": 2, "profiling": "detailed"}
    table |= {"targets": ["SM89+8.6", "75"], "tf32": False, "precisions": ["fp16"]}
    settings = validate(EngineSettings, table)
    assert settings.targets == (("sm_86", "sm_89"), ("sm_75",))
    rtx.configure_(config, settings.of(settings.targets[0]))
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM89
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.builder_optimization_level == 2
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    rtx.configure_(config, BuildOptions(targets=("sm_75",)))
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM75


def test_host_has_the_selected_gpu_of_the_driver() -> None:
    gpus = (Gpu("NVIDIA L4", (8, 9), 24 << 30), Gpu("NVIDIA A100", (8, 0), None))
    driver = Driver("580.65.06", (13, 0), gpus)
    assert detect_host(driver) == ADA
    assert detect_host(driver, 1).target == "sm_80"
    assert detect_host(driver, 2).gpu is detect_host(Driver("580.65.06", (13, 0), ())).gpu is None
