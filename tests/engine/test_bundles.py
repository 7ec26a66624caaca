"""Engines and Inductor packages in bundles; fleets on this machine and on Ray."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import van_deploy
from tests.artifacts import ArtifactCache, Copy
from tests.conftest import Cli
from tests.each import each
from tests.engine.conftest import SM89
from tests.manifest_parts import artifact_entry
from van_deploy.building import BuildReport
from van_deploy.bundle import Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange, BuildOptions, BuildSettings
from van_deploy.documents import plain
from van_deploy.engine import fleet
from van_deploy.engine.backend import Backend, Host
from van_deploy.engine.compatibility import torch_version
from van_deploy.engine.fleet import Cell, build_cells, build_on_ray, read_fleet
from van_deploy.engine.inductor import package_settings
from van_deploy.errors import BundleError, InputError, RecipeError, UsageError
from van_deploy.report.sections_model import build_blocks
from van_deploy.runners.network import Network

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


def test_engine_is_added_reused_and_rebuilt(
    rtx: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(folder)
    bundle = Bundle.open(folder)
    artifact = bundle.artifact(first.engine)
    name = f"van_digits-fp32-sm89-rtx{rtx.release}"
    assert (first.outcome, first.engine, first.replaced) == ("built", name, "")
    assert (artifact.kind, artifact.precision) == ("engine", "fp32")
    assert artifact.made_from == Origin(name="fp32", sha256=bundle.artifact("fp32").sha256)
    assert first.sidecar is not None
    assert first.sidecar.preprocessing == bundle.manifest.preprocessing
    again = build(folder)
    assert (again.outcome, again.sidecar) == ("reused", first.sidecar)
    host = fleet.FleetHost(accelerator_type="L4")
    for changes, kind in (({}, fleet.BuildOutcome), ({"backend": "tensorrt"}, Bundle)):
        cell = replace(cell_of(folder), host=host.with_changes(**changes))
        assert isinstance(fleet.find_pending(cell, Host(), remote=True), kind)
    assert build(folder, force=True).outcome == "built"
    with pytest.raises(InputError, match="is of kind 'engine'"):
        build(folder, precision=first.engine)
    Bundle.open(folder).verified_path(first.engine).write_bytes(b"damaged")
    assert build(folder).outcome == "built"
    other = build(folder, SM89.with_changes(tf32=False))
    assert (other.outcome, other.replaced) == ("built", "tf32 True")
    assert "the one with tf32 True" in str(build_blocks(plain(BuildReport((other,)))))
    monkeypatch.setattr(fleet, "code_digest", lambda _: "of another version")
    assert build(folder, SM89.with_changes(tf32=False)).outcome == "built"
    bundle = Bundle.open(folder)
    assert bundle.problems() == bundle.unlisted_files() == []
    assert len([a for a in bundle.artifacts.values() if a.kind == "engine"]) == 1


def test_onnx_file_replaced_during_the_build(rtx: Backend, folder: Path, digits_onnx: Path) -> None:
    def replace_source(phase: str, done: int, total: int | None) -> None:
        if not done:
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
    targets = (("sm_86",), ("sm_80", "sm_89"))
    assert [(c.bundle, c.targets) for c in cells] == list(itertools.product(folders, targets))
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
    cells = read_fleet(fleet_file)
    ray.init(num_cpus=1, object_store_memory=100 << 20, **quiet)
    try:
        first, again = list(build_on_ray(cells)), list(build_on_ray(cells))
    finally:
        ray.shutdown()
    assert sorted(o.outcome for o in first) == ["built", "built", "failed", "failed"]
    assert {o.cell.bundle.name for o in first if o.outcome == "failed"} == {"van_none"}
    assert sorted(o.outcome for o in again) == ["failed", "failed", "reused", "reused"]
    bundle = Bundle.open(cells[0].bundle)
    assert bundle.problems() == []
    assert {o.engine for o in first if o.engine} <= set(bundle.artifacts)
    assert [o.outcome for o in build_cells(cells[:2], host=Host())] == ["reused", "reused"]


# --- Inductor packages -----------------------------------------------------------------------

REQUESTS = [
    ("--precision int8", 5, "An Inductor package computes in fp32, fp16, bf16"),
    ("--target sm_90", 2, "--target is an option of TensorRT, and --backend is inductor"),
    ("--batch 1:1:1 --batch 2:4:8", 2, "A package supports one range of batches"),
    ("--device cuda:7", 3, "A package for cuda:7 is compiled on the GPU that will run it"),
    ("--device tpu", 2, "'--device' is 'tpu'"),
    ("--device cpu --fused-kernels", 2, "The fused kernels run on a GPU, in fp16 or"),
    ("--device cpu --max-autotune", 2, "--max-autotune times the kernels of a GPU"),
    ("--tune", 3, "--tune cannot time candidates: no NVIDIA GPU"),
    ("--tune --device cpu --precision int8", 5, "error: An Inductor package computes in fp32"),
    ("--backend auto --device cpu", 2, "--device cpu is an option of Inductor"),
    ("--backend auto --max-autotune", 2, "--max-autotune is an option of Inductor"),
    ("--backend auto --fused-kernels", 2, "--fused-kernels is an option of Inductor"),
    ("--device cpu", 3, "'no-such-compiler', which is not installed"),
    ("--tune --device cpu", 3, "error: Inductor needs the C++ compiler 'no-such-compiler', which"),
]


@each("words, code, message", REQUESTS)
def test_unsupported_options_of_inductor_and_of_other_backends(
    cli: Cli, digits_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, **case: Any
) -> None:
    words, code, message = case.values()
    if "no-such-compiler" in message:
        monkeypatch.setenv("CXX", "no-such-compiler")
    assert message in cli.fails(code, f"build --backend inductor {words}", digits_bundle.path)


def test_fused_kernels_need_a_gpu_half_precision_and_one_batch_size(digits_bundle: Bundle) -> None:
    fixed, dynamic = (BatchRange(8, 8, 8),), (BatchRange(1, 4, 8),)
    options: Any = {"backend": "inductor", "fused_kernels": True, "precisions": ("fp16",)}
    supported, host = BuildSettings(**options, profiles=fixed), Host("a GPU", "sm_90")
    assert package_settings(digits_bundle, supported, host)[0].device == "cuda:0"
    for changes in ({"profiles": dynamic}, {"precisions": ("fp32",)}):
        with pytest.raises(UsageError, match="fused kernels"):
            package_settings(digits_bundle, supported.model_copy(update=changes), host)


@pytest.fixture(scope="module")
def package_bundle(artifact_cache: ArtifactCache, digits_bundle: Bundle) -> Path:
    """Return a bundle with a tuned FP32 and a BF16 package for this CPU; tests do not change it."""

    def create(folder: Path) -> None:
        shutil.copytree(digits_bundle.path, folder)
        bundle = van_deploy.open_bundle(folder)
        for_cpu: Any = {"backend": "inductor", "device": "cpu"}
        (row,) = bundle.build(**for_cpu, precisions=["fp32"], tune=True).tuned
        assert (row.selected, row.passed, (row.latency_ms or 0) > 0) == (True, True, True)
        assert package_names(folder)["fp32"] == row.engine
        assert bundle.build(**for_cpu, precisions=["bf16"]).passed

    return artifact_cache("with_packages", create)


def package_names(folder: Path) -> dict[str, str]:
    artifacts = Bundle.open(folder).artifacts.values()
    return {item.precision: item.name for item in artifacts if item.kind == "package"}


@pytest.mark.slow
def test_commands_support_packages(
    cli: Cli, copy_bundle: Copy, package_bundle: Path, heldout_200: Path, tmp_path: Path
) -> None:
    folder, names = copy_bundle(package_bundle), package_names(package_bundle)
    verdicts = cli.document("verify", folder)["artifacts"]
    for precision, name in names.items():
        found = [verdicts[name][key] for key in ("numeric", "runner", "outcome")]
        assert found == [precision, "inductor", "pass"]
    artifact = ("--artifact", names["fp32"])
    cli.passes("evaluate", folder, "--images", heldout_200, *artifact)
    inspected = cli.passes("inspect", Bundle.open(folder).verified_path(names["bf16"]))
    assert torch_version() in inspected
    assert "it runs on this machine" in inspected
    options = (*artifact, "--output", tmp_path / "t")
    assert "Triton cannot load" in cli.fails(5, "package triton", folder, *options)


@pytest.mark.slow
def test_reused_and_changed_packages(copy_bundle: Copy, package_bundle: Path) -> None:
    folder = copy_bundle(package_bundle)
    again = van_deploy.open_bundle(folder).build(backend="inductor", device="cpu")
    assert [one.outcome for one in again.outcomes] == ["reused"]
    name = package_names(folder)["fp32"]
    assert "code" in Bundle.open(folder).artifact(name).made_with
    Bundle.open(folder).verified_path(name).write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"\.pt2"):
        Network(Bundle.open(folder), name).__enter__()
