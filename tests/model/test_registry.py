"""The variants as timm sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from timm.data.config import resolve_data_config

from tests.each import each
from van_deploy.errors import UsageError
from van_deploy.model import registry  # noqa: F401
from van_deploy.model.hub import locate_weights
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS, VanConfig

if TYPE_CHECKING:
    from tests.model.conftest import FakeHub


def _create(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options)


def test_timm_lists_every_variant() -> None:
    assert timm.list_models("van_b*") == sorted(VARIANTS)
    assert [name.removesuffix(".in1k") for name in timm.list_models("van_b*", pretrained=True)] == [
        name for name, variant in VARIANTS.items() if variant.weights
    ]


def test_same_parameters_as_the_plain_network() -> None:
    model = _create("van_b0").eval()
    assert isinstance(model, VAN)
    with torch.device("meta"):
        plain = VAN(VARIANTS["van_b0"].config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_data_configuration_is_the_weights() -> None:
    data = resolve_data_config({}, model=_create("van_b0"))
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == data["std"] == (0.5, 0.5, 0.5)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.9)


@each(("classes", "channels"), [(10, 3), (0, 3), (7, 1)])
def test_heads_and_channels(classes: int, channels: int) -> None:
    model = _create("van_b0", num_classes=classes, in_chans=channels).eval()
    output = model(torch.randn(2, channels, 64, 64))
    assert output.shape == (2, classes or 256)
    assert model.num_classes == classes


def test_head_can_be_replaced() -> None:
    model = _create("van_b0").eval()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.get_classifier().out_features == 3
    assert model.num_classes == 3


def test_features_are_maps_until_the_head_pools_them() -> None:
    model, images = _create("van_b0").eval(), torch.randn(2, 3, 64, 96)
    maps = model.forward_features(images)
    assert maps.shape == (2, 256, 2, 3)
    pooled = model.forward_head(maps, pre_logits=True)
    assert torch.equal(pooled, maps.mean((2, 3)))
    assert torch.equal(model(images), model.head(pooled))
    assert pooled.shape[1] == model.num_features == model.head_hidden_size


def test_pooling_can_be_left_out() -> None:
    model, images = (
        _create("van_b0", num_classes=0, global_pool="").eval(),
        torch.randn(1, 3, 64, 64),
    )
    assert torch.equal(model(images), model.forward_features(images))
    model.reset_classifier(4, "avg")
    assert model(images).shape == (1, 4)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 256, 2, 2)
    with pytest.raises(ValueError, match="Without pooling there can be no head"):
        model.reset_classifier(4)
    with pytest.raises(ValueError, match="not by 'max'"):
        _create("van_b0", global_pool="max")


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


def test_feature_maps_are_the_stages() -> None:
    torch.manual_seed(0)
    features = _create("van_b0", features_only=True).eval()
    assert features.feature_info.channels() == [32, 64, 160, 256]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    maps = features(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, 32, 16, 24),
        (1, 64, 8, 12),
        (1, 160, 4, 6),
        (1, 256, 2, 3),
    ]
    model = _create("van_b0").eval()
    images = torch.randn(2, 3, 64, 64)
    final, chosen = model.forward_intermediates(images, indices=[1, 3])
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(final, chosen[-1])
    early = model.forward_intermediates(
        images, indices=[1], stop_early=True, intermediates_only=True
    )
    assert torch.equal(early[0], chosen[0])


def test_stochastic_depth_reaches_the_blocks() -> None:
    model = _create("van_b0", drop_path_rate=0.2)
    assert model.block4[1].drop_path.drop_prob == pytest.approx(0.2)


def test_pretrained_without_public_weights_says_so() -> None:
    with pytest.raises(UsageError, match="van_b5 has no public ImageNet-1K weights"):
        _create("van_b5", pretrained=True)


def test_pretrained_comes_through_the_checked_loader(
    hub: FakeHub, shared_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = VARIANTS["van_b0"].weights
    assert file is not None
    hub.repos[file.repo_id] = {file.filename: _with_thousand_classes(shared_checkpoint)}
    model = _create("van_b0", pretrained=True, num_classes=4).eval()
    assert locate_weights("van_b0") is not None
    trained = torch.load(locate_weights("van_b0") or "", weights_only=True)["state_dict"]
    assert torch.equal(model.block1[0].attn.proj_1.weight, trained["block1.0.attn.proj_1.weight"])
    assert model.head.out_features == 4


def _with_thousand_classes(path: Path) -> bytes:
    import io

    from van_deploy.model.files import read_weights

    tensors = dict(read_weights(path).tensors)
    tensors |= {"head.weight": torch.randn(1000, 256) / 16, "head.bias": torch.zeros(1000)}
    buffer = io.BytesIO()
    torch.save({"state_dict": tensors}, buffer)
    return buffer.getvalue()
