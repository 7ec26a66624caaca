"""The network on the kernels: what it launches, how that compiles, and its fallback."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.compiled import compiled
from van_deploy.errors import UsageError
from van_deploy.kernels.launch import Launch, recorded
from van_deploy.kernels.network import FusedVan, Plan, fused
from van_deploy.model.random_weights import random_van, smooth_pictures
from van_deploy.model.variants import VARIANTS, VanConfig

BOTH = Plan(gate=True, tail=True)
TINY = VanConfig((16, 20, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)


@pytest.fixture(scope="module")
def van_b0() -> FusedVan:
    """van_b0 on the meta device: it launches nothing."""
    model = fused(random_van(VARIANTS["van_b0"].config), fallback=True)
    model.fallbacks = ()
    return model.to("meta")


def launches(model: FusedVan, batch: int, plan: Plan | None) -> list[Launch]:
    """Return what the network would launch."""
    model.plan = plan
    with recorded(run=False) as found, torch.no_grad():
        model(torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta"))
    return found


class TestPlan:
    def test_counts_of_van_b0(self, van_b0: FusedVan) -> None:
        made = launches(van_b0, 128, Plan())
        assert len(made) == 4 + 13 * 8 + 4
        assert sum(one.bytes for one in made) / 128e6 == pytest.approx(55.6, abs=0.1)
        made = launches(van_b0, 128, BOTH)
        assert len(made) == 4 + 13 * 6 + 4
        assert sum(one.bytes for one in made) / 128e6 == pytest.approx(35.7, abs=0.1)

    def test_many_channels_stay_one_kernel_a_step(self) -> None:
        config = VanConfig((16, 272, 32, 48), (1, 1, 1, 1), (2, 2, 2, 2), num_classes=10)
        model = fused(random_van(config), fallback=True)
        model.fallbacks = ()
        kinds = Counter(one.key.split("/")[0] for one in launches(model.to("meta"), 1, BOTH))
        assert kinds["gated"] == kinds["mlp_tail"] == 3

    def test_tuned_plan_of_the_nearest_number_of_pixels(self) -> None:
        tiles = {"plan/32/p12": {"gate": 0, "tail": 0}, "plan/32/p19": {"gate": 1, "tail": 0}}
        assert Plan.of(32, 300_000, tiles) == Plan(gate=True)
        assert Plan.of(32, 5_000, tiles) == Plan()
        assert Plan.of(64, 300_000, tiles) == Plan()


class TestCompiled:
    """Machine code for GPUs that are not here."""

    @pytest.mark.parametrize("kind", ["depthwise/5x1x32", "gated/64"])
    def test_no_spills_and_wide_loads(self, van_b0: FusedVan, kind: str) -> None:
        made = next(one for one in launches(van_b0, 128, BOTH) if one.key.startswith(kind))
        machine = compiled(made, 90)
        assert machine.stack == 0
        assert machine.instructions["LDG.E.128"] > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("capability", [80, 89, 90, 120])
    @pytest.mark.parametrize("batch", [1, 128])
    def test_every_kernel_of_van_b0(self, van_b0: FusedVan, capability: int, batch: int) -> None:
        plans = (Plan(), BOTH)
        unique = {one.key: one for plan in plans for one in launches(van_b0, batch, plan)}
        spilled = {key: compiled(one, capability).stack for key, one in unique.items()}
        assert {key: stack for key, stack in spilled.items() if stack} == {}


class TestFallback:
    def test_plain_pytorch_computes_the_same_network(self) -> None:
        model = random_van(TINY)
        x = smooth_pictures(2, 3, 33)
        plain = fused(model, torch.float32, fallback=True)
        if not torch.cuda.is_available():
            assert plain.fallbacks == ("there is no GPU",)
        plain.fallbacks = plain.fallbacks or ("asked",)
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_has_to_be_chosen(self) -> None:
        with pytest.raises(UsageError) as caught:
            fused(random_van(TINY))
        assert str(caught.value) == (
            "The network cannot run on the kernels: there is no GPU.\n"
            "Pass fallback=True to run the same network in plain PyTorch."
        )

    def test_another_network_is_refused(self) -> None:
        with pytest.raises(UsageError, match="Only a VAN in eval mode"):
            fused(nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [None, Plan(), BOTH])
def test_network_on_a_gpu(plan: Plan | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    model = random_van(VARIANTS["van_b0"].config)
    x = smooth_pictures(2, 3, 224)
    found = fused(model, torch.float16, plan=plan).cuda()(x.cuda()).cpu().double()
    expected = model.double()(x.double())
    noise = (found - expected).square().sum()
    assert 10 * torch.log10(expected.square().sum() / noise) >= 45
