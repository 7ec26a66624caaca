"""Folding is exact, whichever rewrites are chosen, and leaves nothing behind."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from van_deploy.errors import UsageError
from van_deploy.graph.fold import FOLD_TOLERANCE, STREAM_LIMIT, Rewrites, fold_van
from van_deploy.graph.rewritten import RewrittenBlock
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.van import VAN, Block

NAMES = [field.name for field in fields(Rewrites)]


def choices() -> list[Rewrites]:
    """Return all rewrites, none, each one alone, and all but each one."""
    needed = {"block_norm", "layer_scale", "residual_stream"}
    alone = [{name} if name != "residual_stream" else needed for name in NAMES]
    but_one = [set(NAMES) - {name} for name in NAMES]
    but_one = [c if needed <= c else c - {"residual_stream"} for c in but_one]
    return [Rewrites(**{n: n in c for n in NAMES}) for c in ([*alone, *but_one, set(), set(NAMES)])]


def with_carry_(model: VAN, stage: int, block: int, channel: int, carry: float) -> None:
    """Set one block's layer scale so that one channel's residual factor is ``carry``."""
    chosen = model.get_submodule(f"block{stage}.{block}")
    assert isinstance(chosen, Block)
    norm = chosen.norm1
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        chosen.layer_scale_1[channel] = (carry - 1) / scale[channel]


@pytest.mark.parametrize("rewrites", choices(), ids=str)
def test_every_choice_of_rewrites_is_exact(
    digits: LoadedVan, digit_images: Tensor, rewrites: Rewrites
) -> None:
    report = fold_van(digits.model, digit_images[:1], rewrites)
    assert report.relative_error <= FOLD_TOLERANCE
    assert report.passed


def test_everything_folded_leaves_no_normalisation_and_no_scale(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    report = fold_van(digits.model, digit_images)
    blocks = digits.config.blocks
    assert report.batchnorms_folded == 2 * blocks + 4
    assert report.batchnorms_left == 0
    assert report.layer_scales_folded == 2 * blocks
    assert report.multiplies_kept == 0
    kept = [m for m in report.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kept == []
    names = dict(report.model.named_parameters())
    assert not [name for name in names if "layer_scale" in name or "conv_spatial.bias" in name]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in names.values())


def test_nothing_rewritten_is_the_original_bit_for_bit(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    report = fold_van(digits.model, digit_images, Rewrites.none())
    assert report.relative_error == 0.0
    assert report.batchnorms_folded == 0
    with torch.no_grad():
        assert torch.equal(report.model(digit_images), digits.model(digit_images))


def test_the_original_is_left_as_it_was(digits: LoadedVan, digit_images: Tensor) -> None:
    before = copy.deepcopy(digits.model.state_dict())
    fold_van(digits.model, digit_images)
    after = digits.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("carry", [0.0, 1e-6, -1e-6, -0.5, 2 * STREAM_LIMIT])
def test_a_stream_that_cannot_be_rescaled_keeps_its_multiply_and_stays_exact(
    digits: LoadedVan, digit_images: Tensor, carry: float
) -> None:
    model = copy.deepcopy(digits.model)
    with_carry_(model, 3, 1, 5, carry)
    report = fold_van(model, digit_images)
    assert report.multiplies_kept == (0 if carry == -0.5 else 1)
    assert report.relative_error <= FOLD_TOLERANCE


def test_one_channel_that_cannot_be_rescaled_leaves_the_others_absorbed(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    model = copy.deepcopy(digits.model)
    usual = fold_van(model, digit_images[:1]).stream_scales
    with_carry_(model, 3, 1, 5, 0.0)
    report = fold_van(model, digit_images[:1])
    left = report.model.stage_blocks(3)[1].carry
    assert left is not None
    assert abs(float(left[5])) < 1e-6
    assert (left[[c for c in range(len(left)) if c != 5]] == 1.0).all()
    others = [c for c in range(len(left)) if c != 5]
    assert torch.equal(report.stream_scales["block3.0"][others], usual["block3.0"][others])
    assert report.stream_scales["block3.0"][5] == 1.0


def test_many_small_carries_restart_once_the_limit_is_reached(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    model = copy.deepcopy(digits.model)
    for block in range(digits.config.depths[2]):
        with_carry_(model, 3, block, 0, 1 / (STREAM_LIMIT**0.7))
    report = fold_van(model, digit_images)
    assert 0 < report.multiplies_kept < digits.config.depths[2]
    assert report.relative_error <= FOLD_TOLERANCE


def test_a_wrong_rewrite_is_noticed(
    digits: LoadedVan, digit_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_the_shift(block: RewrittenBlock) -> None:
        block.attn.spatial_gating_unit.conv_spatial.bias = None

    monkeypatch.setattr("van_deploy.graph.fold._fold_spatial_bias_", forgets_the_shift)
    report = fold_van(digits.model, digit_images)
    assert not report
    assert report.relative_error > 1e-6


def test_nan_does_not_pass(digits: LoadedVan, digit_images: Tensor) -> None:
    assert not fold_van(digits.model, torch.full_like(digit_images, torch.nan))


def test_the_stream_cannot_be_rescaled_without_its_carry() -> None:
    with pytest.raises(UsageError, match=r"'residual_stream' needs 'block_norm' and 'layer_scale'"):
        Rewrites(block_norm=False)
