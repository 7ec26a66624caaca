"""From what a user asks for to a loaded network, and what the user is told."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from van_deploy.errors import CheckpointError, DownloadError, UsageError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.contract import preprocessing_from_json
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
        "assumed: the official VAN weights' (the file says nothing)"
    )


def test_the_shared_checkpoint_says_everything(shared_checkpoint: Path) -> None:
    loaded = load_van(str(shared_checkpoint))
    assert loaded.name == "van_b0_cifar10"
    assert loaded.config.num_classes == 10
    assert str(loaded.preprocessing) == (
        "64x64 bicubic, crop 1, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"
    )
    assert loaded.preprocessing.source == "the checkpoint's own training arguments"


def test_partial_and_unusable_arguments(saved: Path, tiny: VAN) -> None:
    arguments = argparse.Namespace(
        mean=[0.4], std=None, interpolation="random", crop_pct=0.95, input_size=[3, 96, 96]
    )
    torch.save({"state_dict": tiny.state_dict(), "args": arguments}, saved)
    loaded = load_van(str(saved))
    assert str(loaded.preprocessing) == (
        "96x96 bicubic, crop 0.95, mean 0.4/0.4/0.4, std 0.5/0.5/0.5"
    )
    assert loaded.preprocessing.source == (
        "the checkpoint's own training arguments (std, interpolation: assumed, "
        "the official weights')"
    )
    assert loaded.source.notes == (
        "the checkpoint's own interpolation is not used: "
        "There is no interpolation called 'random'.",
    )


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


def test_mmpretrain_file(tmp_path: Path, tiny: VAN, renamed: Rename) -> None:
    whole = {
        "meta": {"dataset_meta": {"classes": ["v", "w", "x", "y", "z"]}},
        "state_dict": renamed(tiny.state_dict(), "mmpretrain"),
    }
    torch.save(whole, tmp_path / "van-tiny_8xb128_in1k_20220501-00000000.pth")
    loaded = load_van(str(tmp_path / "van-tiny_8xb128_in1k_20220501-00000000.pth"))
    assert _same(loaded, tiny)
    assert loaded.source.format == "mmpretrain"
    assert loaded.class_names == ("v", "w", "x", "y", "z")
    assert loaded.source.notes[0].startswith(
        "the file's name promises a SHA-256 that begins with 00000000, but it is "
    )


def test_one_of_several_containers(saved: Path, tiny: VAN, tiny_config: VanConfig) -> None:
    raw = random_van(tiny_config, seed=8)
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": tiny.state_dict()}, saved)
    averaged = load_van(str(saved))
    assert _same(averaged, tiny)
    assert averaged.source.notes == (
        "the file also holds state_dict: the averaged weights under state_dict_ema were taken; "
        "choose with --container",
    )
    chosen = load_van(str(saved), container="state_dict")
    assert _same(chosen, raw)
    assert chosen.source.notes == ()


def test_folder_saved_by_transformers(tmp_path: Path, tiny: VAN, renamed: Rename) -> None:
    folder = tmp_path / "van-mine"
    folder.mkdir()
    save_file(renamed(tiny.state_dict(), "transformers"), folder / "model.safetensors")
    labels = {str(index): f"class {index}" for index in range(5)}
    config = {"model_type": "van", "layer_norm_eps": 1e-5, "id2label": labels}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(CONVNEXT))
    loaded = load_van(str(folder))
    assert loaded.name == "van-mine"
    assert loaded.config.layer_norm_eps == 1e-5
    assert loaded.model.get_submodule("norm4").eps == 1e-5
    assert loaded.class_names == tuple(labels.values())
    assert loaded.preprocessing.crop_pct == 0.875
    assert loaded.preprocessing.source == "the preprocessor_config.json beside the weights"


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


@pytest.mark.parametrize(
    ("spec", "remedy"), [("van_b4", "mmpretrain's"), ("van_b5", "21K"), ("van_b6", "21K")]
)
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
    with pytest.raises(CheckpointError, match="is of a vit with gelu, not of a VAN"):
        load_van("me/vit")


# --- Transformers' JSON ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "224x224 bicubic, crop 0.875, mean 0.485/0.456/0.406, std 0.229/0.224/0.225"),
        ({"size": {"shortest_edge": 224}}, "224x224 bicubic, crop 0.875, mean 0.485/0.456/0.406"),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224}, "224x224 bicubic, crop 0.875"),
        ({"size": 384}, "384x384 bicubic, crop 1,"),
        ({"resample": 2}, "224x224 bilinear"),
        ({"do_normalize": False}, "crop 0.875, mean 0/0/0, std 1/1/1"),
        ({"rescale_factor": 0.00392156862745098}, "224x224 bicubic"),
    ],
)
def test_spellings_of_the_json(change: dict[str, Any], text: str) -> None:
    assert text in str(preprocessing_from_json({**CONVNEXT, **change}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": {"height": 224, "width": 192}}, "only squares are supported"),
        ({"size": "big"}, "size is 'big'"),
        ({"resample": 17}, "index out of range"),
        ({"do_resize": False}, "do_resize is false"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, not 1/255"),
        ({"image_mean": [0.5, 0.5]}, "The std has 3 values"),
        ({"crop_pct": 2}, "The crop ratio 2 is outside"),
    ],
)
def test_json_that_cannot_be_followed(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match="beside the weights cannot be followed") as error:
        preprocessing_from_json({**CONVNEXT, **change})
    assert reason in error.value.message


def test_incomplete_json_cannot_be_followed() -> None:
    with pytest.raises(CheckpointError, match="image_std, resample is not given"):
        preprocessing_from_json({"size": 224, "image_mean": 0.5})
