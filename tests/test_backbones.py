"""Backbones: from a segmenter's checkpoint to feature maps, and what serves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.artifacts import ArtifactCache, Copy
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.checks.golden import SKETCH, golden_count, golden_samples, sketch
from van_deploy.config import (
    BatchRange,
    ExportSettings,
    ModelSettings,
    QuantizeSettings,
    Recipe,
)
from van_deploy.config.sizes import ImageSize, SizeRange
from van_deploy.errors import UsageError
from van_deploy.exporting import export_bundle, load_model
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import FOLD_TOLERANCE, fold_van
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import load_van, network_from_state
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.runners.network import Network
from van_deploy.runners.onnxruntime import onnxruntime_outputs

TINY = VanConfig((8, 12, 16, 24), (1, 2, 1, 1), (4, 4, 2, 2), num_classes=5)
STAGES = ("stage1", "stage2", "stage3", "stage4")
CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', pretrained=None, backbone=dict(type='van_tiny'))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2048, 512), transforms=[])]
"""


def segmenter(path: Path, config: str = CONFIG) -> None:
    """Write a checkpoint as VAN-Segmentation's training leaves one."""
    body = random_van(TINY, seed=7).state_dict()
    state = {f"backbone.{n}": t for n, t in body.items() if not n.startswith("head.")}
    generator = torch.Generator().manual_seed(1)
    for name, shape in {
        "decode_head.conv_seg.weight": (150, 16, 1, 1),
        "decode_head.conv_seg.bias": (150,),
        "auxiliary_head.convs.0.conv.weight": (16, 16, 3, 3),
    }.items():
        state[name] = torch.randn(shape, generator=generator)
    meta = {"CLASSES": [f"thing {n}" for n in range(150)], "config": config, "iter": 40000}
    torch.save({"state_dict": state, "meta": meta, "optimizer": {}}, path)


@pytest.fixture(scope="session")
def checkpoint(artifact_cache: ArtifactCache) -> Path:
    """Return a checkpoint of a segmenter; not to be changed."""
    return artifact_cache("upernet_van.pth", segmenter)


@pytest.fixture(scope="session")
def exported(artifact_cache: ArtifactCache, checkpoint: Path) -> Bundle:
    """Return its backbone as a bundle of dynamic batch and size with FP16; not to be changed."""

    def make(path: Path) -> None:
        recipe = Recipe(
            model=ModelSettings(weights=str(checkpoint)),
            batch=BatchRange(1, 2, 3),
            export=ExportSettings(features=True, dynamic_size=SizeRange(32, (32, 64), (64, 96))),
        )
        assert export_bundle(load_model(recipe), recipe, path)
        for precision in ("fp16", "bf16"):
            assert quantize_bundle(path, recipe.precision.of(precision))

    return Bundle.open(artifact_cache("backbone", make))


def maps_of(model: VAN, images: Tensor) -> dict[str, Any]:
    """Return a network's feature maps by name, computed apart from its own ``forward``."""
    found, x = {}, images
    with torch.no_grad():
        for stage in range(1, 5):
            x = model.get_submodule(f"patch_embed{stage}")(x)
            for block in model.get_submodule(f"block{stage}").children():
                x = block(x)
            tokens = x.flatten(2).transpose(1, 2)
            normed = model.get_submodule(f"norm{stage}")(tokens)
            x = normed.transpose(1, 2).reshape(x.shape)
            found[f"stage{stage}"] = x.numpy()
    return found


# --- loading ---------------------------------------------------------------------------------


class TestLoading:
    def test_a_segmenters_backbone_loads(self, checkpoint: Path) -> None:
        loaded = load_van(str(checkpoint))
        assert loaded.config.out_indices == (0, 1, 2, 3)
        assert loaded.config.num_classes == 0
        assert loaded.class_names is None
        assert np.allclose(loaded.preprocessing.mean, np.array([123.675, 116.28, 103.53]) / 255)
        notes = "; ".join(loaded.source.notes)
        assert "a backbone (official names), without a classification head" in notes
        assert "left out: decode_head.conv_seg.weight, decode_head.conv_seg.bias, auxil" in notes
        images = torch.randn(2, 3, 64, 96)
        expected = maps_of(random_van(TINY, seed=7), images)
        with torch.no_grad():
            found = dict(zip(STAGES, loaded.model(images), strict=True))
        assert all(np.allclose(expected[n], found[n].numpy(), atol=1e-5) for n in STAGES)

    def test_a_backbone_is_no_classifier(self, cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
        result = cli("export", checkpoint, "--output", tmp_path / "b")
        assert result.exit_code == 2
        told = " ".join(result.stderr.split())
        assert "is a backbone without a classification head: it gives no logits." in told
        assert "Export its feature maps, with --features." in told


# --- the graph -------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [(2,), (0, 3)])
def test_the_graph_gives_the_chosen_stages(out_indices: tuple[int, ...]) -> None:
    model = random_van(TINY, seed=3)
    backbone = network_from_state(model.state_dict(), TINY.backbone(out_indices))
    images = torch.randn(3, 3, 64, 96)
    folded = fold_van(backbone, images[:1])
    assert folded.relative_error < FOLD_TOLERANCE
    graph = onnx_from_van(folded.model, (64, 96))
    onnx.checker.check_model(graph, full_check=True)
    names = [f"stage{index + 1}" for index in out_indices]
    assert [value.name for value in graph.graph.output] == names
    operators = {node.op_type for node in graph.graph.node}
    assert operators == {"Conv", "Gelu", "Add", "Mul", "Transpose", "LayerNormalization"}
    depths = sum(TINY.depths[: max(out_indices) + 1])  # later stages are not in it
    assert sum(node.op_type == "Gelu" for node in graph.graph.node) == 2 * depths
    found = onnxruntime_outputs(graph, images.numpy())
    expected = maps_of(model.double(), images.double())
    assert all(sqnr_db(expected[name], found[name]) >= 120 for name in names)


# --- the bundle ------------------------------------------------------------------------------


class TestBundle:
    def test_it_says_what_it_gives(self, exported: Bundle) -> None:
        manifest = exported.manifest
        assert manifest.architecture.output_names == STAGES
        graph = exported.artifact("fp32").graph
        assert graph is not None
        assert graph.inputs["images"].shape == ("batch", 3, "height", "width")
        assert graph.outputs["stage3"].shape == ("batch", 16, "stage3_height", "stage3_width")
        assert exported.artifact("fp32").golden_sqnr_db.popitem()[1] >= 120

    def test_golden_samples_are_sketches_of_the_networks_own_maps(
        self, exported: Bundle, checkpoint: Path
    ) -> None:
        samples = golden_samples(exported)
        assert [other.size for other in samples.others] == ["32x32", "49x65", "64x96"]
        model = load_van(str(checkpoint)).model.double()
        for each_size in (samples, *samples.others):
            with torch.no_grad():
                maps = model(torch.from_numpy(each_size.inputs).double())
            parts = each_size.outputs.parts(each_size.logits)
            assert list(parts) == list(STAGES)
            for part, found in zip(parts.values(), maps, strict=True):
                assert np.allclose(part, sketch(found.numpy()))

    def test_verify_holds_every_stage_and_size(
        self, exported: Bundle, copy_bundle: Copy, cli: Cli
    ) -> None:
        result = cli("verify", copy_bundle(exported), "--json")
        assert result.exit_code == 0, result.stdout
        report = json.loads(result.stdout)
        rules = [f["rule"] for f in report["artifacts"]["fp32"]["findings"]]
        batches = len(report["artifacts"]["fp32"]["batches"])
        assert rules.count("SQNR") == len(STAGES) * (batches + 3)  # and three other sizes

    @pytest.mark.parametrize("stage", ["stage1", "stage4"])
    def test_a_wrong_stage_is_found_and_named(
        self, exported: Bundle, copy_bundle: Copy, cli: Cli, stage: str
    ) -> None:
        path: Path = copy_bundle(exported)
        file = path / "model.onnx"
        model = onnx.load(file)
        norm = next(n for n in model.graph.node if n.name == f"norm{stage[-1]}.layernormalization")
        scale = next(t for t in model.graph.initializer if t.name == norm.input[1])
        values = onnx.numpy_helper.to_array(scale).copy()
        values[3] *= 1.01
        scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
        onnx.save(model, file)
        _digest_again(path)
        result = cli("verify", path, "--artifact", "fp32")
        assert result.exit_code == 1
        assert f"{stage}: SQNR" in " ".join(result.stdout.split())

    def test_one_wrong_number_shows_in_a_sketch(self) -> None:
        maps = np.random.default_rng(0).standard_normal((1, 16, 40, 40))
        other = maps.copy()
        other[0, 5, 7, 9] += 1.0
        exact = sqnr_db(maps.reshape(1, -1), other.reshape(1, -1))
        assert abs(sqnr_db(sketch(maps), sketch(other)) - exact) < 0.5
        assert sketch(maps).shape == (1, SKETCH)

    @each("size", [224, (224, 320), 512, (512, 1024), (800, 1333)])
    def test_golden_data_stays_small(self, size: ImageSize) -> None:
        preprocessing = replace(OFFICIAL, image_size=size, resize_size=0)
        count = golden_count(VARIANTS["van_b0"].config.backbone((0, 1, 2, 3)), preprocessing)
        height, width = preprocessing.sides
        held = count * (3 * height * width + 12 * SKETCH * 4)
        others, originals = 4 * 2 * 12 * SKETCH * 4, 2 * 400_000
        assert held + others + originals <= 8_000_000 or count == 2
        assert count >= 2

    def test_drift_and_inspect_serve_it(
        self, exported: Bundle, copy_bundle: Copy, cli: Cli
    ) -> None:
        path: Path = copy_bundle(exported)
        drift = cli("drift", path, "--level", "stage", "--against", "golden", "--json")
        assert drift.exit_code == 0, drift.stdout
        rows = json.loads(drift.stdout)["artifacts"]["fp16"]["rows"]
        assert [row["name"] for row in rows] == list(STAGES)
        assert min(row["isolated_db"] for row in rows) > 50
        inspected = cli("inspect", exported.path / "model.onnx", "--json")
        assert "stage4_height" in inspected.stdout

    @pytest.mark.slow
    def test_bench_times_it(self, exported: Bundle, cli: Cli) -> None:
        words = "--runners ort-cpu/fp32 --runners pytorch --batches 2 --seconds 0.05 --limit 0.1"
        more = "--warmup 0.01 --calls 3 --rounds 2 --no-roofline --no-save --json"
        timed = cli("bench", exported.path, *words.split(), *more.split())
        assert timed.exit_code == 0, timed.stderr
        rows = json.loads(timed.stdout)["rows"]
        assert {row["contender"] for row in rows} == {"ort-cpu/fp32", "pytorch"}
        assert {tuple(row["image_size"]) for row in rows} == {(32, 64)}

    def test_any_size_of_the_range_runs(self, exported: Bundle, checkpoint: Path) -> None:
        images = np.random.default_rng(0).standard_normal((2, 3, 64, 33)).astype(np.float32)
        expected = maps_of(load_van(str(checkpoint)).model, torch.from_numpy(images))
        for name, least in (("fp32", 110), ("fp16", 50), ("bf16", 35)):
            with Network(exported, name) as network:
                found = network.run(images)
            assert all(sqnr_db(expected[stage], found[stage]) > least for stage in STAGES)

    @each("command", ["predict {} x.png", "evaluate {} --images x"])
    def test_what_is_of_classes_is_refused(self, exported: Bundle, cli: Cli, command: str) -> None:
        result = cli(*command.format(exported.path).split())
        assert result.exit_code == 2, result.stderr
        told, name = " ".join(result.stderr.split()), command.split()[0]
        assert f"returns feature maps (stage1, stage2, stage3, stage4), and `{name}` needs" in told

    def test_engines_are_built_of_it(self, exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
        path: Path = copy_bundle(exported)
        words = "--precision fp32 --precision bf16 --target sm_89"
        result = cli("build", path, *words.split())
        assert result.exit_code == 0, result.stderr
        engine = next(a for a in Bundle.open(path).artifacts.values() if a.kind == "engine")
        sidecar = json.loads((path / engine.file).with_suffix(".json").read_text())
        assert [output["name"] for output in sidecar["outputs"]] == list(STAGES)
        assert sidecar["options"]["dynamic_size"] == {"min": 32, "opt": [32, 64], "max": [64, 96]}


def _digest_again(path: Path) -> None:
    """Make the manifest vouch for the files as they are now."""
    with edit_bundle(path) as draft:
        artifact = draft.artifacts["fp32"]
        for file in artifact.files:
            draft.file(file).write_bytes((path / file).read_bytes())
        draft.record(artifact)


@pytest.mark.slow
def test_int8_of_the_digits_backbone(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "b"
    result = cli("export", "van_digits", "--features", "--output", path, "--batch", "1:2:4")
    assert result.exit_code == 0, result.stderr
    for more in ((), ("--target", "cpu"), ("--scope", "all")):
        made = cli("quantize", path, "--precision", "int8", *more)
        assert made.exit_code == 0, made.stdout
    verified = cli("verify", path)
    assert verified.exit_code == 0, verified.stdout


@each(
    ("options", "message"),
    [
        ("--features --outputs probabilities", "--features exports feature maps, and --out"),
        ("--out-indices 1", "--out-indices selects feature maps, and --features is not set."),
        ("--features --out-indices 1,4", "The stages 1, 4 are not some of 0 to 3"),
        ("--features --out-indices 1,1", "The stages 1, 1 are not some of 0 to 3"),
        ("--features --labels x.txt", "--features exports feature maps, and --labels needs"),
        ("--image-size 224x", "'--image-size' is '224x': it should be a side or height x wid"),
        ("--image-size 16x64", "should be greater than or equal to 32"),
        ("--dynamic-size 96:64:128", "size range 96:64:128 is not min <= opt <= max"),
        ("--dynamic-size 64x96:96x64:128", "size range 64x96:96x64:128 is not min <= op"),
        ("--dynamic-size 64:big:128", "should be a side or height x width in pixels: 224"),
        ("--dynamic-size 64:128", "it should be min:opt:max, such as 192:224:512"),
        ("--dynamic-size 16:64:128", "should be greater than or equal to 32"),
        ("--dynamic-size 64:96:128 --image-size 224", "224x224 is outside --dynamic-size 64:96"),
        ("--batch 8:4:2", "The batch range 8:4:2 is not min <= opt <= max."),
        ("--batch 0", "'--batch.min' is 0: it should be greater than or equal to 1"),
    ],
)
def test_bad_requests_are_one_message(cli: Cli, tmp_path: Path, options: str, message: str) -> None:
    result = cli("export", "van_digits", *options.split(), "--output", tmp_path / "b")
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "b").exists()


def test_max_drop_is_of_classes(exported: Bundle) -> None:
    with pytest.raises(UsageError, match="exports feature maps, and --max-drop needs classes"):
        quantize_bundle(exported.path, QuantizeSettings(max_drop=1.0))
