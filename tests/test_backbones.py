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

import van_deploy as vd
from tests.artifacts import Copy
from tests.checks import faults
from tests.checks.conftest import overwrite_artifact
from tests.conftest import Cli
from tests.each import each
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import SKETCH, golden_count, sketch
from van_deploy.config.sizes import ImageSize
from van_deploy.metrics import sqnr_db
from van_deploy.model.checkpoint import load_van, network_from_state
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig

TINY = VanConfig((8, 12, 16, 24), (1, 2, 1, 1), (4, 4, 2, 2), num_classes=5)
STAGES = ("stage1", "stage2", "stage3", "stage4")
SELECTED = (("stage3",), ("stage1", "stage4"))
CONFIG = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', pretrained=None, backbone=dict(type='van_tiny'))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(2048, 512), transforms=[])]
"""


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


# --- loading ---------------------------------------------------------------------------------


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


# --- the bundle ------------------------------------------------------------------------------


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
