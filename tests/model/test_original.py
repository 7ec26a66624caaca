"""A bundle's network is rebuilt from its manifest, not from what stands beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.described import described
from van_deploy.bundle import Bundle, writing
from van_deploy.errors import BundleError
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.van import VAN
from van_deploy.runners.original import original_network

if TYPE_CHECKING:
    from tests.model.conftest import Rename


def bundle_of(loaded: LoadedVan, path: Path) -> Bundle:
    with writing(path, name="mine") as draft:
        draft.description = described(
            "mine",
            weights=loaded.source,
            architecture=loaded.config,
            preprocessing=loaded.preprocessing,
            class_names=loaded.class_names,
        )
    return Bundle.open(path)


def same(one: LoadedVan, other: LoadedVan) -> bool:
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert (one.config, one.preprocessing) == (other.config, other.preprocessing)
    return torch.equal(one.model(images), other.model(images))


def test_the_manifest_decides(tmp_path: Path, tiny: VAN, renamed: Rename) -> None:
    folder = tmp_path / "van"
    folder.mkdir()
    torch.save(renamed(tiny.state_dict(), "transformers"), folder / "pytorch_model.bin")
    config = {"model_type": "van", "layer_norm_eps": 1e-2, "strides": [4, 2, 2, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_van(str(folder))
    bundle = bundle_of(loaded, tmp_path / "bundle")
    assert same(original_network(bundle), loaded)
    (folder / "config.json").write_text('{"model_type": "van"}')
    assert same(original_network(bundle), loaded)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="cannot be read from"):
        original_network(bundle)
    for place in (moved, moved / "pytorch_model.bin"):
        again = original_network(bundle, place)
        assert same(again, loaded)
        assert again.source.path == str(moved / "pytorch_model.bin")


def test_containers_and_heads_are_found_again(tmp_path: Path, tiny: VAN) -> None:
    body = {k: v for k, v in tiny.state_dict().items() if not k.startswith("head.")}
    head = nn.Sequential(nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 2))
    student = {**body, **{f"head.{k}": v for k, v in head.state_dict().items()}}
    teacher = {f"teacher.{name}": tensor for name, tensor in tiny.state_dict().items()}
    both = {**{f"student.{name}": tensor for name, tensor in student.items()}, **teacher}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    loaded = load_van(
        str(tmp_path / "w.pth"), container="state_dict.student", head=["linear", "tanh", "linear"]
    )
    assert same(original_network(bundle_of(loaded, tmp_path / "bundle")), loaded)


def test_other_weights_and_other_seeds_are_refused(tmp_path: Path, tiny: VAN) -> None:
    torch.save(tiny.state_dict(), tmp_path / "w.pth")
    bundle = bundle_of(load_van(str(tmp_path / "w.pth")), tmp_path / "bundle")
    torch.save({"model": tiny.state_dict()}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match=r"w\.pth' is not what the bundle '.*' was made from"):
        original_network(bundle)
    random = load_van("van_b0", weights="random", seed=1)
    assert same(original_network(bundle_of(random, tmp_path / "random")), random)
