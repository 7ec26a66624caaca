"""From what a user asks for to a loaded network, and what the user is told."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.each import each
from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.preprocess import OFFICIAL
from van_deploy.model.random_weights import random_van
from van_deploy.model.sources import LICENCE
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub, Rename

# What Transformers' conversion script pushed beside the official weights: ConvNeXt's processor.
CONVNEXT = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


@pytest.fixture
def saved(tiny: VAN, tmp_path: Path) -> Path:
    """Return a checkpoint of the tiny network without arguments."""
    torch.save({"state_dict": tiny.state_dict()}, tmp_path / "mine.pth.tar")
    return tmp_path / "mine.pth.tar"


def _same(loaded: LoadedVan, model: VAN) -> bool:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return torch.equal(loaded.model(images), model(images))


def _bytes(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


# --- files -----------------------------------------------------------------------------------


def test_a_path_needs_no_variant(saved: Path, tiny: VAN, tiny_config: VanConfig) -> None:
    loaded = load_van(str(saved))
    assert _same(loaded, tiny)
    assert loaded.name == "mine"
    assert loaded.config == tiny_config
    assert loaded.class_names is None
    source = loaded.source
    assert (source.spec, source.path) == (str(saved), str(saved))
    assert (source.format, source.container, source.seed) == ("official", "state_dict", None)
    assert source.notes == ()
    assert loaded.preprocessing.source == (
        "assumed: the official VAN weights' (nothing says another)"
    )


def test_the_shared_checkpoint_says_everything(shared_checkpoint: Path) -> None:
    loaded = load_van(str(shared_checkpoint))
    assert loaded.name == "van_b0_cifar10"
    assert loaded.config.num_classes == 10
    assert str(loaded.preprocessing) == (
        "64x64 bicubic, crop 1, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"
    )
    assert loaded.preprocessing.source == "the checkpoint's own training arguments"


def test_safetensors_metadata(tmp_path: Path, tiny: VAN) -> None:
    wanted = OFFICIAL.override(image_size=96, crop_pct=1.0)
    metadata = {
        "preprocessing": json.dumps(wanted.as_dict()),
        "classes": json.dumps(["a", "b", "c", "d", "e"]),
    }
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    loaded = load_van(str(tmp_path / "w.safetensors"))
    assert _same(loaded, tiny)
    assert loaded.preprocessing == wanted
    assert loaded.class_names == ("a", "b", "c", "d", "e")
    flat = {"mean": "[0.1, 0.2, 0.3]", "interpolation": "bilinear"}
    save_file(tiny.state_dict(), tmp_path / "w.safetensors", metadata=flat)
    assert load_van(str(tmp_path / "w.safetensors")).preprocessing.mean == (0.1, 0.2, 0.3)


def test_the_names_digest_is_compared(saved: Path) -> None:
    named = saved.rename(saved.parent / "van-tiny_8xb128_in1k_20220501-00000000.pth")
    (note,) = load_van(str(named)).source.notes
    assert note.startswith("the file's name promises a SHA-256 that begins with 00000000, but it")


def test_a_folder_and_the_file_in_it_are_the_same(
    tmp_path: Path, tiny: VAN, renamed: Rename
) -> None:
    folder = tmp_path / "van-mine"
    folder.mkdir()
    save_file(renamed(tiny.state_dict(), "transformers"), folder / "model.safetensors")
    labels = {str(index): f"class {index}" for index in range(5)}
    config = {"model_type": "van", "layer_norm_eps": 1e-5, "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(CONVNEXT))
    loaded, file = load_van(str(folder)), load_van(str(folder / "model.safetensors"))
    assert (loaded.name, file.name) == ("van-mine", "van-mine")
    assert (loaded.config, loaded.preprocessing) == (file.config, file.preprocessing)
    assert (loaded.class_names, loaded.source.notes) == (file.class_names, file.source.notes)
    assert loaded.config.layer_norm_eps == 1e-5
    assert loaded.model.get_submodule("norm4").eps == 1e-5
    assert loaded.class_names == tuple(labels.values())
    assert loaded.preprocessing.crop_pct == 0.875
    assert loaded.preprocessing.source == "the preprocessor_config.json beside the weights"
    assert loaded.source.notes == (
        "from the config.json beside the weights: layer_norm_eps 1e-05",
        "preprocessing from the preprocessor_config.json beside the weights: 224x224 bicubic, "
        "crop 0.875, mean 0.485/0.456/0.406, std 0.229/0.224/0.225",
        "class names from id2label in config.json",
    )


def test_four_forms_of_one_network(tmp_path: Path, tiny: VAN, renamed: Rename) -> None:
    """Official, Transformers, timm and mmpretrain: equal logits and equal pixels."""
    names = [f"class {index}" for index in range(5)]
    colour = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for form in ("official", "transformers", "timm", "mmpretrain"):
        (tmp_path / form).mkdir()
    arguments = argparse.Namespace(
        **colour, img_size=64, crop_pct=0.875, interpolation="bicubic", model="van_tiny"
    )
    official = {"state_dict": tiny.state_dict(), "args": arguments, "class_to_idx": None}
    official["class_to_idx"] = {name: index for index, name in enumerate(names)}
    torch.save(official, tmp_path / "official" / "w.pth")
    folder = tmp_path / "transformers"
    torch.save(renamed(tiny.state_dict(), "transformers"), folder / "pytorch_model.bin")
    config = {"model_type": "van", "id2label": dict(enumerate(names))}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({**CONVNEXT, "size": 64}))
    save_file(tiny.state_dict(), tmp_path / "timm" / "model.safetensors")
    cfg = {**colour, "input_size": [3, 64, 64], "crop_pct": 0.875, "interpolation": "bicubic"}
    config = {"architecture": "van_mine", "label_names": names, "pretrained_cfg": cfg}
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    text = """
model = dict(backbone=dict(type='VAN', norm_cfg=dict(type='LN', eps=1e-06)))
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=73, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]"""
    meta = {"cfg": text, "dataset_meta": {"classes": names}}
    state = renamed(tiny.state_dict(), "mmpretrain")
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "mmpretrain" / "epoch_1.pth")
    image = Image.effect_mandelbrot((150, 100), (-2, -1.5, 1, 1.5), 100)
    pixels = {}
    for form in ("official", "transformers", "timm", "mmpretrain"):
        loaded = load_van(str(tmp_path / form))
        assert _same(loaded, tiny), form
        assert loaded.class_names == tuple(names), form
        pixels[form] = loaded.preprocessing.transform()(image)
    assert torch.equal(pixels["official"], pixels["timm"])
    assert torch.allclose(pixels["official"], pixels["mmpretrain"], atol=1e-6)
    # Transformers cuts one pixel further up where the middle is between two.
    exact = Image.effect_mandelbrot((144, 73), (-2, -1.5, 1, 1.5), 100)
    assert torch.equal(
        load_van(str(tmp_path / "transformers")).preprocessing.transform()(exact),
        load_van(str(tmp_path / "official")).preprocessing.transform()(exact),
    )


def test_plain_file_names_take_their_folders(tmp_path: Path, tiny: VAN) -> None:
    (tmp_path / "flowers").mkdir()
    torch.save(tiny.state_dict(), tmp_path / "flowers" / "model_best.pth.tar")
    assert load_van(str(tmp_path / "flowers" / "model_best.pth.tar")).name == "flowers"


@pytest.mark.parametrize("digest", ["abc", "g" * 64, "sha256:" + "a" * 64])
def test_malformed_digests(saved: Path, digest: str) -> None:
    with pytest.raises(UsageError, match=r"is no SHA-256"):
        load_van(str(saved), expect_sha256=digest)


def test_expected_digest_of_a_file(saved: Path) -> None:
    right = load_van(str(saved)).source.sha256
    assert load_van(str(saved), expect_sha256=right).source.sha256 == right
    with pytest.raises(DownloadError, match="is not the file that was asked for"):
        load_van(str(saved), expect_sha256="0" * 64)


# --- variants --------------------------------------------------------------------------------


def test_random_weights_are_labelled() -> None:
    loaded = load_van("van_tiny", weights="random", seed=3)
    assert loaded.name == "van_b0"
    assert loaded.config == VARIANTS["van_b0"].config
    assert (loaded.source.format, loaded.source.seed, loaded.source.path) == ("random", 3, "")
    assert loaded.source.notes == ("random weights: the outputs mean nothing",)
    assert len(loaded.source.sha256) == 64
    assert loaded.preprocessing.mean == OFFICIAL.mean


def test_a_variant_with_weights_of_its_own(shared_checkpoint: Path) -> None:
    loaded = load_van("van_b0", weights=str(shared_checkpoint))
    assert loaded.name == "van_b0"
    assert loaded.config.num_classes == 10
    assert loaded.source.notes == (
        "the weights have 10 classes (van_b0: 1000); read from the file",
    )


def test_another_variants_weights_are_refused(shared_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_van("van_b1", weights=str(shared_checkpoint))
    assert error.value.message.startswith(
        "The weights are not van_b1's but those of van_b0: "
        "embed_dims (32, 64, 160, 256) instead of (64, 128, 320, 512); depths "
    )
    assert error.value.remedy == "Say van_b0 instead."


def test_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="van_b0's but of another architecture"):
        load_van("van_b0", weights=str(saved))


@each(("spec", "remedy"), [("van_b4", "mmpretrain's"), ("van_b5", "21K"), ("van_b6", "21K")])
def test_variants_without_public_weights(spec: str, remedy: str) -> None:
    with pytest.raises(UsageError) as error:
        load_van(spec)
    assert error.value.message == f"{spec} has no public ImageNet-1K weights on the hub."
    assert remedy in error.value.remedy
    assert "--weights" in error.value.remedy


def test_the_embedded_network() -> None:
    loaded = load_van("van_digits")
    assert (loaded.name, loaded.source.format) == ("van_digits", "embedded")
    assert loaded.class_names == tuple("0123456789")
    assert "assumed" not in loaded.preprocessing.source
    assert load_van("van_digits", expect_sha256=loaded.source.sha256)
    with pytest.raises(DownloadError, match="is not the file that was asked for"):
        load_van("van_digits", expect_sha256="0" * 64)


def test_senseless_requests(saved: Path) -> None:
    with pytest.raises(UsageError, match="There is no VAN variant called 'van_b9'"):
        load_van("van_b9")
    with pytest.raises(UsageError, match="already says which weights to use"):
        load_van(str(saved), weights="random")
    with pytest.raises(UsageError, match="already says which weights to use"):
        load_van("van_digits", weights="random")
    with pytest.raises(UsageError, match="neither a file that is here, nor a repository"):
        load_van("van_b0", weights="rnadom")
    with pytest.raises(UsageError, match="Random weights have no digest"):
        load_van("van_b0", weights="random", expect_sha256="0" * 64)
    with pytest.raises(UsageError, match="Random weights have no digest, no container and no"):
        load_van("van_b0", weights="random", container="model")
    with pytest.raises(CheckpointError, match=r"There is no file \./absent\.pth|absent\.pth"):
        load_van("./absent.pth")
    with pytest.raises(CheckpointError, match=r"There is no file weights/absent\.pth"):
        load_van("weights/absent.pth")


# --- the hub ---------------------------------------------------------------------------------


def _publish(hub: FakeHub, repo_id: str, files: Mapping[str, Any]) -> None:
    hub.repos[repo_id] = {
        name: json.dumps(value).encode() if name.endswith(".json") else value
        for name, value in files.items()
    }


def _thousand(config: VanConfig) -> dict[str, Tensor]:
    wide = VanConfig(config.embed_dims, config.depths, config.mlp_ratios)
    return random_van(wide, seed=1).state_dict()


def test_public_weights_by_name(hub: FakeHub) -> None:
    file = VARIANTS["van_b0"].weights
    assert file is not None
    state = _thousand(VARIANTS["van_b0"].config)
    empty = argparse.Namespace(mean=None, std=None, img_size=None, interpolation="", crop_pct=None)
    _publish(hub, file.repo_id, {file.filename: _bytes({"state_dict": state, "args": empty})})
    loaded = load_van("van_b0")
    assert loaded.preprocessing == OFFICIAL
    assert loaded.class_names is not None
    assert loaded.class_names[0] == "tench, Tinca tinca"
    assert len(loaded.class_names) == 1000
    assert LICENCE in loaded.source.notes
    assert any("recorded: the first download" in note for note in loaded.source.notes)
    assert _same(load_van("van_b0", offline=True), loaded.model)


def test_official_transformers_repository(
    hub: FakeHub, tiny_config: VanConfig, renamed: Rename
) -> None:
    state = renamed(_thousand(tiny_config), "transformers")
    state |= {"van.layernorm.weight": torch.ones(24), "van.layernorm.bias": torch.zeros(24)}
    repo_id = "Visual-Attention-Network/van-tiny"
    _publish(
        hub, repo_id, {"pytorch_model.bin": _bytes(state), "preprocessor_config.json": CONVNEXT}
    )
    loaded = load_van(repo_id)
    assert loaded.name == "van-tiny"
    assert loaded.preprocessing == OFFICIAL
    assert loaded.source.notes[-1] == (
        "the repository's JSON says mean 0.485/0.456/0.406, std 0.229/0.224/0.225, "
        "crop_pct 0.875; the weights were trained with mean 0.5, std 0.5, crop_pct 0.9, "
        "which is used"
    )


def test_somebody_elses_repository(hub: FakeHub, tiny: VAN, renamed: Rename) -> None:
    state = renamed(tiny.state_dict(), "transformers")
    files = {
        "pytorch_model.bin": _bytes(state),
        "preprocessor_config.json": CONVNEXT,
        "config.json": {"model_type": "van", "id2label": {str(i): f"LABEL_{i}" for i in range(5)}},
    }
    _publish(hub, "me/flowers", files)
    loaded = load_van("me/flowers")
    assert _same(loaded, tiny)
    assert loaded.preprocessing.mean == (0.485, 0.456, 0.406)
    assert loaded.class_names is None
    assert LICENCE not in loaded.source.notes
    assert loaded.source.notes[-1] == (
        "preprocessing from the preprocessor_config.json beside the weights: "
        "224x224 bicubic, crop 0.875, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"
    )


def test_one_file_of_a_repository(hub: FakeHub, tiny: VAN) -> None:
    state = _bytes(tiny.state_dict())
    _publish(hub, "me/two", {"a.pth": state, "b.pth": b"<html>"})
    with pytest.raises(UsageError, match=r"me/two has 2 weights files: a\.pth, b\.pth\."):
        load_van("me/two")
    loaded = load_van("me/two:a.pth")
    assert _same(loaded, tiny)
    assert loaded.name == "two"


def test_another_networks_repository(hub: FakeHub, tiny: VAN) -> None:
    _publish(
        hub, "me/vit", {"a.pth": _bytes(tiny.state_dict()), "config.json": {"model_type": "vit"}}
    )
    with pytest.raises(CheckpointError, match="'model_type' is 'vit': it should be 'van'"):
        load_van("me/vit")


# --- what the caller decides -------------------------------------------------------------------


def test_eps_is_the_frameworks_own_or_the_callers(
    tmp_path: Path, tiny: VAN, renamed: Rename
) -> None:
    path = tmp_path / "w.pth"
    for form, eps in (("official", 1e-6), ("transformers", 1e-6), ("mmpretrain", 1e-5)):
        torch.save(renamed(tiny.state_dict(), form), path)
        loaded = load_van(str(path))
        assert loaded.config.layer_norm_eps == loaded.model.get_submodule("norm1").eps == eps
        assert loaded.source.notes == (
            ()
            if form != "mmpretrain"
            else (
                "LayerNorm's eps is mmpretrain's own 1e-05; the published weights were trained "
                "with 1e-06 (--layer-norm-eps)",
            )
        )
        chosen = load_van(str(path), layer_norm_eps=1e-6)
        assert _same(chosen, tiny)
        assert chosen.source.notes == ()
    random = load_van("van_b0", weights="random", layer_norm_eps=1e-3)
    assert random.config.layer_norm_eps == random.model.get_submodule("norm1").eps == 1e-3
    with pytest.raises(UsageError, match=r"^LayerNorm's eps 1 is not between 0 and 1\."):
        load_van(str(path), layer_norm_eps=1.0)


def test_a_head_is_described(tmp_path: Path, tiny: VAN) -> None:
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.")}
    head = torch.nn.Sequential(torch.nn.Linear(24, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    torch.save(
        {**body, **{f"head.{k}": v for k, v in head.state_dict().items()}}, tmp_path / "w.pt"
    )
    loaded = load_van(str(tmp_path / "w.pt"), head=("linear", "tanh", "linear"))
    assert loaded.config.head == (6, "tanh", 2)
    images = torch.randn(2, 3, 64, 64)
    features = tiny.forward_head(tiny.forward_features(images), pre_logits=True)
    assert torch.equal(loaded.model(images), head(features))


def test_what_the_caller_decides_is_not_looked_at(saved: Path, tiny: VAN) -> None:
    arguments = {"input_size": [3, 64, 96, 9], "interpolation": "random", "crop_pct": 0.9}
    torch.save(
        {"state_dict": tiny.state_dict(), "args": arguments, "class_to_idx": {"a": 0}}, saved
    )
    with pytest.raises(CheckpointError, match=r"image_size \[64, 96, 9\]"):
        load_van(str(saved), own_labels=True)
    given = {"image_size": 64, "interpolation": "bilinear", "mean": None}
    loaded = load_van(str(saved), preprocessing=given, own_labels=True)
    assert str(loaded.preprocessing) == (
        "64x64 bilinear, crop 0.9, mean 0.5/0.5/0.5, std 0.5/0.5/0.5"
    )
    assert loaded.preprocessing.source == (
        "the checkpoint's own training arguments (mean, std: assumed, the official weights'), "
        "except image_size, interpolation as asked for"
    )
    with pytest.raises(CheckpointError, match="class_to_idx in the file names 1 classes"):
        load_van(str(saved), preprocessing=given)


@each("channels", [1, 2, 4, 13])
def test_any_number_of_channels_loads(
    tmp_path: Path, tiny_config: VanConfig, channels: int
) -> None:
    model = random_van(replace(tiny_config, in_chans=channels), seed=4)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_van(str(tmp_path / "w.pth"))
    assert loaded.config.in_chans == loaded.preprocessing.channels == channels
    images = torch.randn(1, channels, 64, 64)
    assert torch.equal(loaded.model(images), model(images))


def test_one_logit_loads(tmp_path: Path, tiny_config: VanConfig) -> None:
    model = random_van(replace(tiny_config, num_classes=1), seed=4)
    torch.save({"model": model.state_dict(), "class_to_idx": {"cat": 0, "dog": 1}}, tmp_path / "w")
    loaded = load_van(str(tmp_path / "w"), container="model")
    assert loaded.config.num_classes == 1
    assert loaded.class_names == ("dog",)
    assert "one logit: nothing says whether of two classes or of a regression" in (
        loaded.source.notes
    )
