"""Batches, sizes and outputs: every combination of them, and backbones in every command."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import van_deploy as vd
from tests.artifacts import Copy, int8_graph
from tests.checks import faults
from tests.checks.conftest import overwrite_artifact
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import SKETCH, golden_count, sketch
from van_deploy.checks.outputs import batch_sizes
from van_deploy.config import BatchRange
from van_deploy.config.sizes import ImageSize, SizeRange, height_width
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.files import operator_counts
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import load_van, network_from_state
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN, random_van, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.precision.fp16 import bf16_from_fp32, default_fp32_nodes, fp16_from_fp32
from van_deploy.runners.onnxruntime import onnxruntime_outputs
from van_deploy.schema import validate

TINY = VanConfig((8, 12, 16, 24), (1, 1, 2, 1), (4, 4, 2, 2), num_classes=5)
STAGES = ("stage1", "stage2", "stage3", "stage4")
SELECTED = (("stage3",), ("stage1", "stage4"))
CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', pretrained=None, backbone=dict(type='van_tiny'))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2048, 512), transforms=[])]
"""
OPERATORS = {"Conv", "Gelu", "Add", "Mul", "Transpose", "LayerNormalization", "ReduceMean", "Gemm"}
SIZES: dict[str, tuple[ImageSize, SizeRange | None]] = {
    "square": (64, None),
    "64x96": ((64, 96), None),
    "dynamic size": ((64, 96), SizeRange(32, (64, 96), (96, 128))),
}
MIN_DB = {"fp32": 105.0, "fp16": 50.0, "bf16": 34.0, "int8": 20.0}
ALL = list(itertools.product((None, 2), SIZES, ((), (0, 2))))
FAST = (
    *((None, "64x96", (0, 2)), (None, "dynamic size", ())),
    *((2, "square", (0, 2)), (2, "dynamic size", (0, 2))),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint in the format of VAN-Segmentation; tests must not change it."""
    body = random_van(TINY, seed=7).state_dict()
    state = {f"backbone.{n}": t for n, t in body.items() if not n.startswith("head.")}
    state["decode_head.conv_seg.weight"] = torch.ones(150, 16, 1, 1)
    state["auxiliary_head.convs.0.conv.weight"] = torch.ones(16, 16, 3, 3)
    meta = {"CLASSES": [f"thing {n}" for n in range(150)], "config": CONFIG, "iter": 40000}
    path = tmp_path_factory.mktemp("segmenter") / "upernet_van.pth"
    torch.save({"state_dict": state, "meta": meta, "optimizer": {}}, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Bundle:
    """Return its backbone as a bundle with dynamic batch and size; tests must not change it."""
    options: Any = {"features": True, "batch": "1:2:3", "dynamic_size": "32:32x64:64x96"}
    path = checkpoint.with_name("bundle")
    assert vd.export(checkpoint, path, **options, precision=["fp16", "bf16"])
    return Bundle.open(path)


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


# --- combinations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size", "indices"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_every_combination_agrees_with_pytorch(
    batch: int | None, size: str, indices: tuple[int, ...]
) -> None:
    native, sizes = SIZES[size]
    config = TINY.backbone(indices) if indices else TINY
    network = network_from_state(random_van(TINY, seed=5).state_dict(), config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = smooth_images(8, 3, 128)
    height, width = height_width(native)
    folded = fold_van(network, images[:1, :, :height, :width]).model
    fp32 = onnx_from_van(folded, native, batch=batch, sizes=sizes)
    operators = operator_counts(fp32)
    assert set(operators) <= OPERATORS
    assert operators["Gelu"] == 2 * (sum(TINY.depths[:3]) if indices else sum(TINY.depths))
    dims = [d.dim_param or d.dim_value for d in fp32.graph.input[0].type.tensor_type.shape.dim]
    assert dims == [batch or "batch", 3, *(("height", "width") if sizes else (height, width))]
    kept = default_fp32_nodes(fp32)
    graphs = {
        "fp32": fp32,
        "fp16": fp16_from_fp32(fp32, kept),
        "bf16": bf16_from_fp32(fp32, kept),
        "int8": int8_graph(fp32, config, [images[:, :, :height, :width].numpy()]),
    }
    for graph in graphs.values():
        onnx.checker.check_model(graph, full_check=True)
    network = network.double()
    for at in sizes.sample_sizes() if sizes else (native,):
        rows, columns = height_width(at)
        crops = images[:2, :, :rows, :columns].contiguous()
        with torch.no_grad():
            outputs = network(crops.double())
        expected = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, graph in graphs.items():
            actual = onnxruntime_outputs(graph, crops.numpy())
            assert list(actual) == list(config.output_names)
            for stage, value in zip(expected, actual.values(), strict=True):
                assert sqnr_db(stage.numpy(), value) >= MIN_DB[name], (name, at)


def test_ranges_of_sizes_and_batches() -> None:
    sizes = SizeRange(64, (64, 96), (96, 128))
    assert (sizes.contains((96, 64)), sizes.contains((97, 64))) == (True, False)
    assert str(sizes) == "64:64x96:96x128"
    assert SizeRange(64, 64, 64).sample_sizes() == (64,)
    sizes = SizeRange((64, 32), (64, 48), (64, 64))
    assert sizes.sample_sizes() == ((64, 32), (64, 48), (64, 49), 64)
    eight, rising = validate(BatchRange, "8"), validate(BatchRange, "1:8:8")
    assert (batch_sizes(eight), eight.fixed, rising.fixed) == ((8,), 8, None)
    assert batch_sizes(BatchRange()) == (1, 2, 3, 5, 8, 32)
    assert batch_sizes(BatchRange(1, 2, 2)) == (1, 2)


def test_fixed_batch_and_dynamic_size_in_every_command(
    digits_bundle: Bundle, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "b"
    sizes = "--image-size 64x96 --dynamic-size 64:64x96:96x128"
    cli.passes(f"export van_digits --batch 3 {sizes} --output", path)
    for precision in ("fp16", "bf16"):
        cli.passes(f"quantize --precision {precision}", path)
    fp32 = cli.document("verify", path)["artifacts"]["fp32"]
    assert [row["batch"] for row in fp32["batches"]] == [3]  # 16 images in batches of 3
    assert [finding["rule"] for finding in fp32["findings"]].count("SQNR") == 2 + 3  # sizes
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    cli.passes("build --precision fp16 --target sm_89", path)
    (file,) = path.glob("engines/*.json")
    assert json.loads(file.read_text())["inputs"][0]["shape"] == [3, 3, -1, -1]
    for bundle, code, option, message in (
        (path, 5, "--batch 1:2:4", "has a fixed batch of 3, so it cannot serve 1:2:4"),
        (path, 2, "--dynamic-size 64:32:96", "is not min <= opt <= max"),
        (digits_bundle.path, 5, "--dynamic-size 64:64:96", "size, so it cannot serve 64:64:96"),
    ):
        assert message in cli.fails(code, f"build --target sm_89 {option}", bundle)


# --- backbones --------------------------------------------------------------------------------


def test_backbone_of_a_segmenter(checkpoint: Path) -> None:
    loaded = load_van(str(checkpoint))
    assert loaded.config.out_indices == (0, 1, 2, 3)
    assert loaded.config.num_classes == 0
    assert loaded.class_names is None
    assert np.allclose(loaded.preprocessing.mean, np.array([123.675, 116.28, 103.53]) / 255)
    notes = "; ".join(loaded.source.notes)
    assert "a backbone (official names), without a classification head" in notes
    assert "not the network's: decode_head.conv_seg.weight, auxiliary_head.convs" in notes
    images = torch.randn(2, 3, 64, 96)
    original = random_van(TINY, seed=7)
    selected = [network_from_state(original.state_dict(), TINY.backbone(i)) for i in ((2,), (0, 3))]
    expected = feature_maps(original, images)
    for network, names in zip((loaded.model, *selected), (STAGES, *SELECTED), strict=True):
        with torch.no_grad():
            actual = dict(zip(names, network(images), strict=True))
        assert all(np.allclose(expected[n], actual[n].numpy(), atol=1e-5) for n in names)


def test_commands_check_every_stage_and_size(exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
    path = copy_bundle(exported)
    fp32 = cli.document("verify", path)["artifacts"]["fp32"]
    rules = [finding["rule"] for finding in fp32["findings"]]
    assert rules.count("SQNR") == len(STAGES) * (len(fp32["batches"]) + 3)  # and 3 other sizes
    drift = cli.document("drift --level stage --against golden", path)
    rows = drift["artifacts"]["fp16"]["rows"]
    assert [row["name"] for row in rows] == list(STAGES)
    assert min(row["isolated_db"] for row in rows) > 50
    assert "stage4_height" in cli.passes("inspect", "--json", path / "model.onnx")


@pytest.mark.parametrize("stage", ["stage1", "stage4"])
def test_verify_detects_changed_maps(
    exported: Bundle, copy_bundle: Copy, cli: Cli, stage: str
) -> None:
    path = copy_bundle(exported)
    model = onnx.load(path / "model.onnx")
    norm = next(n for n in model.graph.node if n.name == f"norm{stage[-1]}.layernormalization")
    scale = faults.initializers(model)[norm.input[1]]
    values = onnx.numpy_helper.to_array(scale).copy()
    values[3] *= 1.01
    faults.set_values(scale, values)
    overwrite_artifact(Bundle.open(path), "fp32", model)
    assert f"{stage}: SQNR" in cli.fails(1, "verify", path, "--artifact", "fp32")


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


@pytest.mark.slow
def test_bench(exported: Bundle, cli: Cli) -> None:
    command = (
        "bench --runners ort-cpu/fp32 --runners pytorch --batches 2 --seconds 0.05 --limit 0.1 "
        "--warmup 0.01 --calls 3 --rounds 2 --no-roofline --no-save"
    )
    rows = cli.document(command, exported.path)["rows"]
    assert {row["contender"] for row in rows} == {"ort-cpu/fp32", "pytorch"}
    assert {tuple(row["image_size"]) for row in rows} == {(32, 64)}


@each(
    ("command", "message"),
    [
        ("export {checkpoint} --output b", "a classification head: it has no logits. Export its"),
        ("predict {bundle} x.png", "(stage1, stage2, stage3, stage4), and `predict` needs"),
        ("evaluate {bundle} --images x", "(stage1, stage2, stage3, stage4), and `evaluate` needs"),
        ("quantize {bundle} --precision int8 --max-drop 1", "feature maps, and --max-drop"),
    ],
)
def test_requests_for_classes_are_refused(
    checkpoint: Path, exported: Bundle, cli: Cli, command: str, message: str
) -> None:
    command = command.format(checkpoint=checkpoint, bundle=exported.path)
    assert message in cli.fails(2, command)


def test_build_engines(exported: Bundle, copy_bundle: Copy, cli: Cli) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    path = copy_bundle(exported)
    cli.passes("build --precision fp32 --precision bf16 --target sm_89", path)
    for file in path.glob("engines/*.json"):
        sidecar = json.loads(file.read_text())
        assert [output["name"] for output in sidecar["outputs"]] == list(STAGES)
        assert sidecar["options"]["dynamic_size"] == {"min": 32, "opt": [32, 64], "max": [64, 96]}
    assert len(list(path.glob("engines/*.json"))) == 2


@pytest.mark.slow
def test_int8(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "b"
    cli.passes("export van_digits --features --batch 1:2:4 --output", path)
    for options in ("", "--target cpu", "--scope all"):
        cli.passes(f"quantize --precision int8 {options}", path)
    cli.passes("verify", path)
