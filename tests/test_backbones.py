"""Backbones: feature maps of a segmenter's checkpoint, in every command."""

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
from van_deploy.config import BatchRange, ExportSettings, ModelSettings, QuantizeSettings, Recipe
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


def write_segmenter(path: Path, config: str = CONFIG) -> None:
    """Write a checkpoint in the format of VAN-Segmentation."""
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
    """Return a segmenter's checkpoint; tests must not change it."""
    return artifact_cache("upernet_van.pth", write_segmenter)


@pytest.fixture(scope="session")
def exported(artifact_cache: ArtifactCache, checkpoint: Path) -> Bundle:
    """Return its backbone as a bundle with dynamic batch and size; tests must not change it."""

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


def feature_maps(model: VAN, images: Tensor) -> dict[str, Any]:
    """Return a network's feature maps by name, without using its ``forward``."""
    maps, x = {}, images
    with torch.no_grad():
        for stage in range(1, 5):
            x = model.get_submodule(f"patch_embed{stage}")(x)
            for block in model.get_submodule(f"block{stage}").children():
                x = block(x)
            tokens = x.flatten(2).transpose(1, 2)
            normed = model.get_submodule(f"norm{stage}")(tokens)
            x = normed.transpose(1, 2).reshape(x.shape)
            maps[f"stage{stage}"] = x.numpy()
    return maps


# --- loading ---------------------------------------------------------------------------------


def test_backbone_of_a_segmenter(checkpoint: Path) -> None:
    loaded = load_van(str(checkpoint))
    assert loaded.config.out_indices == (0, 1, 2, 3)
    assert loaded.config.num_classes == 0
    assert loaded.class_names is None
    assert np.allclose(loaded.preprocessing.mean, np.array([123.675, 116.28, 103.53]) / 255)
    notes = "; ".join(loaded.source.notes)
    assert "a backbone (official names), without a classification head" in notes
    assert "not the network's: decode_head.conv_seg.weight, decode_head.conv_seg.bias" in notes
    images = torch.randn(2, 3, 64, 96)
    expected = feature_maps(random_van(TINY, seed=7), images)
    with torch.no_grad():
        actual = dict(zip(STAGES, loaded.model(images), strict=True))
    assert all(np.allclose(expected[n], actual[n].numpy(), atol=1e-5) for n in STAGES)


def test_export_needs_features_option(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("export", checkpoint, "--output", tmp_path / "b")
    assert result.exit_code == 2
    output = " ".join(result.stderr.split())
    assert "is a backbone without a classification head: it has no logits." in output
    assert "Export its feature maps with --features." in output


# --- the graph -------------------------------------------------------------------------------


@pytest.mark.parametrize("out_indices", [(2,), (0, 3)])
def test_graph_outputs_selected_stages(out_indices: tuple[int, ...]) -> None:
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
    depths = sum(TINY.depths[: max(out_indices) + 1])  # later stages are not in the graph
    assert sum(node.op_type == "Gelu" for node in graph.graph.node) == 2 * depths
    outputs = onnxruntime_outputs(graph, images.numpy())
    expected = feature_maps(model.double(), images.double())
    assert all(sqnr_db(expected[name], outputs[name]) >= 120 for name in names)


# --- the bundle ------------------------------------------------------------------------------


def test_outputs_in_the_manifest(exported: Bundle) -> None:
    manifest = exported.manifest
    assert manifest.architecture.output_names == STAGES
    graph = exported.artifact("fp32").graph
    assert graph is not None
    assert graph.inputs["images"].shape == ("batch", 3, "height", "width")
    assert graph.outputs["stage3"].shape == ("batch", 16, "stage3_height", "stage3_width")
    assert exported.artifact("fp32").golden_sqnr_db.popitem()[1] >= 120


def test_golden_samples_sketch_the_maps(exported: Bundle, checkpoint: Path) -> None:
    samples = golden_samples(exported)
    assert [other.size for other in samples.others] == ["32x32", "49x65", "64x96"]
    model = load_van(str(checkpoint)).model.double()
    for golden in (samples, *samples.others):
        with torch.no_grad():
            maps = model(torch.from_numpy(golden.inputs).double())
        parts = golden.outputs.parts(golden.logits)
        assert list(parts) == list(STAGES)
        for part, values in zip(parts.values(), maps, strict=True):
            assert np.allclose(part, sketch(values.numpy()))


def test_verify_checks_every_stage_and_size(exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
    report = json.loads(run(cli, "verify --json", copy_bundle(exported)))
    rules = [f["rule"] for f in report["artifacts"]["fp32"]["findings"]]
    batches = len(report["artifacts"]["fp32"]["batches"])
    assert rules.count("SQNR") == len(STAGES) * (batches + 3)  # and three other sizes


@pytest.mark.parametrize("stage", ["stage1", "stage4"])
def test_verify_detects_changed_maps(
    exported: Bundle, copy_bundle: Copy, cli: Cli, stage: str
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
    update_digests(path)
    result = cli("verify", path, "--artifact", "fp32")
    assert result.exit_code == 1
    assert f"{stage}: SQNR" in " ".join(result.stdout.split())


def test_sketch_detects_one_incorrect_value() -> None:
    maps = np.random.default_rng(0).standard_normal((1, 16, 40, 40))
    other = maps.copy()
    other[0, 5, 7, 9] += 1.0
    exact = sqnr_db(maps.reshape(1, -1), other.reshape(1, -1))
    assert abs(sqnr_db(sketch(maps), sketch(other)) - exact) < 0.5
    assert sketch(maps).shape == (1, SKETCH)


@each("size", [224, (224, 320), 512, (512, 1024), (800, 1333)])
def test_golden_data_stays_small(size: ImageSize) -> None:
    preprocessing = replace(OFFICIAL, image_size=size, resize_size=0)
    count = golden_count(VARIANTS["van_b0"].config.backbone((0, 1, 2, 3)), preprocessing)
    height, width = preprocessing.sides
    stored = count * (3 * height * width + 12 * SKETCH * 4)
    others, originals = 4 * 2 * 12 * SKETCH * 4, 2 * 400_000
    assert stored + others + originals <= 8_000_000 or count == 2
    assert count >= 2


def test_drift_and_inspect(exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
    drift = run(cli, "drift --level stage --against golden --json", copy_bundle(exported))
    rows = json.loads(drift)["artifacts"]["fp16"]["rows"]
    assert [row["name"] for row in rows] == list(STAGES)
    assert min(row["isolated_db"] for row in rows) > 50
    assert "stage4_height" in run(cli, "inspect --json", exported.path / "model.onnx")


@pytest.mark.slow
def test_bench(exported: Bundle, cli: Cli) -> None:
    options = "--runners ort-cpu/fp32 --runners pytorch --batches 2 --seconds 0.05 --limit 0.1"
    more = "--warmup 0.01 --calls 3 --rounds 2 --no-roofline --no-save --json"
    rows = json.loads(run(cli, f"bench {options} {more}", exported.path))["rows"]
    assert {row["contender"] for row in rows} == {"ort-cpu/fp32", "pytorch"}
    assert {tuple(row["image_size"]) for row in rows} == {(32, 64)}


def test_dynamic_size(exported: Bundle, checkpoint: Path) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 33)).astype(np.float32)
    expected = feature_maps(load_van(str(checkpoint)).model, torch.from_numpy(images))
    for name, least in (("fp32", 110), ("fp16", 50), ("bf16", 35)):
        with Network(exported, name) as network:
            actual = network.run(images)
        assert all(sqnr_db(expected[stage], actual[stage]) > least for stage in STAGES)


@each("command", ["predict {} x.png", "evaluate {} --images x"])
def test_classification_commands_are_refused(exported: Bundle, cli: Cli, command: str) -> None:
    result = cli(*command.format(exported.path).split())
    assert result.exit_code == 2, result.stderr
    output, name = " ".join(result.stderr.split()), command.split()[0]
    assert f"returns feature maps (stage1, stage2, stage3, stage4), and `{name}` needs" in output


def test_build_engines(exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    path: Path = copy_bundle(exported)
    run(cli, "build --precision fp32 --precision bf16 --target sm_89", path)
    engine = next(a for a in Bundle.open(path).artifacts.values() if a.kind == "engine")
    sidecar = json.loads((path / engine.file).with_suffix(".json").read_text())
    assert [output["name"] for output in sidecar["outputs"]] == list(STAGES)
    assert sidecar["options"]["dynamic_size"] == {"min": 32, "opt": [32, 64], "max": [64, 96]}


def run(cli: Cli, command: str, *arguments: str | Path) -> str:
    """Run a command, which must succeed, and return its output."""
    result = cli(*command.split(), *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def update_digests(path: Path) -> None:
    """Write the digests of the current files to the manifest."""
    with edit_bundle(path) as draft:
        artifact = draft.artifacts["fp32"]
        for file in artifact.files:
            draft.file(file).write_bytes((path / file).read_bytes())
        draft.record(artifact)


@pytest.mark.slow
def test_int8(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "b"
    run(cli, "export van_digits --features --batch 1:2:4 --output", path)
    for options in ("", "--target cpu", "--scope all"):
        run(cli, f"quantize --precision int8 {options}", path)
    run(cli, "verify", path)


@each(
    ("options", "message"),
    [
        ("--features --outputs probabilities", "--features exports feature maps, and --out"),
        ("--out-indices 1", "--out-indices selects feature maps, and "),
        ("--features --out-indices 1,4", "The stages 1, 4 are not distinct numbers of 0 to 3"),
        ("--features --out-indices 1,1", "The stages 1, 1 are not distinct numbers of 0 to 3"),
        ("--features --labels x.txt", "--features exports feature maps, and --labels needs"),
        ("--image-size 224x", "'--image-size' is '224x': it should be a side or height x wid"),
        ("--image-size 16x64", "should be greater than or equal to 32"),
        ("--dynamic-size 64x96:96x64:128", "size range 64x96:96x64:128 is not min <= op"),
        ("--dynamic-size 64:big:128", "should be a side or height x width in pixels: 224"),
        ("--dynamic-size 64:128", "it should be min:opt:max, such as 192:224:512"),
        ("--dynamic-size 16:64:128", "should be greater than or equal to 32"),
        ("--dynamic-size 64:96:128 --image-size 224", "224x224 is outside --dynamic-size 64:96"),
    ],
)
def test_invalid_options(cli: Cli, tmp_path: Path, options: str, message: str) -> None:
    result = cli("export", "van_digits", *options.split(), "--output", tmp_path / "b")
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "b").exists()


def test_max_drop_needs_a_classifier(exported: Bundle) -> None:
    with pytest.raises(UsageError, match="feature maps, and --max-drop"):
        quantize_bundle(exported.path, QuantizeSettings(max_drop=1.0))
