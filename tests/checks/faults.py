"""Graphs that are wrong in one known way: what the gates must catch."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = [
    "frozen_batch",
    "overflowing_layer_norm",
    "perturbed",
    "scale_doubled",
    "swapped_channels",
    "wrong_normalisation",
]


def stored(model: ModelProto) -> dict[str, TensorProto]:
    """Return the graph's initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Replace what an initialiser holds, in its own type."""
    kind = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.array(values).astype(kind), tensor.name))


def perturbed(model: ModelProto, block: str, share: float = 0.01, seed: int = 0) -> ModelProto:
    """Return the graph with every convolution weight of one block off by 1 % (RMS)."""
    rng = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(f"{block}.") and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            set_values(tensor, values * (1 + share * rng.standard_normal(values.shape)))
    return model


def swapped_channels(model: ModelProto) -> ModelProto:
    """Return the graph with red and blue swapped."""
    weight = stored(model)["patch_embed1.proj.weight"]
    set_values(weight, numpy_helper.to_array(weight)[:, ::-1])
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


def frozen_batch(model: ModelProto, tensor: str, shape: tuple[int, ...]) -> ModelProto:
    """Return the graph with a Reshape to a batch of one behind a tensor."""
    model.graph.initializer.append(
        numpy_helper.from_array(np.array([1, *shape[1:]], np.int64), "frozen.shape")
    )
    nodes = [helper.make_node("Reshape", [tensor, "frozen.shape"], ["frozen"], "frozen")]
    return inserted(model, tensor, nodes)


def overflowing_layer_norm(model: ModelProto, norm: str, factor: float = 512.0) -> ModelProto:
    """Return the graph with one LayerNorm spelt out in FP16 behind a factor.

    LayerNorm takes no notice of a factor, so in real arithmetic this is the same
    network; in FP16 the squares pass 65504. Spelt so that ONNX Runtime does not see
    a LayerNorm in it and make it one again.
    """
    (index,) = (i for i, n in enumerate(model.graph.node) if n.name == f"{norm}.layernormalization")
    node = model.graph.node[index]
    half = {"factor": factor, "epsilon": 1e-6}
    for name, value in half.items():
        array = np.array(value, np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, f"overflow.{name}"))
    axes = numpy_helper.from_array(np.array([-1], np.int64), "overflow.axes")
    model.graph.initializer.append(axes)
    source, weights, result = node.input[0], list(node.input[1:]), node.output[0]

    def step(kind: str, inputs: list[str], name: str) -> NodeProto:
        return helper.make_node(kind, inputs, [f"overflow.{name}"], f"{norm}.{name}")

    nodes = [
        helper.make_node(
            "Cast", [source], ["overflow.half"], f"{norm}.half", to=TensorProto.FLOAT16
        ),
        step("Mul", ["overflow.half", "overflow.factor"], "x"),
        step("ReduceMean", ["overflow.x", "overflow.axes"], "mean"),
        step("Sub", ["overflow.x", "overflow.mean"], "centred"),
        step("Mul", ["overflow.centred", "overflow.centred"], "squares"),
        step("ReduceMean", ["overflow.squares", "overflow.axes"], "variance"),
        step("Add", ["overflow.variance", "overflow.epsilon"], "safe"),
        step("Sqrt", ["overflow.safe"], "deviation"),
        step("Reciprocal", ["overflow.deviation"], "reciprocal"),
        step("Mul", ["overflow.centred", "overflow.reciprocal"], "normal"),
        helper.make_node(
            "Cast",
            ["overflow.normal"],
            ["overflow.single"],
            f"{norm}.single",
            to=TensorProto.FLOAT,
        ),
    ]
    last = "overflow.single"
    for operator, weight in zip(("Mul", "Add"), weights, strict=False):
        nodes.append(step(operator, [last, weight], operator.lower()))
        last = f"overflow.{operator.lower()}"
    nodes[-1].output[0] = result
    kept = list(model.graph.node)
    return with_nodes(model, [*kept[:index], *nodes, *kept[index + 1 :]])


def scale_doubled(model: ModelProto, layer: str, of: str = "activation") -> ModelProto:
    """Return a Q/DQ graph with twice the right scale in one layer.

    Args:
        model: the graph.
        layer: the convolution.
        of: ``activation``, in its Q and its DQ; ``weight``, rounded anew with it;
            ``weight DQ``, where the integers stay, so that the weights double.
    """
    tensors = stored(model)
    makers = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.name == layer)
    scale = tensors[makers[conv.input[0 if of == "activation" else 1]].input[1]]
    set_values(scale, numpy_helper.to_array(scale) * 2)
    if of == "weight":
        integers = tensors[makers[conv.input[1]].input[0]]
        set_values(integers, np.rint(numpy_helper.to_array(integers) / 2.0))
    return model


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
