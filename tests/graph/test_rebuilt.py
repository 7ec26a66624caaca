"""The network rebuilt from its own graph is that network."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.graph.test_fold import with_carry_
from van_deploy.errors import ConversionError
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import Rewrites, fold_van
from van_deploy.graph.rebuilt import van_from_onnx
from van_deploy.model.checkpoint import LoadedVan


@pytest.mark.parametrize("opset", [17, 20])
def test_it_computes_what_the_folded_network_does(
    digits: LoadedVan, digit_images: Tensor, opset: int
) -> None:
    model = copy.deepcopy(digits.model)
    with_carry_(model, 3, 1, 5, 0.0)  # one multiply stays
    folded = fold_van(model, digit_images[:1]).model
    graph = onnx_from_van(folded, digits.preprocessing.image_size, opset=opset)
    rebuilt = van_from_onnx(graph, digits.config)
    with torch.no_grad():
        assert torch.allclose(rebuilt.model(digit_images), folded(digit_images), atol=1e-5)
    assert rebuilt.model.stage_blocks(3)[1].carry is not None


def test_every_tensor_is_placed(digits: LoadedVan, digit_images: Tensor) -> None:
    folded = fold_van(digits.model, digit_images[:1]).model
    graph = onnx_from_van(folded, digits.preprocessing.image_size)
    rebuilt = van_from_onnx(graph, digits.config)
    made = {name for node in graph.graph.node for name in node.output}
    inside_norms = {f"norm{n}.transpose" for n in range(1, 5)}
    inside_norms |= {f"norm{n}.layernormalization" for n in range(1, 5)}
    assert made - set(rebuilt.tensors) == inside_norms
    assert rebuilt.tensors["block1.0.add"] == ("block1.0.mlp.fc1", False)
    assert rebuilt.reads["block1.1.attn.proj_1"] == "block1.0"


def test_other_graphs_are_refused(digits: LoadedVan, digit_images: Tensor) -> None:
    size = digits.preprocessing.image_size
    plain = fold_van(digits.model, digit_images[:1], Rewrites.none()).model
    with pytest.raises(ConversionError, match="still has BatchNorms") as caught:
        van_from_onnx(onnx_from_van(plain, size), digits.config)
    assert "export it again without --no-fold" in caught.value.remedy
    folded = onnx_from_van(fold_van(digits.model, digit_images[:1]).model, size)
    lacking = onnx.ModelProto()
    lacking.CopyFrom(folded)
    lacking.graph.node.remove(next(n for n in lacking.graph.node if n.name == "block2.0.mlp.fc1"))
    with pytest.raises(ConversionError, match=r"has no node 'block2.0.mlp.fc1'"):
        van_from_onnx(lacking, digits.config)
    assert np.isfinite(folded.ByteSize())
