"""The network on the kernels: its launches, their compilation, and the fallback."""

from collections import Counter

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from tests.each import each
from tests.kernels.compiled import compile_launch
from van_deploy.errors import UsageError
from van_deploy.kernels import ops, reference
from van_deploy.kernels.launch import Launch, nearest_tile, record_launches, tuned_tiles
from van_deploy.kernels.network import FusedVan, fuse_van
from van_deploy.model.van import random_van, smooth_images
from van_deploy.model.variants import VARIANTS, VanConfig

TINY = VanConfig((16, 20, 32, 48), (1, 2, 1, 1), (2, 2, 2, 2), num_classes=10)


@pytest.fixture(scope="module")
def van_b0() -> FusedVan:
    """Return van_b0 on the meta device, which runs no kernels."""
    model = fuse_van(random_van(VARIANTS["van_b0"].config), fallback=True)
    model.fallbacks = ()
    return model.to("meta")


def launches(model: FusedVan, batch: int) -> list[Launch]:
    """Return the launches of one forward pass."""
    with record_launches(run=False) as recorded, torch.no_grad():
        model(torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta"))
    return recorded


def test_launches_and_bytes_of_van_b0(van_b0: FusedVan) -> None:
    recorded = launches(van_b0, 128)
    kinds = Counter(launch.key.split("/")[0] for launch in recorded)
    assert kinds == {"patches": 4, "pointwise": 13 * 5, "depthwise": 13 * 3, "layer_norm": 4}
    assert sum(launch.bytes for launch in recorded) / 128e6 == pytest.approx(55.6, abs=0.1)


def test_stored_tiles_are_those_of_the_kernels(van_b0: FusedVan) -> None:
    stored = tuned_tiles(9, 0)
    for launch in (*launches(van_b0, 1), *launches(van_b0, 128)):
        assert stored[launch.key].keys() == launch.tile.keys()
    assert nearest_tile(stored, "layer_norm/7/p17") is None
    assert tuned_tiles(1, 0) == {}, "tiles of another GPU"


@each("kind", ["depthwise/3x1x256", "pointwise/0x64", "layer_norm/64"])
def test_no_register_spills_and_wide_loads(van_b0: FusedVan, kind: str) -> None:
    launch = next(one for one in launches(van_b0, 128) if one.key.startswith(kind))
    stack, instructions = compile_launch(launch, 90)
    assert stack == 0
    wide = [name for name in instructions if name.startswith("LDG")]
    assert any(name.endswith("128") for name in wide), wide


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("batch", [1, 128])
def test_no_kernel_of_van_b0_spills(van_b0: FusedVan, capability: int, batch: int) -> None:
    unique = {one.key: one for one in launches(van_b0, batch)}
    spilled = {key: compile_launch(one, capability)[0] for key, one in unique.items()}
    assert {key: stack for key, stack in spilled.items() if stack} == {}


def test_plain_pytorch_computes_the_same_network() -> None:
    model, x = random_van(TINY), smooth_images(2, 3, 33)
    plain = fuse_van(model, torch.float32, fallback=True)
    if not torch.cuda.is_available():
        assert plain.fallbacks == ("there is no GPU",)
    plain.fallbacks = plain.fallbacks or ("requested",)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_and_other_networks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"there is no GPU\.\nPass fallback=True to run"):
        fuse_van(random_van(TINY))
    with pytest.raises(UsageError, match="Only a VAN in eval mode"):
        fuse_van(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="that pools its feature maps runs"):
        fuse_van(random_van(TINY.backbone((0, 2))), fallback=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_each_kernel_on_a_gpu_against_float64(dtype: torch.dtype) -> None:
    def random(*shape: int, to: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(to)

    x = random(2, 13, 11, 40, to=dtype)
    calls: dict[str, tuple[object, ...]] = {
        "depthwise": (x, random(7, 7, 40), random(40), 3, True),
        "pointwise": (x, random(70, 40, to=dtype), random(70), "gelu"),
        "patches": (x.permute(0, 3, 1, 2), random(3, 3, 40, 70, to=dtype), random(70), 2),
        "layer_norm": (x, random(40), random(40)),
    }
    assert sorted(calls) == sorted(ops.__all__)
    for name, arguments in calls.items():
        doubles = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(reference, name)(*doubles)
        actual = getattr(ops, name)(*arguments).double()
        limit = 2e-3 if dtype == torch.float16 else 1.6e-2
        assert (actual - expected).norm() / expected.norm() <= limit, name
