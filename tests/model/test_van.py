"""The network in timm, with random weights, and the packaged network."""

import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data.config import resolve_data_config

from tests.each import each
from van_deploy.errors import UsageError
from van_deploy.model import registry  # noqa: F401
from van_deploy.model.checkpoint import load_van
from van_deploy.model.embedded import EMBEDDED_WEIGHTS, digits_images, write_digits_folder
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.van import VAN, random_van, sha256_of_state, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig, list_variants

# --- timm --------------------------------------------------------------------------------------


def create_model(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def test_timm_models_and_data_config() -> None:
    assert timm.list_models("van_b*") == sorted(VARIANTS)
    names = [f"{name}.in1k" for name, variant in VARIANTS.items() if variant.weights]
    assert timm.list_models("van_b*", pretrained=True) == names
    data = resolve_data_config({}, model=create_model("van_b0"))
    assert data["input_size"] == (3, 224, 224)
    assert data["mean"] == data["std"] == (0.5, 0.5, 0.5)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 0.9)


def test_timm_features() -> None:
    model, images = create_model("van_b0"), torch.randn(2, 3, 64, 96)
    maps = model.forward_features(images)
    pooled = model.forward_head(maps, pre_logits=True)
    assert torch.equal(pooled, maps.mean((2, 3)))
    assert torch.equal(model(images), model.head(pooled))
    assert pooled.shape[1] == model.num_features == model.head_hidden_size
    final, every = model.forward_intermediates(images)
    assert torch.equal(final, maps)
    assert torch.equal(every[-1], maps)
    assert [tuple(m.shape[2:]) for m in every] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    features = create_model("van_b0", features_only=True, out_indices=(1, 2))
    assert features.feature_info.channels() == [64, 160]
    assert features.feature_info.reduction() == [8, 16]
    features.model.load_state_dict(model.state_dict())
    assert all(map(torch.equal, features(images), every[1:3]))


def test_timm_head_and_pooling() -> None:
    images = torch.randn(1, 1, 64, 64)
    rates = {"drop_rate": 0.0, "drop_path_rate": 0.2}  # as timm's train.py
    model = create_model("van_b0", in_chans=1, num_classes=0, global_pool="", **rates)
    assert model.block4[1].drop_path.drop_prob == pytest.approx(0.2)
    assert torch.equal(model(images), model.forward_features(images))
    model.reset_classifier(4, "avg")
    assert model(images).shape == (1, 4) == (1, model.get_classifier().out_features)
    model.reset_classifier(0, "")
    assert model(images).shape == (1, 256, 2, 2)
    with pytest.raises(ValueError, match="for 4 classes"):
        model.reset_classifier(4)
    for options in ({"global_pool": "max"}, {"drop_rate": 0.1}):
        with pytest.raises(ValueError, match=r"global_pool is 'max'|drop_rate is 0\.1"):
            create_model("van_b0", **options)


def test_gradient_checkpointing() -> None:
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


def test_timm_pretrained_weights(published: bytes) -> None:
    with pytest.raises(UsageError, match="van_b5 has no public ImageNet-1K weights"):
        create_model("van_b5", pretrained=True)
    model = create_model("van_b0", pretrained=True, num_classes=4)
    state = torch.load(io.BytesIO(published), weights_only=False)["state_dict"]
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, state[name]) != name.startswith("head."), name
    assert model.head.out_features == 4


# --- random weights ----------------------------------------------------------------------------


def test_random_van_is_deterministic(tiny_config: VanConfig) -> None:
    before = torch.random.get_rng_state()
    models = [random_van(tiny_config, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    digests = [sha256_of_state(model.state_dict()) for model in models]
    assert digests[0] == digests[1] != digests[2]
    assert not models[0].training
    for name, values in models[0].state_dict().items():
        if "norm" in name and "num_batches" not in name:
            assert (values - values.mean().round()).abs().max() > 1e-3, "the default values"


def test_random_van_does_not_depend_on_the_number_of_threads() -> None:
    """A process that times a network with fewer threads makes it again and compares its digest."""
    before, digests = torch.get_num_threads(), set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        digests.add(sha256_of_state(random_van(VARIANTS["van_b0"].config).state_dict()))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(digests) == 1


@each("config", [VARIANTS["van_b0"].config, VanConfig((8, 12, 16, 24), (1, 1, 60, 1))])
def test_random_van_activations_are_bounded(config: VanConfig) -> None:
    model, largest = random_van(config, 0), list[float]()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        images = smooth_images(2, 3, 128)
    power = torch.fft.rfft2(images).abs().square().mean(dim=(0, 1))
    assert power[1:4, 1:4].mean() > 100 * power[16:32, 16:32].mean()
    for module in model.modules():
        module.register_forward_hook(lambda _m, _i, out: largest.append(out.abs().max().item()))
    logits = model(images)
    assert 1 < max(largest) < 1000
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).std() > 0.01, "different images must have different logits"


def test_state_dict_digest() -> None:
    zeros = torch.zeros(2, 3)
    states = ({"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.int()}, {"a": zeros + 1})
    assert len({sha256_of_state(state) for state in states}) == len(states)


# --- the embedded network ----------------------------------------------------------------------


def test_embedded_network_matches_its_card() -> None:
    card = json.loads(EMBEDDED_WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert EMBEDDED_WEIGHTS.stat().st_size <= 1_000_000
    for name, digest in card["sha256"].items():
        content = (EMBEDDED_WEIGHTS.parent / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    with safe_open(EMBEDDED_WEIGHTS, framework="pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["training"]) == card["training"]
    assert metadata["licence"] == card["data"]["licence"] == "CC BY 4.0"
    assert "Alpaydin" in metadata["attribution"]
    loaded, listed = load_van("van_digits"), list_variants()[-1]
    assert (loaded.name, loaded.source.format) == ("van_digits", "embedded")
    assert loaded.class_names == tuple(card["classes"])
    assert loaded.preprocessing == Preprocessing.from_dict(card["preprocessing"])
    config = json.loads(json.dumps(asdict(loaded.config)))
    assert config | card["config"] == config
    parameters = loaded.config.parameter_count()
    assert parameters == card["parameters"] == listed.parameters
    assert (listed.image_size, listed.here) == (64, str(EMBEDDED_WEIGHTS))


def test_write_digits_folder(tmp_path: Path) -> None:
    images, labels = digits_images("heldout")
    folder = write_digits_folder(tmp_path / "heldout", "heldout")
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        with Image.open(folder / str(label) / f"heldout_{index:04}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), pixels)
    folder = write_digits_folder(tmp_path / "deep" / "few", "train", limit=25)
    counts = [len(list((folder / str(digit)).iterdir())) for digit in range(10)]
    assert counts == [3] * 5 + [2] * 5
