"""Incompatible machines, unsupported options, verified sidecars, and `inspect`."""

import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.each import each
from tests.engine.conftest import ADA, AMPERE_PLUS, RTX_17, SM89, TENSORRT_11, Build, Plan
from tests.json_documents import edit_json
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine import compatibility, sidecar
from van_deploy.engine.backend import RTX, TENSORRT, Host, detect_host
from van_deploy.engine.inspect import Layer, layers_from_json
from van_deploy.engine.sidecar import PACKAGE_SCHEMA, PackageSidecar, sidecar_path
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256

NO_GPU = Host()
A100 = Host("NVIDIA A100", "sm_80", 80 << 30, "580.65.06", (13, 0))
H100 = Host("NVIDIA H100", "sm_90", None, "580.0", (13, 0))
TURING = Host("Tesla T4", "sm_75", 16 << 30, "580.65.06", (13, 0))
OLD = replace(ADA, driver="535.129.03", cuda=(11, 8))
VC = {"version_compatible": True}
TORCH = compatibility.torch_version()
Edit = Callable[[Path], object]


def by_tensorrt(version: str, **options: Any) -> dict[str, Any]:
    """Return the fields of a sidecar of another backend."""
    fields = {"backend_version": version, "options": BuildOptions(**options)}
    return {"backend": TENSORRT, **fields}


def package_sidecar(**changes: Any) -> PackageSidecar:
    names = ("name", "onnx_file", "onnx_sha256", "file_sha256", "built_on")
    fields: dict[str, Any] = {**dict.fromkeys(names, "p"), "schema": PACKAGE_SCHEMA}
    fields |= {"tf32": True, "max_autotune": False, "cpu_features": (), "file_bytes": 1}
    fields |= {"batch": BatchRange(1, 4, 8), "input_shape": (-1, 3, 32, 32), "build_seconds": 1.0}
    fields |= {"torch": TORCH, "device": "cuda", "targets": ("sm_90",), "precision": "fp16"}
    return PackageSidecar(**{**fields, **changes})


RTX_BUILT = {"backend_version": "1.7.1.116", "cuda": 13}
ON_CPU = {"device": "cpu", "targets": (platform.machine(),)}
MACHINES = [
    ({}, ADA, "", ""),
    ({"targets": ("sm_80", "sm_89")}, A100, "", ""),
    ({}, A100, "with TensorRT for RTX 1.7.1; this machine has sm_80 (NVIDIA A100)", "t sm_80`."),
    ({}, NO_GPU, "; no NVIDIA GPU was found on this machine", "Run it on a machine"),
    ({"backend_version": "1.2.0.54"}, ADA, "; installed is TensorRT for RTX 1.7.1", "RTX 1.2.0."),
    # another build of one release
    ({"backend_version": "1.7.1.1"}, ADA, "; installed is TensorRT for RTX 1.7.1.116", ""),
    ({}, OLD, "it needs CUDA 13, and driver 535.129.03 supports CUDA up to 11.8", "Update"),
    (by_tensorrt("11.4.0.106", **AMPERE_PLUS), A100, "", ""),
    (by_tensorrt("11.4.0.106", **AMPERE_PLUS), TURING, "for sm_80 and newer", "this machine."),
    (by_tensorrt("11.4.0.106"), A100, "this machine has sm_80", "Rebuild on this machine."),
    (by_tensorrt("10.16.1.11", **VC), ADA, "", ""),
    (by_tensorrt("11.5.0.1", **VC), ADA, "never on earlier ones)", "install TensorRT 11.5.0."),
    (by_tensorrt("10.16.1.11"), ADA, "; installed is TensorRT 11.4.0", "install TensorRT 10."),
    ({"device": "cuda"}, H100, "", ""),
    ({**ON_CPU, "cpu_features": cpu().features}, NO_GPU, "", ""),
    ({"torch": "2.0.1"}, H100, f"PyTorch 2.0.1; installed is {TORCH}", "install torch==2.0.1"),
    ({"device": "cuda"}, ADA, "it was compiled for sm_90; this machine has sm_89", "Rebuild"),
    ({"device": "cuda"}, NO_GPU, "compiled for sm_90; no NVIDIA GPU was found", ""),
    ({**ON_CPU, "cpu_features": ("amx_fp8",)}, NO_GPU, "and may use amx_fp8, which", ""),
    ({**ON_CPU, "targets": ("riscv64",)}, NO_GPU, "and may use riscv64, which", ""),
]


@each("changes, host, problem, remedy", MACHINES)
def test_machines_on_which_a_plan_or_a_package_runs(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, **case: Any
) -> None:
    """The installed backends are stand-ins that have only a version."""
    changes, host, problem, remedy = case.values()
    stand_ins = {RTX: RTX_17, TENSORRT: TENSORRT_11}
    monkeypatch.setattr(compatibility, "load_backend", stand_ins.__getitem__)
    if changes.keys() & {"device", "torch"}:
        tested: Any = package_sidecar(**changes)
    else:
        tested = plan.sidecar.model_copy(update={**RTX_BUILT, **changes})
    obstacles = compatibility.find_obstacles(tested, host)
    assert len(obstacles) == bool(problem)
    for obstacle in obstacles:
        assert problem in obstacle.problem
        assert remedy in obstacle.remedy


def test_error_lists_every_obstacle(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    older = plan.sidecar.model_copy(update={"backend_version": "1.2.0.54"})
    with pytest.raises(MissingDependency) as caught:
        compatibility.require_compatible(older, replace(A100, cuda=(11, 8)))
    assert caught.value.message.count(";") >= 3
    assert len(caught.value.remedy.splitlines()) == 3
    with pytest.raises(MissingDependency, match="The package 'p' does not run here"):
        compatibility.require_compatible(package_sidecar(), NO_GPU)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    other = plan.sidecar.model_copy(update=by_tensorrt("11.4.0.106"))
    first, *_ = compatibility.find_obstacles(other, ADA)
    assert first.problem.startswith("TensorRT is not installed")


OPTIONS = [
    (SM89, ADA, ""),
    (BuildOptions(**AMPERE_PLUS, workspace_bytes=24 << 30), ADA, ""),
    (SM89.with_changes(targets=()), NO_GPU, "builds on the GPU that will run the engine"),
    (SM89.with_changes(workspace_bytes=25 << 30), ADA, "of memory that NVIDIA L4 has"),
    # A level covers other GPUs only without a target, and RTX supports only its own targets.
    (SM89.with_changes(targets=("sm_90",)), ADA, "give --hardware-compatibility ampere-plus."),
    (SM89.with_changes(targets=("sm_75",)), ADA, "on that GPU, or use --backend tensorrt-rtx."),
]


@each("options, host, message", OPTIONS)
def test_unsupported_tensorrt_options(options: BuildOptions, host: Host, message: str) -> None:
    """Those of RTX are in ``tests/cli/test_build.py``."""
    if not message:
        compatibility.require_supported(TENSORRT_11, options, host)
        return
    with pytest.raises((UsageError, MissingDependency)) as caught:
        compatibility.require_supported(TENSORRT_11, options, host)
    assert message in str(caught.value)
    assert isinstance(caught.value, UsageError) == (host is ADA)


@pytest.mark.skipif(nvidia_driver() is not None, reason="measures RTX on a machine with no GPU")
def test_unsupported_rtx_plan(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.engine.build.require_supported", lambda *_: None)
    with pytest.raises(MissingDependency):
        build(tmp_path / "e.plan", SM89.with_changes(version_compatible=True))
    assert list(tmp_path.iterdir()) == []


def set_field(key: str, value: object) -> Edit:
    return lambda file: edit_json(sidecar_path(file), key, value)


def write_text(text: str) -> Edit:
    return lambda file: sidecar_path(file).write_text(text, encoding="latin-1")


def swap(file: Path) -> None:
    file.write_bytes(b"other" + file.read_bytes()[5:])


EDITS = [
    (lambda file: sidecar_path(file).unlink(), "has no sidecar"),
    (Path.unlink, "There is no engine"),
    (swap, "is not the (plan|package) of its sidecar"),
    (set_field("targets", ["sm_90"]), "was edited after it was written"),
    (set_field("sidecar_sha256", "0" * 64), "was edited after it was written"),
    (set_field("schema", "van-deploy/engine/1"), "has schema 'van-deploy/engine/1'"),
    (set_field("backend_version", "1.7x"), "backend_version"),
    *((write_text(text), "is damaged") for text in ("", "[]", "{}", "\xff")),
]


@each("edit, message", EDITS)
def test_unverified_files_are_refused(plan: Plan, tmp_path: Path, edit: Edit, message: str) -> None:
    copy = shutil.copytree(plan.path.parent, tmp_path / "copy") / plan.path.name
    assert sidecar.Sidecar.load(copy) == plan.sidecar
    file = tmp_path / "p-1.7.pt2"
    file.write_bytes(b"native code")
    package = package_sidecar(targets=("sm_89",), file_sha256=file_sha256(file))
    written = sidecar.write_sidecar(file, package)
    assert sidecar.PackageSidecar.load(file) == written
    for path, load in ((copy, sidecar.Sidecar.load), (file, sidecar.PackageSidecar.load)):
        edit(path)
        with pytest.raises(InputError, match=message) as caught:
            load(path)
        is_plan = path is copy
        assert ("--trust-engine" in caught.value.remedy) == ("no sidecar" in message and is_plan)


@pytest.mark.skipif(detect_host().gpu is not None, reason="on a GPU the plan may load")
def test_inspect_shows_sidecar_and_log(cli: Cli, plan: Plan) -> None:
    facts, text = plan.sidecar, " ".join(cli("inspect", plan.path).stdout.split())
    for words in (
        f"sha256 {facts.plan_sha256}",
        f"backend tensorrt-rtx version {facts.backend_version}",
        "input images float N 3 32 32",
        "output logits float N 10",
        "SKIPPED layers: only the engine's own GPU can load it",
        "After dead-layer removal: ",
        "Total Weights Memory",
    ):
        assert words in text, words
    (document,) = cli.document("inspect", plan.path)
    assert (document["plan_sha256"], document["layers"]) == (facts.plan_sha256, [])
    assert document["layers_skipped"].endswith("no NVIDIA GPU was found on this machine")


def test_trust_engine_is_only_for_missing_sidecars(cli: Cli, plan: Plan, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plan.path, tmp_path))
    assert "--trust-engine" in cli.fails(5, "inspect", copy)
    shown = cli.passes("inspect", copy, "--trust-engine")
    assert "it has no sidecar" in shown
    assert "SKIPPED  layers: " in shown or detect_host().gpu
    shutil.copy(sidecar_path(plan.path), tmp_path)
    swap(copy)
    cli.fails(5, "inspect", copy, "--trust-engine")


def test_inspector_layers_of_all_tensorrt_versions() -> None:
    names = {"Name": "stem.proj + act", "Metadata": "[ONNX Layer: stem.proj][ONNX Layer: act]"}
    ten = {**names, "LayerType": "gemm", "Outputs": [{"Name": "x", "Format/Datatype": "Half"}]}
    new = {"Name": "new", "Outputs": [{"Datatype": "FP8"}]}
    assert layers_from_json(json.dumps({"Layers": ["plain", ten, new, {"Name": "bare"}]})) == (
        Layer("plain", "", "", ()),
        Layer("stem.proj + act", "gemm", "Half", ("stem.proj", "act")),
        Layer("new", "", "FP8", ()),
        Layer("bare", "", "", ()),
    )
