"""The variants as timm sees them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from timm.data.config import resolve_data_config

from van_deploy.errors import UsageError
from van_deploy.model.hub import locate_weights
from van_deploy.model.registry import TimmVan
from van_deploy.model.van import VAN
from van_deploy.model.variants import VARIANTS

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
    assert isinstance(model, TimmVan)
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


@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (0, 3), (7, 1)])
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
    pooled, chosen = model.forward_intermediates(images, indices=[1, 3])
    assert torch.allclose(pooled, model.forward_features(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled, chosen[-1].mean(dim=(2, 3)))


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
