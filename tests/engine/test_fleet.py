"""Engines in bundles: added, reused, rebuilt; fleets on this machine and on Ray."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.artifacts import Copy
from tests.conftest import Cli
from tests.engine.conftest import SM89
from tests.manifest_parts import artifact_entry
from van_deploy.bundle import Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange, BuildOptions
from van_deploy.engine import fleet
from van_deploy.engine.backend import Backend, Host
from van_deploy.engine.fleet import Cell, build_cells, build_on_ray, read_fleet
from van_deploy.errors import BundleError, InputError, RecipeError

FLEET = """
[fleet]
bundles = ["dist/van_digits", "dist/van_none"]
precisions = ["fp32"]
targets = ["sm_86", "sm_80+sm_89"]
"""


def cell_of(folder: Path, precision: str = "fp32", options: BuildOptions = SM89) -> Cell:
    return Cell(folder, precision, options.targets, options, fleet.FleetHost())


def build(
    folder: Path, options: BuildOptions = SM89, precision: str = "fp32", **more: Any
) -> fleet.BuildOutcome:
    (outcome,) = build_cells([cell_of(folder, precision, options)], host=Host(), **more)
    return outcome


@pytest.fixture
def folder(copy_bundle: Copy, digits_bundle: Bundle) -> Path:
    return copy_bundle(digits_bundle, "dist/van_digits")


def test_engine_is_added_reused_and_rebuilt(rtx: Backend, folder: Path) -> None:
    first = build(folder)
    bundle = Bundle.open(folder)
    artifact = bundle.artifact(first.engine)
    assert (first.outcome, first.engine) == ("built", f"van_digits-fp32-sm89-rtx{rtx.release}")
    assert (artifact.kind, artifact.precision) == ("engine", "fp32")
    assert artifact.made_from == Origin(name="fp32", sha256=bundle.artifact("fp32").sha256)
    assert first.sidecar is not None
    assert first.sidecar.preprocessing == bundle.manifest.preprocessing
    again = build(folder)
    assert (again.outcome, again.sidecar) == ("reused", first.sidecar)
    assert build(folder, force=True).outcome == "built"
    with pytest.raises(InputError, match="is of kind 'engine'"):
        build(folder, precision=first.engine)
    Bundle.open(folder).verified_path(first.engine).write_bytes(b"damaged")
    assert build(folder).outcome == "built"
    assert build(folder, SM89.with_changes(tf32=False)).outcome == "built"
    bundle = Bundle.open(folder)
    assert bundle.problems() == bundle.unlisted_files() == []
    assert len([a for a in bundle.artifacts.values() if a.kind == "engine"]) == 1


def test_onnx_file_replaced_during_the_build(rtx: Backend, folder: Path, digits_onnx: Path) -> None:
    def replace_source(*_: object) -> None:
        with edit_bundle(folder) as draft:
            draft.file("model.onnx").write_bytes(digits_onnx.read_bytes())
            draft.record(artifact_entry("fp32", "onnx", "fp32", "model.onnx"))

    with pytest.raises(BundleError, match="was replaced while"):
        build(folder, progress=replace_source)
    assert not (folder / "engines").exists()


def test_nothing_is_built_if_an_onnx_file_is_missing(rtx: Backend, folder: Path) -> None:
    with pytest.raises(BundleError) as caught:
        list(build_cells([cell_of(folder), cell_of(folder, "fp16")], host=Host()))
    assert caught.value.remedy == f"Create it with `van-deploy quantize {folder} --precision fp16`."
    assert not (folder / "engines").exists()


def test_engine_with_preprocessing(rtx: Backend, copy_bundle: Copy, uint8_bundle: Bundle) -> None:
    outcome = build(copy_bundle(uint8_bundle), precision="fp32-uint8")
    assert outcome.engine == f"van_digits-fp32-uint8-sm89-rtx{rtx.release}"
    assert outcome.sidecar is not None
    (tensor,) = outcome.sidecar.inputs
    assert (tensor.name, tensor.shape[::3], tensor.dtype) == ("pixels", (-1, 3), "uint8")
    names = {output.name for output in outcome.sidecar.outputs}
    assert {"logits", "top5_classes", "top5_probabilities"} <= names


@pytest.fixture
def fleet_file(folder: Path) -> Path:
    path = folder.parents[1] / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_fleet_file_is_read_as_cells(fleet_file: Path) -> None:
    options = '[options]\nbatch = ["1:1:1", "2:8:16"]\nworkspace = "1GiB"\n'
    host = '[hosts.sm_86]\nbackend = "tensorrt"\naccelerator_type = "A10G"\n'
    fleet_file.write_text(FLEET + options + host)
    cells = read_fleet(fleet_file)
    folders = [fleet_file.parent / "dist" / name for name in ("van_digits", "van_none")]
    targets = ("sm_86", "sm_80+sm_89")
    assert [(c.bundle, c.target) for c in cells] == list(itertools.product(folders, targets))
    assert cells[0].host.backend == "tensorrt"
    assert cells[0].resources == {"num_gpus": 1, "accelerator_type": "A10G"}
    assert "num_gpus" not in cells[1].resources
    changes: Any = {"targets": ("sm_80", "sm_89"), "workspace_bytes": 1 << 30}
    profiles = (BatchRange(1, 1, 1), BatchRange(2, 8, 16))
    assert cells[1].options == BuildOptions(profiles=profiles, **changes)
    fleet_file.write_text(FLEET + host.replace("sm_86", "sm_75"))
    with pytest.raises(RecipeError, match=r"fleet.toml.*hosts.sm_75 is for no target"):
        read_fleet(fleet_file)


def test_table_of_several_bundles(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for bundles, label in (('"a/one"', "one"), ('"a/one", "b/one"', "a/one")):
        file = tmp_path / "fleet.toml"
        file.write_text(f'[fleet]\nbundles=[{bundles}]\nprecisions=["fp32"]\ntargets=["sm_86"]\n')
        table = cli("build", "--matrix", file.name).stdout
        assert f"FAIL {label} " in " ".join(table.split())


@pytest.mark.slow
def test_fleet_continues_after_a_failure(rtx: Backend, fleet_file: Path, cli: Cli) -> None:
    first = cli("build", "--matrix", fleet_file)
    assert first.exit_code == 4
    assert f"van_digits-fp32-sm86-rtx{rtx.release}" in first.stdout
    assert "1:2:8" in first.stdout, "the bundle's own batch range"
    assert "FAIL  van_none fp32 sm_86: There is no bundle at" in first.stdout
    assert "[1/4] van_digits fp32 sm_86: built" in first.stderr
    assert "error: 2 of 4 engines failed." in first.stderr
    assert "Run the same command again to resume." in first.stderr
    second = list(build_cells(read_fleet(fleet_file), host=Host(), keep_going=True))
    assert [outcome.outcome for outcome in second] == ["reused", "reused", "failed", "failed"]
    assert second[1].engine == f"van_digits-fp32-sm80+sm89-rtx{rtx.release}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fleet_on_ray(rtx: Backend, fleet_file: Path) -> None:
    ray: Any = pytest.importorskip("ray", reason="ray is not installed")
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(num_cpus=1, object_store_memory=100 << 20, **quiet)
    try:
        cells = read_fleet(fleet_file)
        outcomes = {(o.cell.bundle.name, o.cell.target): o for o in build_on_ray(cells)}
        again = sorted(o.outcome for o in build_on_ray(cells))
    finally:
        ray.shutdown()
    assert len(outcomes) == 4
    first = outcomes["van_digits", "sm_86"]
    assert first.outcome == "built", first.error
    assert outcomes["van_none", "sm_86"].outcome == "failed"
    bundle = Bundle.open(cells[0].bundle)
    assert bundle.problems() == []
    assert first.engine in bundle.artifacts
    assert again == ["failed", "failed", "reused", "reused"]
    local = list(build_cells(cells[:2], host=Host()))
    assert [o.outcome for o in local] == ["reused", "reused"]
