"""Graphs that are wrong in one known way: what the gates must catch."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = [
    "perturbed",
    "wrong_normalisation",
]


def stored(model: ModelProto) -> dict[str, TensorProto]:
    """Return the graph's initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Replace what an initialiser holds, in its own type."""
    kind = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.astype(kind)), tensor.name))


def perturbed(model: ModelProto, block: str, share: float = 0.01, seed: int = 0) -> ModelProto:
    """Return the graph with every convolution weight of one block off by 1 % (RMS)."""
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(f"{block}.") and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            set_values(tensor, values * (1 + share * rng.standard_normal(values.shape)))
    return model


def wrong_normalisation(
    model: ModelProto, right: tuple[float, float], wrong: tuple[float, float]
) -> ModelProto:
    """Return the graph fed as if its pictures had been normalised with ``wrong`` mean and std."""
    factor, shift = right[1] / wrong[1], (right[0] - wrong[0]) / wrong[1]
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(factor, np.float32), "wrong.factor"),
            numpy_helper.from_array(np.array(shift, np.float32), "wrong.shift"),
        ]
    )
    nodes = [
        helper.make_node("Mul", ["images", "wrong.factor"], ["wrong.scaled"], "wrong.scaled"),
        helper.make_node("Add", ["wrong.scaled", "wrong.shift"], ["wrong.images"], "wrong.images"),
    ]
    return inserted(model, "images", nodes)


def inserted(model: ModelProto, tensor: str, nodes: list[NodeProto]) -> ModelProto:
    """Return the graph with nodes between a tensor and whatever read it."""
    result = nodes[-1].output[0]
    after: list[NodeProto] = []
    placed = tensor == "images"
    before: list[NodeProto] = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == tensor:
                node.input[index] = result
        (after if placed else before).append(node)
        placed = placed or tensor in node.output
    return with_nodes(model, [*before, *nodes, *after])


def with_nodes(model: ModelProto, nodes: list[NodeProto]) -> ModelProto:
    """Return the graph with other nodes."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model
