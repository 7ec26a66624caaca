"""Loading a network from a variant, a file or a repository, with its metadata and notes."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.each import each
from tests.manifest_parts import network_info
from tests.model.conftest import FakeHub, rename
from van_deploy.bundle import Bundle, edit_bundle
from van_deploy.errors import BundleError, CheckpointError, DownloadError, UsageError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.files import LICENCE
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.van import VAN, random_van
from van_deploy.model.variants import VARIANTS, VanConfig
from van_deploy.runners.network import original_network

# The processor that Transformers' conversion script uploaded with the official weights: ConvNeXt's.
IMAGENET_COLOUR = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CONVNEXT: dict[str, Any] = {f"image_{key}": value for key, value in IMAGENET_COLOUR.items()}
CONVNEXT |= {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875}
CONVNEXT |= {"resample": 3, "size": 224}
IMAGENET = "crop 0.875, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"


@pytest.fixture
def checkpoint(tiny: VAN, tmp_path: Path) -> Path:
    """Return a checkpoint of the tiny network without metadata."""
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "mine.pth.tar")
    return tmp_path / "mine.pth.tar"


def has_equal_outputs(loaded: LoadedVan, model: VAN) -> bool:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return torch.equal(loaded.model(images), model(images))


# --- files -----------------------------------------------------------------------------------


def test_load_from_path(checkpoint: Path, tiny: VAN, tiny_config: VanConfig) -> None:
    loaded = load_van(str(checkpoint))
    assert has_equal_outputs(loaded, tiny)
    assert (loaded.name, loaded.config, loaded.class_names) == ("mine", tiny_config, None)
    source = loaded.source
    assert (source.spec, source.path) == (str(checkpoint), str(checkpoint))
    assert (source.format, source.container, source.seed) == ("official", "state_dict", None)
    assert source.notes == ()
    assert loaded.preprocessing.source.startswith("assumed: the official weights'")
    (checkpoint.parent / "flowers").mkdir()
    plain = checkpoint.rename(checkpoint.parent / "flowers" / "model_best.pth.tar")
    assert load_van(str(plain)).name == load_van(str(plain.parent)).name == "flowers"


def test_safetensors_metadata(tmp_path: Path, tiny: VAN) -> None:
    expected = OFFICIAL.override(image_size=96, crop_pct=1.0, crop_mode="squash")
    names = ("a", "b", "c", "d", "e")
    metadata = {"preprocessing": json.dumps(expected.as_dict()), "classes": json.dumps(names)}
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    loaded = load_van(str(tmp_path / "w.safetensors"))
    assert has_equal_outputs(loaded, tiny)
    assert (loaded.preprocessing, loaded.class_names) == (expected, names)
    flat = {"mean": "[0.1, 0.2, 0.3]", "interpolation": "bilinear"}
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata=flat)
    assert load_van(str(tmp_path / "w.safetensors")).preprocessing.mean == (0.1, 0.2, 0.3)


def test_folder_and_file_are_equivalent(tmp_path: Path, tiny: VAN) -> None:
    folder = tmp_path / "van-mine"
    folder.mkdir()
    save_file(rename(tiny.state_dict(), "transformers"), folder / "model.safetensors")
    labels = {str(index): f"class {index}" for index in range(5)}
    config = {"model_type": "van", "layer_norm_eps": 1e-5, "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(CONVNEXT))
    loaded, file = load_van(str(folder)), load_van(str(folder / "model.safetensors"))
    assert loaded.name == file.name == "van-mine"
    assert (loaded.config, loaded.preprocessing) == (file.config, file.preprocessing)
    assert (loaded.class_names, loaded.source.notes) == (tuple(labels.values()), file.source.notes)
    assert loaded.config.layer_norm_eps == loaded.model.get_submodule("norm4").eps == 1e-5
    assert loaded.preprocessing.source == "the preprocessor_config.json beside the weights"
    ends = ("layer_norm_eps 1e-05", f"224x224 bicubic, {IMAGENET}", "id2label in config.json")
    assert all(n.endswith(end) for n, end in zip(loaded.source.notes, ends, strict=True))


def test_four_formats_give_equal_logits_and_pixels(tmp_path: Path, tiny: VAN) -> None:
    """The formats are those of the official code, Transformers, timm and mmpretrain."""
    names = [f"class {index}" for index in range(5)]
    resize = {**IMAGENET_COLOUR, "crop_pct": 0.875, "interpolation": "bicubic"}
    text = """
model = dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-06)))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=73, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]"""
    classes = {"class_to_idx": {name: index for index, name in enumerate(names)}}
    cfg = {"label_names": names, "pretrained_cfg": {**resize, "input_size": [3, 64, 64]}}
    configs = {"model_type": "van", "id2label": dict(enumerate(names))}
    processor = {**CONVNEXT, "size": 64}
    meta = {"cfg": text, "dataset_meta": {"classes": names}}
    forms: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("official", {"args": argparse.Namespace(**resize, img_size=64), **classes}, {}),
        ("transformers", {}, {"config": configs, "preprocessor_config": processor}),
        ("official", {}, {"config": {"architecture": "van_mine", **cfg}}),
        ("mmpretrain", {"meta": meta}, {}),
    )
    image = Image.effect_mandelbrot((150, 100), (-2, -1.5, 1, 1.5), 100)
    # Transformers rounds the centre crop down, so this image needs no rounding.
    exact = Image.effect_mandelbrot((144, 73), (-2, -1.5, 1, 1.5), 100)
    transforms = []
    for number, (target, inside, beside) in enumerate(forms):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save({"state_dict": rename(tiny.state_dict(), target), **inside}, folder / "w.pth")
        for name, value in beside.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
        loaded = load_van(str(folder))
        assert has_equal_outputs(loaded, tiny), number
        assert loaded.class_names == tuple(names), number
        transforms.append(loaded.preprocessing.transform())
    official, transformers, timm, mmpretrain = transforms
    assert torch.equal(official(image), timm(image))
    assert torch.allclose(official(image), mmpretrain(image), atol=1e-6)
    assert torch.equal(official(exact), transformers(exact))


# --- variants --------------------------------------------------------------------------------


def test_random_weights() -> None:
    loaded = load_van("van_tiny", weights="random", seed=3)
    assert (loaded.name, loaded.config) == ("van_b0", VARIANTS["van_b0"].config)
    assert (loaded.source.format, loaded.source.seed, loaded.source.path) == ("random", 3, "")
    assert loaded.source.notes == ("random weights: the outputs are meaningless",)
    assert len(loaded.source.sha256) == 64
    assert loaded.preprocessing.mean == OFFICIAL.mean
    assert load_van("van_b0", weights="random", layer_norm_eps=1e-3).config.layer_norm_eps == 1e-3
    for eps in (0.0, 5.0):
        with pytest.raises(UsageError, match=rf"eps {eps} is not between 0 and 1"):
            load_van("van_b0", weights="random", layer_norm_eps=eps)


def test_variant_with_a_checkpoint(shared_checkpoint: Path, checkpoint: Path) -> None:
    loaded = load_van("van_b0", weights=str(shared_checkpoint))
    assert (loaded.name, loaded.config.num_classes, loaded.source.notes) == ("van_b0", 10, ())
    assert str(loaded.preprocessing) == f"64x64 bicubic, {IMAGENET.replace('0.875', '1')}"
    assert loaded.preprocessing.source == "the checkpoint's own training arguments"
    with pytest.raises(CheckpointError, match="not of van_b1 but of van_b0: "):
        load_van("van_b1", weights=str(shared_checkpoint))
    with pytest.raises(CheckpointError, match="not of van_b0 but of another architecture: "):
        load_van("van_b0", weights=str(checkpoint))


@each(
    ("spec", "options", "error", "message"),
    [
        ("van_b4", {}, UsageError, "van_b4 has no public .*mmpretrain .*--weights"),
        ("van_b5", {}, UsageError, "van_b5 has no public .*ImageNet-21K.*--weights"),
        ("van_b9", {}, UsageError, "There is no VAN variant and no file called 'van_b9'"),
        ("./x.pth", {"weights": "random"}, UsageError, "cannot be combined with --weights random"),
        (
            "van_digits",
            {"weights": "random"},
            UsageError,
            "cannot be combined with --weights random",
        ),
        ("van_b0", {"weights": "rnadom"}, UsageError, "is not an existing file, a repos"),
        ("van_b0", {"weights": "random", "container": "m"}, UsageError, "have no digest, contain"),
        ("van_digits", {"expect_sha256": "0" * 64}, DownloadError, "is another file: its SHA"),
        ("./absent.pth", {}, CheckpointError, r"absent\.pth cannot be read: No such file"),
        ("weights/absent.pth", {}, CheckpointError, r"weights/absent\.pth cannot be read: No"),
    ],
)
def test_invalid_requests(spec: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        load_van(spec, **options)


# --- the hub ---------------------------------------------------------------------------------


def publish(hub: FakeHub, repo_id: str, files: Mapping[str, Any]) -> None:
    hub.repos[repo_id] = {}
    for name, value in files.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = json.dumps(value).encode() if name.endswith(".json") else buffer.getvalue()
        hub.repos[repo_id][name] = content


def imagenet_state(config: VanConfig) -> dict[str, Tensor]:
    return random_van(replace(config, num_classes=1000), seed=1).state_dict()


def test_public_weights_by_name(hub: FakeHub) -> None:
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    state = imagenet_state(VARIANTS["van_b0"].config)
    empty = argparse.Namespace(mean=None, std=None, img_size=None, interpolation="", crop_pct=None)
    publish(hub, repo, {file: {"state_dict": state, "args": empty}})
    loaded = load_van("van_b0")
    assert loaded.preprocessing == OFFICIAL
    assert loaded.class_names is not None
    assert (loaded.class_names[0], len(loaded.class_names)) == ("tench, Tinca tinca", 1000)
    assert LICENCE in loaded.source.notes
    assert has_equal_outputs(load_van("van_b0", offline=True), loaded.model)


def test_official_transformers_repository(hub: FakeHub, tiny_config: VanConfig) -> None:
    state = rename(imagenet_state(tiny_config), "transformers")
    state |= {"van.layernorm.weight": torch.ones(24), "van.layernorm.bias": torch.zeros(24)}
    repo_id = "Visual-Attention-Network/van-tiny"
    publish(hub, repo_id, {"pytorch_model.bin": state, "preprocessor_config.json": CONVNEXT})
    loaded = load_van(repo_id)
    assert (loaded.name, loaded.preprocessing) == ("van-tiny", OFFICIAL)
    assert loaded.source.notes[-2].endswith("network's: van.layernorm.weight, van.layernorm.bias")
    assert f"has 224x224 bicubic, {IMAGENET}; the weights were t" in loaded.source.notes[-1]
    assert f"with {OFFICIAL}, which is used" in loaded.source.notes[-1]


# --- overrides ---------------------------------------------------------------------------------


@each(("form", "eps"), [("official", 1e-6), ("transformers", 1e-6), ("mmpretrain", 1e-5)])
def test_layer_norm_eps(checkpoint: Path, tiny: VAN, form: str, eps: float) -> None:
    torch.save(rename(tiny.state_dict(), form), checkpoint)
    loaded = load_van(str(checkpoint))
    assert loaded.config.layer_norm_eps == loaded.model.get_submodule("norm1").eps == eps
    assert len(loaded.source.notes) == (form == "mmpretrain")
    assert all("mmpretrain's default 1e-05; the publ" in note for note in loaded.source.notes)
    chosen = load_van(str(checkpoint), layer_norm_eps=1e-6)
    assert has_equal_outputs(chosen, tiny)
    assert chosen.source.notes == ()


def test_overridden_metadata_is_not_validated(checkpoint: Path, tiny: VAN) -> None:
    arguments = {"input_size": [3, 64, 96, 9], "interpolation": "random", "crop_pct": 0.9}
    content = {"state_dict": tiny.state_dict(), "args": arguments, "class_to_idx": {"a": 0}}
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=r"image_size \[64, 96, 9\]"):
        load_van(str(checkpoint), own_labels=True)
    overrides = {"image_size": 64, "interpolation": "bilinear", "mean": None}
    loaded = load_van(str(checkpoint), preprocessing=overrides, own_labels=True)
    assert str(loaded.preprocessing).startswith("64x64 bilinear, crop 0.9, mean 0.5/0.5/0.5, std")
    assert "arguments (mean, std: assumed, the off" in loaded.preprocessing.source
    assert loaded.preprocessing.source.endswith("except image_size, interpolation as requested")
    with pytest.raises(CheckpointError, match="class_to_idx in the file has 1 entries"):
        load_van(str(checkpoint), preprocessing=overrides)


# --- rebuilding the network of a bundle --------------------------------------------------------


def make_bundle(loaded: LoadedVan, path: Path) -> Bundle:
    facts: dict[str, Any] = {"weights": loaded.source, "architecture": loaded.config}
    facts |= {"preprocessing": loaded.preprocessing, "class_names": loaded.class_names}
    with edit_bundle(path, name="mine") as draft:
        draft.description = network_info("mine", **facts)
    return Bundle.open(path)


def is_rebuilt(one: LoadedVan, other: LoadedVan) -> bool:
    assert (one.config, one.preprocessing) == (other.config, other.preprocessing)
    return has_equal_outputs(one, other.model)


def test_network_is_rebuilt_from_the_manifest(tmp_path: Path, tiny: VAN) -> None:
    folder = tmp_path / "van"
    folder.mkdir()
    torch.save(rename(tiny.state_dict(), "transformers"), folder / "pytorch_model.bin")
    config = {"model_type": "van", "layer_norm_eps": 1e-2, "strides": [4, 2, 2, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_van(str(folder))
    bundle = make_bundle(loaded, tmp_path / "bundle")
    (folder / "config.json").write_text('{"model_type": "van"}')
    assert is_rebuilt(original_network(bundle), loaded)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="cannot be read from"):
        original_network(bundle)
    for place in (moved, moved / "pytorch_model.bin"):
        assert is_rebuilt(original_network(bundle, place), loaded)


def test_network_is_rebuilt_with_its_container_and_head(tmp_path: Path, tiny: VAN) -> None:
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.")}
    head = torch.nn.Sequential(torch.nn.Linear(24, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    student = {**body, **{f"head.{k}": v for k, v in head.state_dict().items()}}
    both = {f"student.{name}": tensor for name, tensor in student.items()}
    both |= {f"teacher.{name}": tensor for name, tensor in tiny.state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    layers = ["linear", "tanh", "linear"]
    loaded = load_van(str(tmp_path / "w.pth"), container="state_dict.student", head=layers)
    assert is_rebuilt(original_network(make_bundle(loaded, tmp_path / "bundle")), loaded)


def test_rebuild_refuses_changed_weights(checkpoint: Path, tmp_path: Path, tiny: VAN) -> None:
    bundle = make_bundle(load_van(str(checkpoint)), tmp_path / "bundle")
    for key in ("model", "state_dict"):
        torch.save({key: tiny.state_dict(), "more": 1}, checkpoint)
        with pytest.raises(BundleError, match=r"does not match|cannot be read from"):
            original_network(bundle)
    random = load_van("van_b0", weights="random", seed=1)
    assert is_rebuilt(original_network(make_bundle(random, tmp_path / "random")), random)
