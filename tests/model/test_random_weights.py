"""Seeded random weights: the same each time, and of natural size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.each import each
from van_deploy.model.van import random_van, sha256_of_state, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig


def largest_activation(model: nn.Module, images: Tensor) -> float:
    largest = [0.0]
    for module in model.modules():
        module.register_forward_hook(lambda _m, _i, out: largest.append(out.abs().max().item()))
    model(images)
    return max(largest)


def test_one_seed_one_network_with_statistics_of_its_own(tiny_config: VanConfig) -> None:
    before = torch.random.get_rng_state()
    models = [random_van(tiny_config, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    digests = [sha256_of_state(model.state_dict()) for model in models]
    assert digests[0] == digests[1] != digests[2]
    assert not models[0].training
    for module in models[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.running_mean.abs().max() > 1e-3
            assert (module.running_var - 1).abs().max() > 1e-3
            assert module.weight.std() > 0.05
            assert module.momentum == 0.1


@each("config", [VARIANTS["van_b0"].config, VanConfig((8, 12, 16, 24), (1, 1, 60, 1))])
def test_activations_stay_of_natural_size(config: VanConfig) -> None:
    model = random_van(config, 0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        images = smooth_images(2, 3, 128)
    power = torch.fft.rfft2(images).abs().square().mean(dim=(0, 1))
    assert power[1:4, 1:4].mean() > 100 * power[16:32, 16:32].mean()
    assert 1 < largest_activation(model, images) < 1000
    logits = model(images)
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).std() > 0.01, "two pictures must not look the same"


def test_digest_sees_names_types_shapes_and_values() -> None:
    zeros = torch.zeros(2, 3)
    states = ({"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.int()}, {"a": zeros + 1})
    assert len({sha256_of_state(state) for state in states}) == len(states)
