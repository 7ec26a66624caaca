"""One face for three backends: every name it uses is in the real bindings; options arrive."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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
    RTX_TARGETS,
    TENSORRT,
    Backend,
    backend_named,
    choose_backend,
    device_number,
    host_here,
)
from van_deploy.environment.hardware import Driver, Gpu
from van_deploy.errors import MissingDependency, UsageError
from van_deploy.schema import validated

RECORDED = sorted((Path(__file__).parent / "bindings").glob("*.json"))
PACKAGE = Path(backend_module.__file__).parents[1]
USERS = (*sorted((PACKAGE / "engine").glob("*.py")), PACKAGE / "runners" / "tensorrt.py")

COMMON_NAMES = """
(module): Builder DataType ILogger IProgressMonitor OnnxParser Runtime
Builder: build_serialized_network create_builder_config create_network create_optimization_profile
BuilderFlag: TF32 VERSION_COMPATIBLE
DataType: FLOAT HALF INT8 INT32 INT64 BOOL
EngineInspector: get_engine_information
HardwareCompatibilityLevel: AMPERE_PLUS NONE SAME_COMPUTE_CAPABILITY
IBuilderConfig: add_optimization_profile builder_optimization_level clear_flag create_timing_cache
IBuilderConfig: get_memory_pool_limit hardware_compatibility_level profiling_verbosity
IBuilderConfig: progress_monitor set_flag set_memory_pool_limit set_timing_cache
IBuilderConfig: tiling_optimization_level
ICudaEngine: create_engine_inspector create_execution_context device_memory_size_v2 num_layers
ICudaEngine: get_tensor_dtype get_tensor_mode get_tensor_name get_tensor_profile_shape
ICudaEngine: get_tensor_shape num_io_tensors num_optimization_profiles
IExecutionContext: execute_async_v3 get_tensor_shape infer_shapes set_input_shape
IExecutionContext: set_optimization_profile_async set_tensor_address
IHostMemory: nbytes
ILogger: Severity log
INetworkDefinition: get_input get_output num_inputs num_layers num_outputs
IOptimizationProfile: set_shape
IProgressMonitor: phase_finish phase_start step_complete
ITensor: dtype name shape
ITimingCache: combine serialize
LayerInformationFormat: JSON
MemoryPoolType: WORKSPACE
NetworkDefinitionCreationFlag: STRONGLY_TYPED
OnnxParser: get_error num_errors parse
ParserError: code desc node_name node_operator
ProfilingVerbosity: DETAILED LAYER_NAMES_ONLY NONE
Runtime: deserialize_cuda_engine engine_host_code_allowed
TensorIOMode: INPUT OUTPUT
TilingOptimizationLevel: FAST FULL MODERATE
"""
RTX_NAMES = f"""
ComputeCapability: {" ".join(RTX_TARGETS).replace("sm_", "SM")}
CudaGraphStrategy: DISABLED WHOLE_GRAPH_CAPTURE
DynamicShapesKernelSpecializationStrategy: EAGER
IBuilderConfig: num_compute_capabilities set_compute_capability
ICudaEngine: create_runtime_config
IRuntimeConfig: cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy
Runtime: get_engine_validity
"""
"""The bindings' names this package uses: a class, and members of it."""


def wanted(backend: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in (COMMON_NAMES + RTX_NAMES * (backend == RTX)).split("\n"):
        owner, _, members = line.partition(": ")
        found.setdefault(owner.replace("(module)", ""), set()).update(members.split())
    return found


def missing(backend: str, has: dict[str, list[str]]) -> set[str]:
    return {
        f"{owner}.{member}"
        for owner, members in wanted(backend).items()
        for member in members - set(has.get(owner, ()))
    }


def test_every_name_used_is_in_tensorrt_10_and_11() -> None:
    assert [path.stem for path in RECORDED] == ["10.16.1.11", "11.4.0.106"]
    for has in (json.loads(path.read_text()) for path in RECORDED):
        assert missing(TENSORRT, has) == set()
        assert "ComputeCapability.SM89" in missing(RTX, has), "the names of RTX are its own"


def test_every_name_used_is_in_rtx_with_its_targets_and_no_others(rtx: Backend) -> None:
    has = {"": dir(rtx.module)}
    has |= {owner: dir(getattr(rtx.module, owner, None)) for owner in wanted(RTX) if owner}
    assert missing(RTX, has) == set()
    members = {name for name in dir(rtx.module.ComputeCapability) if name.startswith("SM")}
    assert members == {f"SM{target.removeprefix('sm_')}" for target in RTX_TARGETS}


@each("path", USERS)
def test_names_taken_from_the_bindings_are_listed(path: Path) -> None:
    """Every ``trt.X`` and ``trt.X.Y`` in the code is in the list that is compared."""
    listed = wanted(RTX)
    everywhere = set().union(*listed.values())
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            for prefix in ("trt.", "self.trt.", "backend.module.", "self.module."):
                if text.startswith(prefix):
                    used.add(text.removeprefix(prefix).split("(")[0])
    owners = {owner for owner in listed if owner}
    for text in used - {"__version__"}:
        first, _, rest = text.partition(".")
        assert first in owners | listed[""], text
        assert not rest or rest == "__init__" or rest in everywhere, text


def test_a_backend_that_is_not_known_not_installed_or_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no backend 'openvino'"):
        backend_named("openvino")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"^TensorRT is not installed") as absent:
        backend_named(TENSORRT)
    assert "pip install tensorrt`" in absent.value.remedy
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependency, match=r"does not load: libnvinfer\.so\.11"):
        backend_named(TENSORRT)


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
        assert "on a machine with that GPU" in caught.value.remedy
    else:
        assert choose_backend("auto", targets, gpu).name == RTX


def test_the_configuration_gets_what_is_asked(rtx: Backend) -> None:
    assert rtx.label == f"TensorRT for RTX {rtx.release}"
    assert rtx.cuda in {12, 13}
    trt = rtx.module
    config = trt.Builder(trt.Logger(trt.Logger.ERROR)).create_builder_config()
    options = BuildOptions(
        targets=("sm_86", "sm_89"),
        workspace_bytes=1 << 28,
        optimization_level=2,
        tf32=False,
        profiling=Profiling.DETAILED,
    )
    rtx.configure_(config, options)
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
    assert host_here(driver) == ADA
    assert host_here(driver, device_number("cuda:1")).target == "sm_80"
    assert host_here(driver, 2).gpu is host_here(Driver("580.65.06", (13, 0), ())).gpu is None


def test_a_table_becomes_the_options_of_each_plan_and_survives_json() -> None:
    spellings = ["sm_89", "SM86", "8.0", "75", "sm_120+8.0"]
    table = {"targets": spellings, "batch": ["1:2:4"], "workspace": "1GiB", "tf32": False}
    settings = validated(EngineSettings, table)
    targets = [("sm_89",), ("sm_86",), ("sm_80",), ("sm_75",), ("sm_80", "sm_120")]
    assert settings.targets == tuple(targets)
    options = settings.of(("sm_89",))
    assert options == BuildOptions(
        targets=("sm_89",), profiles=(BatchRange(1, 2, 4),), workspace_bytes=1 << 30, tf32=False
    )
    level = HardwareCompatibility.AMPERE_PLUS
    more = options.changed(hardware_compatibility=level, version_compatible=True)
    assert validated(BuildOptions, more.as_dict()) == more
    own = EngineSettings().of(("sm_86",), BatchRange(1, 3, 9))
    assert own == BuildOptions(targets=("sm_86",), profiles=(BatchRange(1, 3, 9),))
    for written, size in {"1024": 1024, "4G": 4 << 30, "0.5 gb": 1 << 29, "1TiB": 1 << 40}.items():
        assert validated(BuildOptions, {"workspace": written}).workspace_bytes == size


@each(
    "options",
    [
        *({"workspace_bytes": size} for size in ("", "four", "4 elephants", "-1G", "1e3", 0)),
        *({"targets": ("sm_89", text)} for text in ("", "ada", "sm_", "sm_8", "sm_86+", "8.9")),
        *({"optimization_level": level} for level in (6, -1)),
        *({"profiles": (text,)} for text in ("8:4:2", "1:2")),
        {"tf23": True},
    ],
)
def test_what_no_backend_could_do(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EngineSettings(**options)
