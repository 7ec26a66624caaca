"""Folding is exact, whichever rewrites are chosen, and can be read back from the graph."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from onnx import ModelProto
from torch import Tensor, nn

from tests.each import each
from van_deploy.errors import ConversionError, UsageError
from van_deploy.graph.export import onnx_from_van, van_from_onnx
from van_deploy.graph.fold import (
    FOLD_TOLERANCE,
    STREAM_LIMIT,
    Rewrites,
    RewrittenBlock,
    RewrittenVan,
    fold_van,
)
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.van import VAN, Block

NAMES = {field.name for field in fields(Rewrites)}
NEEDED = {"block_norm", "layer_scale", "residual_stream"}


def choices() -> list[set[str]]:
    """Return all rewrites, none, each one alone, and all but each one."""
    alone = [{name} if name != "residual_stream" else NEEDED for name in NAMES]
    but_one = [NAMES - {name} for name in NAMES]
    return [*alone, *(c if c >= NEEDED else c - {"residual_stream"} for c in but_one), set(), NAMES]


def with_carries(model: VAN, stage: int, carries: dict[tuple[int, int], float]) -> VAN:
    """Return a copy whose residual factors, by block and channel of a stage, are ``carries``."""
    model = copy.deepcopy(model)
    for (block, channel), carry in carries.items():
        chosen = model.get_submodule(f"block{stage}.{block}")
        assert isinstance(chosen, Block)
        norm = chosen.norm1
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        with torch.no_grad():
            chosen.layer_scale_1[channel] = (carry - 1) / scale[channel]
    return model


@each("chosen", choices())
def test_every_choice_of_rewrites_is_exact(
    digits: LoadedVan, digit_images: Tensor, chosen: set[str]
) -> None:
    rewrites = Rewrites(**{name: name in chosen for name in NAMES})
    report = fold_van(digits.model, digit_images[:1], rewrites)
    assert report.relative_error <= FOLD_TOLERANCE
    assert report.passed
    assert set(report.as_dict()["rewrites"]) == chosen


def test_everything_folded_leaves_nothing_and_the_original_as_it_was(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    before = copy.deepcopy(digits.model.state_dict())
    report, blocks = fold_van(digits.model, digit_images), digits.config.blocks
    assert (report.batchnorms_folded, report.batchnorms_left) == (2 * blocks + 4, 0)
    assert (report.layer_scales_folded, report.multiplies_kept) == (2 * blocks, 0)
    assert [m for m in report.model.modules() if isinstance(m, nn.BatchNorm2d)] == []
    names = dict(report.model.named_parameters())
    assert not [name for name in names if "layer_scale" in name or "conv_spatial.bias" in name]
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in names.values())
    after = digits.model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_rewritten_is_the_original_bit_for_bit(
    digits: LoadedVan, digit_images: Tensor
) -> None:
    report = fold_van(digits.model, digit_images, Rewrites.none())
    assert (report.relative_error, report.batchnorms_folded) == (0.0, 0)
    with torch.no_grad():
        assert torch.equal(report.model(digit_images), digits.model(digit_images))


@each(
    ("carries", "kept"),
    [
        *(({(1, 5): carry}, 1) for carry in (0.0, 1e-6, -1e-6, 2 * STREAM_LIMIT)),
        ({(1, 5): -0.5}, 0),
        ({(block, 0): STREAM_LIMIT**-0.7 for block in range(3)}, 1),  # they restart on the way
    ],
)
def test_a_stream_that_cannot_be_rescaled_keeps_a_multiply_and_stays_exact(
    digits: LoadedVan, digit_images: Tensor, carries: dict[tuple[int, int], float], kept: int
) -> None:
    report = fold_van(with_carries(digits.model, 3, carries), digit_images)
    assert report.multiplies_kept == kept
    assert report.relative_error <= FOLD_TOLERANCE


def test_one_channel_that_cannot_be_rescaled_leaves_the_others_absorbed(
    digits: LoadedVan, digit_images: Tensor, folded: RewrittenVan
) -> None:
    report = fold_van(with_carries(digits.model, 3, {(1, 5): 0.0}), digit_images[:1])
    block = report.model.stage_blocks(3)[1]
    assert block.carry is not None
    others = [c for c in range(len(block.carry)) if c != 5]
    assert abs(float(block.carry[5])) < 1e-6
    assert (block.carry[others] == 1.0).all()
    usual, left = (m.stage_blocks(3)[1].attn.proj_1.weight for m in (folded, report.model))
    assert torch.equal(usual[:, others], left[:, others])


def test_a_wrong_rewrite_and_nan_are_noticed(
    digits: LoadedVan, digit_images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_the_shift(block: RewrittenBlock) -> None:
        block.attn.spatial_gating_unit.conv_spatial.bias = None

    assert not fold_van(digits.model, torch.full_like(digit_images, torch.nan))
    monkeypatch.setattr("van_deploy.graph.fold._fold_spatial_bias_", forgets_the_shift)
    report = fold_van(digits.model, digit_images)
    assert not report
    assert report.relative_error > 1e-6


def test_the_stream_cannot_be_rescaled_without_its_carry() -> None:
    with pytest.raises(UsageError, match=r"'residual_stream' needs 'block_norm' and 'layer_scale'"):
        Rewrites(block_norm=False)


# --- read back from the graph ----------------------------------------------------------------


@each("opset", [17, 20])
def test_the_rebuilt_network_is_the_folded_one(
    digits: LoadedVan, digit_images: Tensor, opset: int
) -> None:
    model = with_carries(digits.model, 3, {(1, 5): 0.0})  # one multiply stays
    folded = fold_van(model, digit_images[:1]).model
    graph = onnx_from_van(folded, digits.preprocessing.image_size, opset=opset)
    rebuilt = van_from_onnx(graph, digits.config)
    with torch.no_grad():
        assert torch.allclose(rebuilt.model(digit_images), folded(digit_images), atol=1e-5)
    assert rebuilt.model.stage_blocks(3)[1].carry is not None


def test_every_tensor_is_placed(digits: LoadedVan, graph: ModelProto) -> None:
    rebuilt = van_from_onnx(graph, digits.config)
    made = {name for node in graph.graph.node for name in node.output}
    assert made - set(rebuilt.tensors) == {
        f"norm{n}.{part}" for n in range(1, 5) for part in ("transpose", "layernormalization")
    }
    assert rebuilt.tensors["block1.0.add"] == ("block1.0.mlp.fc1", False)
    assert rebuilt.reads["block1.1.attn.proj_1"] == "block1.0"


def test_other_graphs_are_refused(
    digits: LoadedVan, graph: ModelProto, unfolded: ModelProto
) -> None:
    with pytest.raises(ConversionError, match="still has BatchNorms") as caught:
        van_from_onnx(unfolded, digits.config)
    assert "export it again without --no-fold" in caught.value.remedy
    lacking = copy.deepcopy(graph)
    lacking.graph.node.remove(next(n for n in lacking.graph.node if n.name == "block2.0.mlp.fc1"))
    with pytest.raises(ConversionError, match=r"has no node 'block2.0.mlp.fc1'"):
        van_from_onnx(lacking, digits.config)
