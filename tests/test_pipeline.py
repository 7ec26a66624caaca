"""The main job, from weights to a bundle, and everything that may go wrong on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.artifacts import BATCHES, Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.judging import batch_sizes
from van_deploy.config import BatchRange, ModelSettings, PreprocessingSettings, Recipe
from van_deploy.data import decoded_batches, image_set
from van_deploy.documents import plain
from van_deploy.errors import GateFailed
from van_deploy.graph.fold import FoldReport, Rewrites, fold_van
from van_deploy.manifest import GraphFacts
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.van import VAN
from van_deploy.pipeline import ExportResult, export_bundle, load_for
from van_deploy.recipe import recipe_named
from van_deploy.runners.onnxruntime import OnnxRuntimeRunner
from van_deploy.runners.pytorch import TorchRunner


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipe_named("van_digits").changed(batch=BATCHES)


@pytest.fixture(scope="module")
def loaded(recipe: Recipe) -> LoadedVan:
    return load_for(recipe)


@pytest.fixture
def exported(digits_bundle: Bundle) -> Bundle:
    return digits_bundle


def test_the_bundle_holds_a_checked_graph_and_says_what_it_is(exported: Bundle) -> None:
    manifest = exported.manifest
    assert exported.verified("fp32").name == "model.onnx"
    assert manifest.checks["fold"]["batchnorms_left"] == 0
    assert manifest.checks["fold"]["passed"]
    agreement = manifest.checks["agreement"]
    assert agreement["passed"]
    assert [entry["batch"] for entry in agreement["batches"]] == [1, 2, 3, 5, 8]
    assert agreement["images"] == "16 of 360 held-out images of handwritten digits"
    assert manifest.preprocessing.image_size == 64
    assert manifest.weights.format == "embedded"
    assert manifest.batch == BATCHES
    assert {"torch", "onnx", "onnxruntime", "van-deploy"} <= set(manifest.versions)
    assert (exported.path / "labels.txt").read_text().split() == list("0123456789")


def test_the_file_carries_what_a_server_needs(exported: Bundle, cli: Cli) -> None:
    [description] = json.loads(cli("inspect", exported.path, "--json").stdout)
    metadata = description["metadata"]
    assert metadata["van_deploy.preprocessing"] == plain(exported.manifest.preprocessing)
    assert metadata["van_deploy.class_names"] == list("0123456789")
    assert metadata["van_deploy.weights_sha256"] == exported.manifest.weights.sha256
    assert description["graph"]["nodes"] == 13 * 9 + 17
    assert description["weights"]["float"]["values"] > 100_000


def graph_of(result: ExportResult) -> GraphFacts:
    graph = result.bundle.artefact("fp32").graph
    assert graph is not None
    return graph


def test_a_second_export_reuses_the_first_and_says_why(
    loaded: LoadedVan, recipe: Recipe, exported: Bundle
) -> None:
    before = exported.verified("fp32").stat().st_mtime_ns
    again = export_bundle(loaded, recipe, exported.path)
    assert (again.reused, again.reason) == (True, "nothing changed")
    assert again.bundle.verified("fp32").stat().st_mtime_ns == before


def test_a_changed_recipe_makes_it_anew_and_says_what_changed(
    loaded: LoadedVan, recipe: Recipe, exported: Bundle, copy_of: Copy
) -> None:
    folder = copy_of(exported)
    changed = recipe.changed(export=recipe.export.changed(opset=21))
    result = export_bundle(loaded, changed, folder)
    assert not result.reused
    assert result.reason == "changed since: export"
    assert graph_of(result).opset == 21
    (folder / "model.onnx").write_bytes(b"changed")
    result = export_bundle(loaded, changed, folder)
    assert not result.reused
    assert "was changed after the manifest was written" in result.reason
    assert export_bundle(loaded, changed, folder, force=True).reason == "asked to (--force)"


def test_nothing_folded_nothing_simplified_is_still_the_network(
    loaded: LoadedVan, recipe: Recipe, tmp_path: Path
) -> None:
    plain = recipe.changed(export=recipe.export.changed(fold=False, simplify=False))
    manifest = export_bundle(loaded, plain, tmp_path / "b").bundle.manifest
    assert manifest.checks["fold"]["batchnorms_left"] == 22
    assert "simplify" not in manifest.checks
    assert manifest.checks["agreement"]["passed"]


def test_a_graph_that_is_not_the_network_never_reaches_the_bundle(
    loaded: LoadedVan, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slightly_wrong(model: VAN, images: Tensor, rewrites: Rewrites) -> FoldReport:
        report = fold_van(model, images, rewrites)
        with torch.no_grad():
            for weight in report.model.get_submodule("block3.1.mlp.fc2").parameters():
                weight.mul_(1.001)
        return report

    monkeypatch.setattr("van_deploy.pipeline.fold_van", slightly_wrong)
    with pytest.raises(GateFailed, match="not the network it was made from: SQNR"):
        export_bundle(loaded, recipe, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_wrong_rewrite_never_reaches_the_bundle(
    loaded: LoadedVan, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("van_deploy.graph.fold._fold_patch_norm_", lambda embed: None)
    monkeypatch.setattr(
        "van_deploy.graph.fold._scale_outputs_", lambda conv, scale: conv.weight.mul_(1.01)
    )
    with pytest.raises(GateFailed, match="rewritten network differs from the original by"):
        export_bundle(loaded, recipe, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_batches_checked_are_1_2_3_another_odd_one_the_optimum_and_the_maximum() -> None:
    assert batch_sizes(Recipe().batch) == (1, 2, 3, 5, 8, 32)
    assert batch_sizes(BatchRange(1, 2, 2)) == (1, 2)


def test_the_command_prints_the_verdicts_and_where_the_bundle_is(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "b"
    result = cli("export", "van_digits", "--output", out, "--batch", "1:2:3")
    assert result.exit_code == 0, result.stderr
    assert "22 BatchNorms folded, 0 left" in result.stdout
    assert result.stdout.count("PASS") == 2 + 3
    assert f"Wrote the bundle {out}" in result.stdout.replace("\n", "")
    again = cli("export", "van_digits", "--output", out, "--batch", "1:2:3", "--json")
    assert json.loads(again.stdout)["export"]["reused"] is True


def test_overrides_reach_the_manifest_and_say_so(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        *("export", "van_digits", "--output", tmp_path / "b", "--batch", "1:1:1", "--json"),
        *("--image-size", "32", "--mean", "0.1", "--std", "0.2,0.3,0.4", "--crop-pct", "0.5"),
        *("--interpolation", "bilinear", "--opset", "17"),
    )
    assert result.exit_code == 0, result.stderr
    values = json.loads(result.stdout)["manifest"]["preprocessing"]
    assert values["source"].endswith(
        "except image_size, mean, std, interpolation, crop_pct as asked for"
    )
    assert (values["image_size"], values["mean"], values["crop_pct"]) == (32, [0.1] * 3, 0.5)


@each(
    ("arguments", "code", "message"),
    [
        (["van_b9"], 2, "There is no VAN variant called 'van_b9'"),
        (["van_b5"], 2, "van_b5 has no public ImageNet-1K weights on the hub"),
        (["./none.pth"], 5, "none.pth"),
        (["van_digits", "--image-size", "8"], 2, "8"),
        (["van_digits", "--image-size", "big"], 2, "--image-size"),
        (["van_digits", "--mean", "a,b"], 2, "'--mean' is 'a': it should be a number."),
        (["van_digits", "--std", "0,0,0"], 2, "std"),
        (["van_digits", "--batch", "8:9"], 2, "'--batch' is '8:9': it should be min:opt:max"),
        (
            ["van_digits", "--opset", "9"],
            2,
            "'--opset' is 9: it should be greater than or equal to 17",
        ),
        (["van_digits", "--images", "no/such/folder"], 5, "no/such/folder"),
        (["van_digits", "--labels", "no-such-file"], 5, "The labels 'no-such-file' cannot be read"),
        (["van_digits", "--sha256", "0" * 64], 5, "0000000"),
        (["no-such.toml"], 5, "The recipe 'no-such.toml' cannot be read"),
    ],
)
def test_bad_requests_are_one_message_and_leave_nothing(
    cli: Cli, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    result = cli("export", *arguments, "--output", tmp_path / "b")
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert message in " ".join(result.stderr.split()) or message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "b").exists()


def test_labels_of_the_wrong_number_are_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("cat\ndog\n")
    result = cli("export", "van_digits", "--labels", tmp_path / "l.txt", "--output", tmp_path / "b")
    assert result.exit_code == 5
    assert "has 2 class names; the network has 10 classes" in result.stderr


def test_a_folder_with_something_else_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    result = cli("export", "van_digits", "--output", tmp_path)
    assert result.exit_code == 5
    assert "holds something else (thesis.tex)" in result.stderr


def test_without_onnxruntime_nothing_starts(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = cli("export", "van_digits", "--output", tmp_path / "b")
    assert result.exit_code == 3
    assert "ONNX Runtime is not installed" in result.stderr
    assert "pip install 'van-deploy[cpu]'" in result.stderr


def test_random_weights_are_labelled_everywhere(tmp_path: Path) -> None:
    recipe = Recipe(
        model=ModelSettings(name="van_b0", weights="random", seed=3),
        batch=BatchRange(1, 1, 2),
        preprocessing=PreprocessingSettings(image_size=64),
    )
    result = export_bundle(load_for(recipe), recipe, tmp_path / "b")
    weights = result.bundle.manifest.weights
    assert (weights.format, weights.seed) == ("random", 3)
    assert any("random weights" in note for note in result.notes)
    assert result.bundle.manifest.checks["agreement"]["passed"]
    assert graph_of(result).nodes == 13 * 13 + 17


@pytest.mark.slow
def test_the_shared_checkpoint_keeps_every_prediction(shared: Path, tmp_path: Path) -> None:
    checkpoint = shared / "checkpoints" / "van_b0_cifar10.pth.tar"
    images = shared / "data" / "cifar10" / "eval"
    recipe = Recipe(model=ModelSettings(weights=str(checkpoint)))
    loaded = load_for(recipe)
    bundle = export_bundle(loaded, recipe, tmp_path / "b", images=images).bundle
    items = image_set(images).items
    assert len(items) == 2000
    original = load_van(str(checkpoint)).model
    same = 0
    with TorchRunner(original) as pytorch, OnnxRuntimeRunner(bundle.verified("fp32")) as onnx:
        for batch in decoded_batches(items, loaded.preprocessing, 50):
            expected = pytorch.run(batch.inputs)
            same += int((expected.argmax(1) == onnx.run(batch.inputs).argmax(1)).sum())
    assert same == len(items)


def test_a_user_folder_smaller_than_the_batch_is_made_up_with_crops(
    loaded: LoadedVan, recipe: Recipe, tmp_path: Path
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
    (tmp_path / "i").mkdir()
    Image.fromarray(pixels).save(tmp_path / "i" / "a.png")
    (tmp_path / "i" / "b.png").write_bytes(b"not an image")
    result = export_bundle(loaded, recipe, tmp_path / "b", images=tmp_path / "i")
    described = result.bundle.manifest.checks["agreement"]["images"]
    assert described.startswith(
        f"16 images and parts of 2 images of '{tmp_path / 'i'}'; 1 could not "
    )
