"""Seeded random weights: the same each time, and of natural size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.each import each
from van_deploy.model.random_weights import random_van, sha256_of_state, smooth_pictures
from van_deploy.model.variants import VARIANTS, VanConfig


def _largest_activation(model: nn.Module, images: Tensor) -> float:
    largest = [0.0]

    def watch(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        largest.append(output.abs().max().item())

    hooks = [module.register_forward_hook(watch) for module in model.modules()]
    model(images)
    for hook in hooks:
        hook.remove()
    return max(largest)


def test_one_seed_one_network(tiny_config: VanConfig) -> None:
    digests = [sha256_of_state(random_van(tiny_config, s).state_dict()) for s in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_the_global_random_state_is_left_alone(tiny_config: VanConfig) -> None:
    before = torch.random.get_rng_state()
    random_van(tiny_config, 1)
    assert torch.equal(torch.random.get_rng_state(), before)


@each(
    "config",
    [
        VARIANTS["van_b0"].config,
        VanConfig((8, 12, 16, 24), (1, 1, 60, 1)),  # deeper than van_b4
    ],
)
def test_activations_stay_of_natural_size(config: VanConfig) -> None:
    model = random_van(config, 0)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        images = smooth_pictures(2, 3, 128)
    assert 1 < _largest_activation(model, images) < 1000
    logits = model(images)
    assert logits.isfinite().all()
    assert (logits[0] - logits[1]).std() > 0.01, "two pictures must not look the same"


def test_statistics_and_scales_are_not_trivial(tiny_config: VanConfig) -> None:
    model = random_van(tiny_config, 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            assert module.running_mean.abs().max() > 1e-3
            assert (module.running_var - 1).abs().max() > 1e-3
            assert module.weight.std() > 0.05
            assert module.momentum == 0.1
    assert not model.training


def test_digest_sees_names_shapes_and_values() -> None:
    states = [
        {"a": torch.zeros(2, 3)},
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.ones(2, 3)},
    ]
    assert len({sha256_of_state(state) for state in states}) == len(states)


def test_smooth_pictures_are_smooth() -> None:
    torch.manual_seed(0)
    pictures = smooth_pictures(8, 3, 64)
    assert pictures.shape == (8, 3, 64, 64)
    power = torch.fft.rfft2(pictures).abs().square().mean(dim=(0, 1))
    assert power[1:4, 1:4].mean() > 100 * power[16:32, 16:32].mean()
