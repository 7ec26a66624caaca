"""Folding is exact; networks rebuilt from the graph."""

import copy
from typing import Any

import pytest
import torch

from tests.each import each
from tests.graph.conftest import Exported
from van_deploy.errors import ConversionError
from van_deploy.graph.export import onnx_from_van, van_from_onnx
from van_deploy.graph.fold import FOLD_TOLERANCE, SKIP_GAIN_LIMIT, fold_van
from van_deploy.model.van import VAN, random_van, smooth_images
from van_deploy.model.variants import VanConfig


def with_skip_gains(model: VAN, skip_gains: dict[tuple[int, int], float]) -> VAN:
    """Return a copy whose residual factors in stage 3, by block and channel, are ``skip_gains``."""
    model = copy.deepcopy(model)
    for (block, channel), skip_gain in skip_gains.items():
        chosen: Any = model.get_submodule(f"block3.{block}")
        scale = chosen.norm1.weight / (chosen.norm1.running_var + chosen.norm1.eps).sqrt()
        with torch.no_grad():
            chosen.layer_scale_1[channel] = (skip_gain - 1) / scale[channel]
    return model


SKIP_GAINS = [
    *(({(1, 5): skip_gain}, 1) for skip_gain in (0.0, 1e-6, -1e-6, 2 * SKIP_GAIN_LIMIT)),
    ({(1, 5): -0.5}, 0),
    ({(block, 0): SKIP_GAIN_LIMIT**-0.7 for block in range(3)}, 1),  # they restart on the way
    # Where a multiply stays, what is half way to the limit starts again and saves another one.
    ({(1, 5): 0.0, (0, 0): SKIP_GAIN_LIMIT**-0.7, (2, 0): SKIP_GAIN_LIMIT**-0.7}, 1),
]


@each("skip_gains, kept", SKIP_GAINS)
def test_skip_gain_beyond_the_limit_keeps_a_multiply(
    digits: Exported, skip_gains: dict[tuple[int, int], float], kept: int
) -> None:
    report = fold_van(with_skip_gains(digits.loaded.model, skip_gains), digits.images)
    scales = 2 * sum(digits.loaded.config.depths)
    assert (report.multiplies_left, report.layer_scales_folded) == (kept, scales)
    assert report.relative_error <= FOLD_TOLERANCE


def test_nan_fails_the_report_and_a_zero_head_passes(digits: Exported) -> None:
    assert not fold_van(digits.loaded.model, torch.full_like(digits.images, torch.nan))
    model = copy.deepcopy(digits.loaded.model)
    for parameter in model.head.parameters():
        parameter.zero_()
    assert fold_van(model, digits.images[:1]).relative_error == 0.0
    backbone = random_van(digits.loaded.config.backbone((0, 1)))
    second: Any = backbone.get_submodule("norm2")
    second.bias[0] = torch.nan
    assert not fold_van(backbone, digits.images[:1])


@each(
    ("head", "left"),
    [
        (("dropout", 16, "batchnorm", "relu", "batchnorm", "dropout", 5), 0),
        (("batchnorm", 16, "relu", 5, "batchnorm"), 0),
        (("batchnorm", "relu", 5), 1),  # no linear layer beside it
    ],
)
def test_batchnorms_of_a_head_are_folded_into_its_linear_layers(
    head: tuple[str | int, ...], left: int
) -> None:
    config = VanConfig((8,) * 4, (1,) * 4, (1,) * 4, num_classes=5, head=head)
    model = random_van(config)
    images = smooth_images(2, 3, 32)
    report = fold_van(model, images)
    assert report.relative_error <= FOLD_TOLERANCE
    assert report.batchnorms_left == left
    rebuilt = van_from_onnx(onnx_from_van(report.model, 32), config)
    assert torch.allclose(rebuilt.model(images), model(images), atol=1e-5)


# --- read back from the graph ----------------------------------------------------------------


@each("opset", [17, 20])
def test_rebuilt_network_matches_the_folded_one(digits: Exported, opset: int) -> None:
    """Also where one channel cannot be re-scaled, and leaves the others absorbed."""
    model = with_skip_gains(digits.loaded.model, {(1, 5): 0.0})
    folded = fold_van(model, digits.images[:1]).model
    graph = onnx_from_van(folded, digits.loaded.preprocessing.image_size, opset=opset)
    rebuilt = van_from_onnx(graph, digits.loaded.config)
    with torch.no_grad():
        found, expected = (network(digits.images) for network in (rebuilt.model, folded))
    assert torch.allclose(found, expected, atol=1e-5)
    skip_gain = rebuilt.model.stage_blocks(3)[1].skip_gain
    assert skip_gain is not None
    others = [channel for channel in range(len(skip_gain)) if channel != 5]
    assert abs(float(skip_gain[5])) < 1e-6
    assert (skip_gain[others] == 1.0).all()
    usual, left = (m.stage_blocks(3)[1].attn.proj_1.weight for m in (digits.folded, folded))
    assert torch.equal(usual[:, others], left[:, others])


def test_rebuilt_network_places_all_tensors_and_other_graphs_are_rejected(digits: Exported) -> None:
    config, graph = digits.loaded.config, digits.graph
    rebuilt = van_from_onnx(graph, config)
    made = {name for node in graph.graph.node for name in node.output}
    assert made - set(rebuilt.tensors) == {
        f"norm{n}.{part}" for n in range(1, 5) for part in ("transpose", "layernormalization")
    }
    assert rebuilt.tensors["block1.0.add"] == ("block1.0.mlp.fc1", False)
    assert rebuilt.reads["block1.1.attn.proj_1"] == "block1.0"
    with pytest.raises(ConversionError, match="still has BatchNorms"):
        van_from_onnx(digits.unfolded, config)
    lacking = copy.deepcopy(graph)
    lacking.graph.node.remove(next(n for n in lacking.graph.node if n.name == "block2.0.mlp.fc1"))
    with pytest.raises(ConversionError, match=r"has no node 'block2.0.mlp.fc1'"):
        van_from_onnx(lacking, config)
