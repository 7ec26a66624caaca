"""Exports, from weights to a bundle, and their errors."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.artifacts import BATCHES, Copy, add_artifact
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import MANIFEST, Bundle
from van_deploy.config import BatchRange, Recipe
from van_deploy.config.named_options import EXPORT, parse_changes
from van_deploy.describe import describe_artifacts
from van_deploy.documents import plain
from van_deploy.errors import BundleError, GateFailed
from van_deploy.exporting import export_bundle, load_model
from van_deploy.graph.fold import FoldReport, fold_van
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.van import VAN, smooth_images
from van_deploy.recipe import load_recipe, resolve_recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("van_digits").with_changes(batch=BATCHES)


@pytest.fixture(scope="module")
def loaded(recipe: Recipe) -> LoadedVan:
    return load_model(recipe)


def test_export_writes_a_checked_graph_and_its_description(
    digits_bundle: Bundle, uint8_bundle: Bundle, cli: Cli
) -> None:
    manifest = digits_bundle.manifest
    fold, agreement = manifest.checks["fold"], manifest.checks["agreement"]
    assert (fold["batchnorms_left"], fold["passed"], agreement["outcome"]) == (0, True, "pass")
    assert [entry["batch"] for entry in agreement["batches"]] == [1, 2, 3, 5, 8]
    assert agreement["images"] == "16 of 360 held-out images of handwritten digits"
    assert (manifest.preprocessing.image_size, manifest.weights.format) == (64, "embedded")
    assert manifest.batch == BATCHES
    assert (digits_bundle.path / "labels.txt").read_text().split() == list("0123456789")
    assert {"labels.txt", "golden.npz"} <= set(digits_bundle.artifact("fp32").files)
    assert digits_bundle.artifact("fp32").files == uint8_bundle.artifact("fp32").files
    [description] = cli.document("inspect", digits_bundle.path)
    metadata = description["metadata"]  # what a server needs that has the file alone
    assert metadata["van_deploy.preprocessing"] == plain(manifest.preprocessing)
    assert metadata["van_deploy.class_names"] == list("0123456789")
    assert metadata["van_deploy.weights_sha256"] == manifest.weights.sha256
    assert description["graph"]["nodes"] == 13 * 9 + 17


def test_export_is_reused_until_its_inputs_change(
    loaded: LoadedVan, recipe: Recipe, digits_bundle: Bundle, copy_bundle: Copy
) -> None:
    """The last graph is neither folded nor simplified."""

    def written() -> list[int]:
        return [(digits_bundle.path / n).stat().st_mtime_ns for n in (MANIFEST, "model.onnx")]

    before = written()
    again = export_bundle(loaded, recipe, digits_bundle.path)
    assert (again.reused, again.reason) == (True, "nothing changed")
    assert written() == before
    ema = replace(loaded, source=replace(loaded.source, container="state_dict_ema"))
    again = export_bundle(ema, recipe, copy_bundle(digits_bundle, "ema"))
    assert again.reason == "changed since: container"
    folder = copy_bundle(digits_bundle)
    moved = replace(loaded, source=replace(loaded.source, path="moved.pth"))
    again = export_bundle(moved, recipe, folder)
    assert (again.reused, again.bundle.manifest.weights.path) == (True, "moved.pth")
    with pytest.raises(BundleError, match="contains the bundle of 'van_digits', not of 'other'"):
        export_bundle(replace(loaded, name="other"), recipe, folder)
    add_artifact(Bundle.open(folder), "fp16", "fp16", onnx.load(folder / "model.onnx"))
    plainer = recipe.export.with_changes(opset=21, fold=False, simplify=False)
    result = export_bundle(loaded, recipe.with_changes(export=plainer), folder)
    reason = "changed since: export; removed, made from the previous graph: fp16"
    assert (result.reused, result.reason) == (False, reason)
    fp32, checks = result.bundle.artifact("fp32"), result.bundle.manifest.checks
    assert fp32.graph is not None
    assert (fp32.graph.opset, checks["fold"]["batchnorms_left"]) == (21, 22)
    assert checks["agreement"]["outcome"] == "pass"
    assert "simplify" not in checks
    assert result.bundle.rebuild_reason("fp32", fp32.made_with) == ""
    (folder / "model.onnx").write_bytes(b"changed")
    why = result.bundle.rebuild_reason("fp32", fp32.made_with)
    assert "was changed after the manifest was written" in why
    with pytest.raises(BundleError, match="was changed after the manifest was written"):
        describe_artifacts(folder)
    assert result.bundle.rebuild_reason("fp16", {}) == "new"


def test_incorrect_graphs_are_not_written(
    loaded: LoadedVan, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are changed after the check of the rewrites; then a rewrite is not exact."""
    smaller = recipe.with_changes(batch=BatchRange(1, 1, 2))

    def slightly_wrong(model: VAN, images: Tensor, *, fold: bool) -> FoldReport:
        report = fold_van(model, images, fold=fold)
        with torch.no_grad():
            for weight in report.model.get_submodule("block3.1.mlp.fc2").parameters():
                weight.mul_(1.001)
        return report

    with monkeypatch.context() as patch:
        patch.setattr("van_deploy.exporting.fold_van", slightly_wrong)
        with pytest.raises(GateFailed, match="differs from the network: SQNR"):
            export_bundle(loaded, smaller, tmp_path / "b")
    fold = "van_deploy.graph.fold"
    monkeypatch.setattr(f"{fold}._fold_patch_norm_", lambda embed: None)
    monkeypatch.setattr(f"{fold}._scale_outputs_", lambda conv, scale: conv.weight.mul_(1.01))
    with pytest.raises(GateFailed, match="rewritten network differs from the original by"):
        export_bundle(loaded, smaller, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_command_prints_verdicts_and_the_path(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run takes the network by its name, not the bundle in the folder of that name."""
    monkeypatch.chdir(tmp_path)
    command = (
        "export van_digits --output van_digits --batch 1:2:3 --opset 17 --image-size 32 "
        "--mean 0.1 --std 0.2,0.3,0.4 --crop-pct 0.5 --interpolation bilinear"
    )
    printed = cli.passes(command)
    assert "22 BatchNorms folded, 0 left" in printed
    assert printed.count("PASS") == 3 + 3
    assert "Wrote the bundle van_digits" in printed
    again = cli.document(command)
    assert again["export"]["reused"] is True
    values = again["manifest"]["preprocessing"]
    changed = "image_size, mean, std, interpolation, crop_pct"
    assert values["source"].endswith(f"except {changed} as requested")
    assert (values["image_size"], values["mean"], values["crop_pct"]) == (32, [0.1] * 3, 0.5)


def test_variants_are_known_by_every_spelling_and_can_be_renamed(
    loaded: LoadedVan, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = resolve_recipe("VAN-Tiny").model_dump(exclude_unset=True)
    assert recipe == {"model": {"name": "van_b0"}}
    named = Recipe.model_validate({"model": {"name": "VAN-Tiny", "weights": "random"}})
    assert load_model(named).name == "van_b0"
    downloaded = replace(loaded, source=replace(loaded.source, format="official"))
    monkeypatch.setattr("van_deploy.exporting.load_van", lambda *_, **__: downloaded)
    changes = parse_changes(EXPORT, {"name": "mine"})
    for mine in (resolve_recipe("van_b1", changes), resolve_recipe(load_recipe("van_b1"), changes)):
        assert (load_model(mine).name, mine.model.weights) == ("mine", "van_b1")


@each(
    ("words", "code", "message"),
    [
        ("van_digits --mean a,b", 2, "'--mean' is 'a': it should be a number."),
        ("van_digits --std 0,0,0", 2, "std"),
        ("van_digits --images no/such/folder", 5, "no/such/folder"),
        ("van_digits --labels none", 5, "The labels 'none' cannot be read"),
        ("WITHOUT van_digits", 3, "pip install 'van-deploy[cpu]'"),
        ("van_digits --features --outputs top5", 2, "--features exports feature maps, and --out"),
        ("van_digits --features --out-indices 1,4", 2, "The stages 1, 4 are not distinct numbers"),
        ("van_digits --features --out-indices 1,1", 2, "The stages 1, 1 are not distinct numbers"),
        ("van_digits --image-size 224x", 2, "is '224x': it should be a side or height x width"),
        ("van_digits --image-size 64x30", 2, "'64x30': it should be greater than or equal to 32"),
        ("van_digits --dynamic-size 64x96:96x64:128", 2, ":96x64:128 is not min <= opt <= max"),
        ("van_digits --dynamic-size 64:128", 2, "it should be min:opt:max, such as 192:224:512"),
        ("van_digits --embed-preprocess uint8 --images i.npz", 2, "needs uint8 images to check it"),
    ],
)
def test_invalid_requests_write_nothing(
    cli: Cli, tmp_path: Path, words: str, code: int, message: str
) -> None:
    np.savez(tmp_path / "i.npz", smooth_images(4, 3, 64).numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        if words.startswith("WITHOUT"):
            patch.setitem(sys.modules, "onnxruntime", None)
        command = f"export {words.removeprefix('WITHOUT')} --output b"
        assert message in cli.fails(code, command)
    assert not (tmp_path / "b").exists()
