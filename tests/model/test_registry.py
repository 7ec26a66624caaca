"""The variants as timm sees them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from timm.data.config import resolve_data_config

from van_deploy.errors import UsageError
from van_deploy.model import registry  # noqa: F401
from van_deploy.model.checkpoint import read_weights
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub


def create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def test_timm_lists_every_variant_with_the_weights_data_configuration() -> None:
    assert timm.list_models("van_b*") == sorted(VARIANTS)
    assert [name.removesuffix(".in1k") for name in timm.list_models("van_b*", pretrained=True)] == [
        name for name, variant in VARIANTS.items() if variant.weights
    ]
    data = resolve_data_config({}, model=create("van_b0"))
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == data["std"] == (0.5, 0.5, 0.5)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.9)


def test_features_are_maps_until_the_head_pools_them() -> None:
    model, images = create("van_b0"), torch.randn(2, 3, 64, 96)
    maps = model.forward_features(images)
    assert maps.shape == (2, 256, 2, 3)
    pooled = model.forward_head(maps, pre_logits=True)
    assert torch.equal(pooled, maps.mean((2, 3)))
    assert torch.equal(model(images), model.head(pooled))
    assert pooled.shape[1] == model.num_features == model.head_hidden_size
    final, chosen = model.forward_intermediates(images, indices=[1, 3])
    assert torch.equal(final, maps)
    assert torch.equal(final, chosen[-1])
    (early,) = model.forward_intermediates(
        images, indices=[1], stop_early=True, intermediates_only=True
    )
    assert torch.equal(early, chosen[0])
    features = create("van_b0", features_only=True)
    assert features.feature_info.channels() == [32, 64, 160, 256]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert [tuple(m.shape[2:]) for m in features(images)] == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_head_and_pooling_can_be_replaced() -> None:
    images = torch.randn(1, 1, 64, 64)
    model = create("van_b0", in_chans=1, num_classes=0, global_pool="", drop_path_rate=0.2)
    assert model.block4[1].drop_path.drop_prob == pytest.approx(0.2)
    assert torch.equal(model(images), model.forward_features(images))
    model.reset_classifier(4, "avg")
    assert model(images).shape == (1, 4) == (1, model.get_classifier().out_features)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 256, 2, 2)
    with pytest.raises(ValueError, match="for 4 classes"):
        model.reset_classifier(4)
    with pytest.raises(ValueError, match="not by 'max'"):
        create("van_b0", global_pool="max")


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    config = VanConfig((8, 8, 8, 8), (2, 1, 1, 1), (2, 2, 2, 2), num_classes=2)
    torch.manual_seed(0)
    model, images = VAN(config), torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([torch.clone(p.grad) for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_pretrained_comes_through_the_checked_loader(hub: FakeHub, shared_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="van_b5 has no public ImageNet-1K weights"):
        create("van_b5", pretrained=True)
    repo, _, file = (VARIANTS["van_b0"].weights or "").partition(":")
    tensors = dict(read_weights(shared_checkpoint).tensors)
    tensors |= {"head.weight": torch.randn(1000, 256) / 16, "head.bias": torch.zeros(1000)}
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors}, buffer)
    hub.repos[repo] = {file: buffer.getvalue()}
    model = create("van_b0", pretrained=True, num_classes=4)
    name = "block1.0.attn.proj_1.weight"
    assert torch.equal(model.get_parameter(name), tensors[name])
    assert model.head.out_features == 4
