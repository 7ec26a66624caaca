"""One face for three back ends, and every name it uses checked against the real bindings."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.each import each
from van_deploy.config import BuildOptions, Profiling
from van_deploy.engine import backend as backend_module
from van_deploy.engine.backend import (
    RTX,
    RTX_TARGETS,
    TENSORRT,
    Backend,
    backend_named,
    choose_backend,
)
from van_deploy.errors import MissingDependency, UsageError

RECORDED = sorted((Path(__file__).parent / "bindings").glob("*.json"))
PACKAGE = Path(backend_module.__file__).parents[1]
USERS = (*sorted((PACKAGE / "engine").glob("*.py")), PACKAGE / "runners" / "plan.py")

COMMON_NAMES: Mapping[str, tuple[str, ...]] = {
    "": ("Builder", "DataType", "ILogger", "IProgressMonitor", "OnnxParser", "Runtime"),
    "Builder": (
        *("build_serialized_network", "create_builder_config", "create_network"),
        "create_optimization_profile",
    ),
    "BuilderFlag": ("TF32", "VERSION_COMPATIBLE"),
    "DataType": ("FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL"),
    "EngineInspector": ("get_engine_information",),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS", "NONE", "SAME_COMPUTE_CAPABILITY"),
    "IBuilderConfig": (
        *("add_optimization_profile", "builder_optimization_level", "clear_flag"),
        *("create_timing_cache", "get_memory_pool_limit", "hardware_compatibility_level"),
        *("profiling_verbosity", "progress_monitor", "set_flag", "set_memory_pool_limit"),
        *("set_timing_cache", "tiling_optimization_level"),
    ),
    "ICudaEngine": (
        *("create_engine_inspector", "create_execution_context", "device_memory_size_v2"),
        *("get_tensor_dtype", "get_tensor_mode", "get_tensor_name", "get_tensor_profile_shape"),
        *("get_tensor_shape", "num_io_tensors", "num_layers", "num_optimization_profiles"),
    ),
    "IExecutionContext": (
        *("execute_async_v3", "get_tensor_shape", "infer_shapes", "set_input_shape"),
        *("set_optimization_profile_async", "set_tensor_address"),
    ),
    "IHostMemory": ("nbytes",),
    "ILogger": ("Severity", "log"),
    "INetworkDefinition": ("get_input", "get_output", "num_inputs", "num_layers", "num_outputs"),
    "IOptimizationProfile": ("set_shape",),
    "IProgressMonitor": ("phase_finish", "phase_start", "step_complete"),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("combine", "serialize"),
    "LayerInformationFormat": ("JSON",),
    "MemoryPoolType": ("WORKSPACE",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("get_error", "num_errors", "parse"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "ProfilingVerbosity": ("DETAILED", "LAYER_NAMES_ONLY", "NONE"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "TilingOptimizationLevel": ("FAST", "FULL", "MODERATE"),
}
RTX_NAMES: Mapping[str, tuple[str, ...]] = {
    "ComputeCapability": tuple(name.replace("sm_", "SM") for name in RTX_TARGETS),
    "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        *("create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"),
        "dynamic_shapes_kernel_specialization_strategy",
    ),
    "Runtime": ("get_engine_validity",),
}
NAMES: Mapping[str, tuple[Mapping[str, tuple[str, ...]], ...]] = {
    TENSORRT: (COMMON_NAMES,),
    RTX: (COMMON_NAMES, RTX_NAMES),
}
"""The bindings' names this package uses, by back end: class, then members ("" for the module)."""


def wanted(back_end: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for names in NAMES[back_end]:
        for owner, members in names.items():
            found.setdefault(owner, set()).update(members)
    return found


def missing(back_end: str, has: dict[str, list[str]]) -> set[str]:
    return {
        f"{owner}.{member}"
        for owner, members in wanted(back_end).items()
        for member in members - set(has.get(owner, ()))
    }


def test_the_bindings_of_10_and_11_are_recorded() -> None:
    assert [path.stem for path in RECORDED] == ["10.16.1.11", "11.4.0.106"]


@each("path", RECORDED)
def test_every_name_used_is_in_tensorrt(path: Path) -> None:
    assert missing(TENSORRT, json.loads(path.read_text())) == set()


@each("path", RECORDED)
def test_the_names_of_rtx_are_not_in_tensorrt(path: Path) -> None:
    has = json.loads(path.read_text())
    absent = missing(RTX, has)
    assert "ComputeCapability.SM89" in absent
    assert "IBuilderConfig.num_compute_capabilities" in absent
    assert "IRuntimeConfig.cuda_graph_strategy" in absent


def test_every_name_used_is_in_rtx(rtx: Backend) -> None:
    has = {"": dir(rtx.module)}
    has |= {owner: dir(getattr(rtx.module, owner, None)) for owner in wanted(RTX) if owner}
    assert missing(RTX, has) == set()


def test_rtx_builds_for_these_targets_and_no_others(rtx: Backend) -> None:
    members = {name for name in dir(rtx.module.ComputeCapability) if name.startswith("SM")}
    assert members == set(RTX_NAMES["ComputeCapability"])
    assert {f"SM{target.removeprefix('sm_')}" for target in RTX_TARGETS} == members


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


def test_an_unknown_back_end() -> None:
    with pytest.raises(UsageError) as caught:
        backend_named("openvino")
    assert caught.value.message == "There is no back end 'openvino'."
    assert caught.value.remedy == "Choose one of: tensorrt, tensorrt-rtx."


def test_a_back_end_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependency, match=r"^TensorRT is not installed") as caught:
        backend_named(TENSORRT)
    assert "pip install tensorrt`" in caught.value.remedy or "pip" in caught.value.remedy


def test_a_back_end_whose_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependency) as caught:
        backend_named(TENSORRT)
    assert caught.value.message == (
        "TensorRT is installed but does not load: libnvinfer.so.11: cannot open shared object file."
    )


def test_version_and_cuda(rtx: Backend) -> None:
    assert rtx.version.startswith(rtx.release + ".")
    assert rtx.label == f"TensorRT for RTX {rtx.release}"
    assert rtx.cuda in {12, 13}


@each(("targets", "gpu"), [(("sm_89",), None), ((), None), (("sm_86", "sm_89"), "sm_89")])
def test_auto_takes_rtx_where_the_gpu_is_not_the_whole_request(
    rtx: Backend, targets: tuple[str, ...], gpu: str | None
) -> None:
    assert choose_backend("auto", targets, gpu).name == rtx.name


def test_auto_names_tensorrt_for_what_rtx_does_not_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingDependency) as caught:
        choose_backend("auto", ("sm_90",), None)
    assert caught.value.message == (
        "TensorRT for RTX does not build for sm_90, and TensorRT is not installed."
    )
    assert "on a machine with that GPU" in caught.value.remedy


def test_auto_falls_back_to_rtx_on_a_gpu_it_serves(
    rtx: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    assert choose_backend("auto", (), "sm_89").name == rtx.name


def test_the_configuration_gets_what_is_asked(rtx: Backend) -> None:
    trt = rtx.module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    rtx.configure_(
        config,
        BuildOptions(
            targets=("sm_86", "sm_89"),
            workspace_bytes=1 << 28,
            optimization_level=2,
            tf32=False,
            profiling=Profiling.DETAILED,
        ),
    )
    assert config.num_compute_capabilities == 2
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM89
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 28
    assert config.builder_optimization_level == 2
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    rtx.configure_(config, BuildOptions(targets=("sm_75",)))
    assert config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM75
