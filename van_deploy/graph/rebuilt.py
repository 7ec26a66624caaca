"""The folded network as a PyTorch module, rebuilt from the graph that was exported from it.

A bundle holds no checkpoint. Its FP32 graph has every weight, and each Conv, Gemm and
LayerNormalization is named after the module it came from
(:mod:`van_deploy.graph.export`), so the module can be filled by name.
"""

# PyTorch types every attribute of a module as `Tensor | Module`; the tests run all of this.
# mypy: disable-error-code="assignment,union-attr"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

from van_deploy.errors import ConversionError
from van_deploy.graph.rewritten import RewrittenVan, StageNorm
from van_deploy.model.van import VAN
from van_deploy.model.variants import VanConfig


@dataclass(frozen=True)
class RebuiltVan:
    """A folded network, and what the graph it came from calls its tensors.

    Attributes:
        model: float32, eval mode, channels-last weights, no gradients.
        tensors: where each tensor of the graph passes in ``model``, by the tensor's name:
            a module's path, and whether it is its output (else its input).
        reads: the tensor that each convolution and the head reads, by the module's path.
    """

    model: RewrittenVan
    tensors: Mapping[str, tuple[str, bool]]
    reads: Mapping[str, str]


def van_from_onnx(graph: ModelProto, config: VanConfig) -> RebuiltVan:
    """Return the network that :func:`van_deploy.graph.export.onnx_from_van` made ``graph`` of.

    Args:
        graph: FP32, exported from a network with every rewrite of
            :mod:`van_deploy.graph.fold`, with its weights.
        config: its architecture.

    Raises:
        ConversionError: the graph does not hold that network.
    """
    with torch.device("meta"):
        model = RewrittenVan(VAN(config), channels_last=True).eval()
    _remove_folded_(model)
    nodes = {node.name: node for node in graph.graph.node}
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    if any(node.op_type == "BatchNormalization" for node in graph.graph.node):
        raise _not_folded("it still has BatchNorms")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | StageNorm):
            node = nodes.get(
                f"{name}.layernormalization" if isinstance(module, StageNorm) else name
            )
            if node is None:
                raise _not_folded(f"it has no node '{name}'")
            for place, key in enumerate(("weight", "bias"), 1):
                values = _stored(node, place, stored)
                setattr(module, key, None if values is None else nn.Parameter(values, False))
    for stage in config.stages:
        for index, block in enumerate(model.stage_blocks(stage)):
            multiply = nodes.get(f"block{stage}.{index}.mul")
            if multiply is not None:
                constants = (_stored(multiply, place, stored) for place in (0, 1))
                block.carry = next(c for c in constants if c is not None).reshape(-1)
    reads = {n.name: n.input[0] for n in graph.graph.node if n.op_type in {"Conv", "Gemm"}}
    tensors = {tensor: (name, False) for name, tensor in reads.items()}
    modules = {name for name, _ in model.named_modules()}
    tensors |= {n.output[0]: (n.name, True) for n in graph.graph.node if n.name in modules}
    return RebuiltVan(model.to(memory_format=torch.channels_last), tensors, reads)


def _remove_folded_(model: RewrittenVan) -> None:
    """Take out the modules and parameters that folding leaves nothing of."""
    for stage in model.config.stages:
        model.get_submodule(f"patch_embed{stage}").norm = nn.Identity()
        for block in model.stage_blocks(stage):
            block.norm1 = block.norm2 = block.layer_scale_1 = block.layer_scale_2 = None


def _stored(node: NodeProto, place: int, stored: Mapping[str, TensorProto]) -> Tensor | None:
    name = node.input[place] if len(node.input) > place else ""
    return (
        torch.from_numpy(np.array(numpy_helper.to_array(stored[name]))) if name in stored else None
    )


def _not_folded(why: str) -> ConversionError:
    return ConversionError(
        f"The graph is not a folded VAN of this architecture: {why}.",
        "FP16 and INT8 are made from the folded network: export it again without --no-fold.",
    )
