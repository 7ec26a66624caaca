"""What is vouched for, where it does not run, what cannot be built, and what `inspect` tells."""

from __future__ import annotations

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
from tests.engine.conftest import ADA, PLUS, SM89, TENSORRT_11, Build, Plan
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine.backend import Backend, Host, detect_host
from van_deploy.engine.compatibility import (
    find_obstacles,
    require_compatible,
    require_supported,
    torch_version,
)
from van_deploy.engine.inspect import Layer, layers_from_json
from van_deploy.engine.sidecar import (
    PACKAGE_SCHEMA,
    PackageSidecar,
    Sidecar,
    load_package_sidecar,
    load_sidecar,
    sidecar_path,
    write_sidecar,
)
from van_deploy.environment.hardware import cpu, nvidia_driver
from van_deploy.errors import InputError, MissingDependency, UsageError
from van_deploy.files import file_sha256

NO_GPU = Host()
A100 = Host("NVIDIA A100", "sm_80", 80 << 30, "580.65.06", (13, 0))
H100 = Host("NVIDIA H100", "sm_90", None, "580.0", (13, 0))
TURING = Host("Tesla T4", "sm_75", 16 << 30, "580.65.06", (13, 0))
OLD = replace(ADA, driver="535.129.03", cuda=(11, 8))
VC = {"version_compatible": True}
TEN, ELEVEN, LATER = (
    {"tensorrt": f"{version}"} for version in ("10.16.1.11", "11.4.0.106", "11.5.0.1")
)
Spoil = Callable[[Path], object]


def of_tensorrt(sidecar: Sidecar, version: str, **options: object) -> Sidecar:
    asked = BuildOptions().with_changes(**options)
    changes = {"backend": "tensorrt", "backend_version": version, "options": asked}
    return sidecar.model_copy(update=changes)


def package(**changes: Any) -> PackageSidecar:
    texts = dict.fromkeys(("name", "onnx_file", "onnx_sha256", "file_sha256", "built_on"), "p")
    flags: Any = {"tf32": True, "max_autotune": False, "cpu_features": (), "file_bytes": 1}
    served: Any = {"batch": BatchRange(1, 4, 8), "input_shape": (-1, 3, 32, 32)}
    made: Any = {"schema": PACKAGE_SCHEMA, "precision": "fp16", "build_seconds": 1.0}
    made |= {"torch": torch_version(), "device": "cuda", "targets": ("sm_90",)}
    return PackageSidecar(**{**texts, **flags, **served, **made, **changes})


ON_CPU = {"device": "cpu", "targets": (platform.machine(),)}


@each(
    ("changes", "host", "problem", "remedy"),
    [
        ({}, ADA, "", ""),
        ({"targets": ("sm_80", "sm_89")}, A100, "", ""),
        ({}, A100, "for sm_89 with {label}; this machine has sm_80 (NVIDIA A100)", "t sm_80`."),
        ({}, NO_GPU, "; no NVIDIA GPU was found on this machine", "Run it on a machine"),
        ({"backend_version": "1.2.0.54"}, ADA, "RTX 1.2.0; installed is {label}", "RTX 1.2.0."),
        # another build of one release
        ({"backend_version": "{release}.1"}, ADA, "; installed is TensorRT for RTX {version}", ""),
        ({}, OLD, "it needs CUDA {cuda}, and driver 535.129.03 supports CUDA up to 11.8", "Update"),
        ({**ELEVEN, **PLUS}, A100, "", ""),
        ({**ELEVEN, **PLUS}, TURING, "for sm_80 and newer with", "this machine."),
        (ELEVEN, A100, "this machine has sm_80", "Rebuild on this machine."),
        ({**TEN, **VC}, ADA, "", ""),
        ({**LATER, **VC}, ADA, "never on earlier ones)", "install TensorRT 11.5.0."),
        (TEN, ADA, "; installed is TensorRT 11.4.0", "install TensorRT 10."),
        ({"device": "cuda"}, H100, "", ""),
        ({**ON_CPU, "cpu_features": cpu().features}, NO_GPU, "", ""),
        ({"torch": "2.0.1"}, H100, "PyTorch 2.0.1; installed is {torch}", "install torch==2.0.1"),
        ({"device": "cuda"}, ADA, "it was compiled for sm_90; this machine has sm_89", "Rebuild"),
        ({"device": "cuda"}, NO_GPU, "compiled for sm_90; no NVIDIA GPU was found", ""),
        ({**ON_CPU, "cpu_features": ("amx_fp8",)}, NO_GPU, "and may use amx_fp8, which", ""),
        ({**ON_CPU, "targets": ("riscv64",)}, NO_GPU, "and may use riscv64, which", ""),
    ],
)
def test_where_a_plan_or_a_package_runs(
    rtx: Backend, plan: Plan, monkeypatch: pytest.MonkeyPatch, **case: Any
) -> None:
    """TensorRT's own rules with a stand-in where only its version is looked at."""
    changes, host, problem, remedy = case.values()
    facts = {name: getattr(rtx, name) for name in ("label", "version", "cuda", "release")}
    facts["torch"] = torch_version()
    given = {k: v.format(**facts) if isinstance(v, str) else v for k, v in changes.items()}
    if version := given.pop("tensorrt", None):
        stand_in = "van_deploy.engine.compatibility.load_backend"
        monkeypatch.setattr(stand_in, lambda _: TENSORRT_11)
        sidecar: Any = of_tensorrt(plan.sidecar, version, **given)
    elif given.keys() & {"device", "torch"}:
        sidecar = package(**given)
    else:
        sidecar = plan.sidecar.model_copy(update=given)
    found = find_obstacles(sidecar, host)
    monkeypatch.undo()
    assert len(found) == bool(problem)
    for one in found:
        assert problem.format(**facts) in one.problem
        assert remedy in one.remedy


def test_every_reason_is_given_at_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    older = plan.sidecar.model_copy(update={"backend_version": "1.2.0.54"})
    with pytest.raises(MissingDependency) as caught:
        require_compatible(older, replace(A100, cuda=(11, 8)))
    assert caught.value.message.count(";") >= 3
    assert len(caught.value.remedy.splitlines()) == 3
    with pytest.raises(MissingDependency, match="The package 'p' does not run here"):
        require_compatible(package(), NO_GPU)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    first, *_ = find_obstacles(of_tensorrt(plan.sidecar, "11.4.0.106"), ADA)
    assert first.problem.startswith("TensorRT is not installed")


@each(
    ("options", "host", "refused"),
    [
        (SM89, ADA, ""),
        (BuildOptions(**PLUS, workspace_bytes=24 << 30), ADA, ""),
        (SM89.with_changes(targets=()), NO_GPU, "builds on the GPU that will run the engine"),
        (SM89.with_changes(workspace_bytes=25 << 30), ADA, "of memory that NVIDIA L4 has"),
        # A level covers other GPUs only where no target is named, and RTX only those it serves.
        (SM89.with_changes(targets=("sm_90",)), ADA, "give --hardware-compatibility ampere-plus."),
        (SM89.with_changes(targets=("sm_75",)), ADA, "on that GPU, or use --backend tensorrt-rtx."),
    ],
)
def test_what_tensorrt_refuses(options: BuildOptions, host: Host, refused: str) -> None:
    """What RTX refuses is in ``tests/cli/test_build.py``."""
    if not refused:
        require_supported(TENSORRT_11, options, host)
        return
    with pytest.raises((UsageError, MissingDependency)) as caught:
        require_supported(TENSORRT_11, options, host)
    assert refused in str(caught.value)
    assert isinstance(caught.value, UsageError) == (host is ADA)


@pytest.mark.skipif(nvidia_driver() is not None, reason="measures RTX on a machine with no GPU")
def test_what_rtx_is_refused_it_really_cannot_do(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.engine.build.require_supported", lambda *_: None)
    with pytest.raises(MissingDependency):
        build(tmp_path / "e.plan", SM89.with_changes(version_compatible=True))
    assert list(tmp_path.iterdir()) == []


# --- sidecars ----------------------------------------------------------------------------------


def with_(text: str = "", **values: object) -> Spoil:
    def write(file: Path) -> None:
        path = sidecar_path(file)
        changed = json.dumps({**json.loads(path.read_text()), **values})
        path.write_text(changed if values else text, encoding="latin-1")

    return write


def in_middle(file: Path) -> None:
    file.write_bytes(b"other" + file.read_bytes()[5:])


@each(
    ("spoil", "message"),
    [
        (lambda file: sidecar_path(file).unlink(), "has no sidecar"),
        (Path.unlink, "There is no engine"),
        (in_middle, "is not the (plan|package) of its sidecar"),
        (with_(targets=["sm_90"]), "was edited after it was written"),
        (with_(sidecar_sha256="0" * 64), "was edited after it was written"),
        (with_(schema="van-deploy/engine/1"), "has schema 'van-deploy/engine/1'"),
        *((with_(text), "is damaged") for text in ("", "[]", "{}", "\xff")),
    ],
)
def test_what_is_not_vouched_for(plan: Plan, tmp_path: Path, spoil: Spoil, message: str) -> None:
    copy = shutil.copytree(plan.path.parent, tmp_path / "copy") / plan.path.name
    assert load_sidecar(copy) == plan.sidecar
    file = tmp_path / "p-1.7.pt2"
    file.write_bytes(b"native code")
    known = write_sidecar(file, package(targets=("sm_89",), file_sha256=file_sha256(file)))
    assert load_package_sidecar(file) == known
    for path, verified in ((copy, load_sidecar), (file, load_package_sidecar)):
        spoil(path)
        with pytest.raises(InputError, match=message):
            verified(path)


@pytest.mark.skipif(detect_host().gpu is not None, reason="on a GPU the plan may load")
def test_inspect_tells_what_sidecar_and_log_know(cli: Cli, plan: Plan) -> None:
    sidecar, text = plan.sidecar, " ".join(cli("inspect", plan.path).stdout.split())
    for words in (
        f"sha256 {sidecar.plan_sha256}",
        f"backend tensorrt-rtx version {sidecar.backend_version}",
        "input images float N 3 32 32",
        "output logits float N 10",
        "SKIPPED layers: only the engine's own GPU can load it",
        f"After dead-layer removal: {sidecar.parser_layers} layers",
        "Total Weights Memory",
    ):
        assert words in text, words
    (document,) = json.loads(cli("inspect", plan.path, "--json").stdout)
    assert (document["plan_sha256"], document["layers"]) == (sidecar.plan_sha256, [])
    assert document["layers_skipped"].endswith("no NVIDIA GPU was found on this machine")


def test_trust_is_for_a_plan_without_a_sidecar_only(cli: Cli, plan: Plan, tmp_path: Path) -> None:
    copy = Path(shutil.copy(plan.path, tmp_path))
    refused, trusted = cli("inspect", copy), cli("inspect", copy, "--trust-engine")
    assert (refused.exit_code, trusted.exit_code) == (5, 0)
    assert "--trust-engine" in refused.stderr
    assert "it has no sidecar" in trusted.stdout
    shutil.copy(sidecar_path(plan.path), tmp_path)
    in_middle(copy)
    swapped = cli("inspect", copy, "--trust-engine")
    assert (swapped.exit_code, swapped.stdout) == (5, "")


def test_layers_of_any_version() -> None:
    names = {"Name": "stem.proj + act", "Metadata": "[ONNX Layer: stem.proj][ONNX Layer: act]"}
    ten = {**names, "LayerType": "gemm", "Outputs": [{"Name": "x", "Format/Datatype": "Half"}]}
    new = {"Name": "new", "Outputs": [{"Datatype": "FP8"}]}
    assert layers_from_json(json.dumps({"Layers": ["plain", ten, new, {"Name": "bare"}]})) == (
        Layer("plain", "", "", ()),
        Layer("stem.proj + act", "gemm", "Half", ("stem.proj", "act")),
        Layer("new", "", "FP8", ()),
        Layer("bare", "", "", ()),
    )
