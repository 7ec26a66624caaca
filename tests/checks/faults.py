"""Graphs that are wrong in one known way: what the gates must catch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


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
    names = [node.name for node in model.graph.node]
    index = names.index(f"{norm}.layernormalization")
    node, kept = model.graph.node[index], list(model.graph.node)
    half = {"factor": np.float16(factor), "epsilon": np.float16(1e-6), "axes": np.array([-1])}
    for name, value in half.items():
        array = numpy_helper.from_array(np.asarray(value), f"overflow.{name}")
        model.graph.initializer.append(array)
    steps = [
        ("Mul", "half factor", "x"),
        ("ReduceMean", "x axes", "mean"),
        ("Sub", "x mean", "centred"),
        ("Mul", "centred centred", "squares"),
        ("ReduceMean", "squares axes", "variance"),
        ("Add", "variance epsilon", "safe"),
        ("Sqrt", "safe", "deviation"),
        ("Reciprocal", "deviation", "reciprocal"),
        ("Mul", "centred reciprocal", "normal"),
    ]
    nodes = [_cast(node.input[0], "overflow.half", TensorProto.FLOAT16)]
    for kind, inputs, name in steps:
        given = [f"overflow.{one}" for one in inputs.split()]
        nodes.append(helper.make_node(kind, given, [f"overflow.{name}"], f"{norm}.{name}"))
    last = "overflow.single"
    nodes.append(_cast("overflow.normal", last, TensorProto.FLOAT))
    for kind, weight in zip(("Mul", "Add"), node.input[1:], strict=False):
        given, last = [last, weight], f"overflow.{kind}"
        nodes.append(helper.make_node(kind, given, [last], f"{norm}.{kind}"))
    nodes[-1].output[0] = node.output[0]
    return with_nodes(model, [*kept[:index], *nodes, *kept[index + 1 :]])


def _cast(source: str, target: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], target, to=kind)


def scale_doubled(
    model: ModelProto, layer: str, of: str = "activation", factor: float = 2.0
) -> ModelProto:
    """Return a Q/DQ graph with twice the right scale in one layer.

    Args:
        model: the graph.
        layer: the convolution.
        of: ``activation``, in its Q and its DQ; ``weight``, rounded anew with it;
            ``weight DQ``, where the integers stay, so that the weights double.
        factor: instead of two.
    """
    tensors = stored(model)
    makers = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.name == layer)
    scale = tensors[makers[conv.input[0 if of == "activation" else 1]].input[1]]
    set_values(scale, numpy_helper.to_array(scale) * factor)
    if of == "weight":
        integers = tensors[makers[conv.input[1]].input[0]]
        set_values(integers, np.rint(numpy_helper.to_array(integers) / 2.0))
    return model


def negated(model: ModelProto) -> ModelProto:
    """Return the graph with every logit's sign turned."""
    return _behind_logits(model, [helper.make_node("Neg", ["right"], ["logits"], "fault.neg")])


def zeroed(model: ModelProto) -> ModelProto:
    """Return the graph whose logits are all 0."""
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "fault.zero"))
    node = helper.make_node("Mul", ["right", "fault.zero"], ["logits"], "fault.mul")
    return _behind_logits(model, [node])


def rows_shifted(model: ModelProto) -> ModelProto:
    """Return the graph whose rows come out one later than their images, the last one first."""
    for name, value in {"last": -1, "first": 0, "end": 2**31 - 1, "axis": 0}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    nodes = [
        helper.make_node("Slice", ["right", "last", "end", "axis"], ["tail"], "fault.tail"),
        helper.make_node("Slice", ["right", "first", "last", "axis"], ["rest"], "fault.rest"),
        helper.make_node("Concat", ["tail", "rest"], ["logits"], "fault.concat", axis=0),
    ]
    return _behind_logits(model, nodes)


def classes_swapped(model: ModelProto) -> ModelProto:
    """Return the graph with the first two classes in each other's place."""
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = np.array([1, 0, *range(2, size)], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(order, "fault.order"))
    node = helper.make_node("Gather", ["right", "fault.order"], ["logits"], "fault.gather", axis=1)
    return _behind_logits(model, [node])


def layer_norm_epsilon(model: ModelProto, epsilon: float = 1e-3) -> ModelProto:
    """Return the graph with another epsilon in its LayerNorms."""
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            kept = [a for a in node.attribute if a.name != "epsilon"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("epsilon", epsilon)])
    return model


def bias_lost(model: ModelProto, layer: str = "block2.1.mlp.fc1") -> ModelProto:
    """Return the graph without one convolution's bias."""
    node = next(node for node in model.graph.node if node.name == layer)
    bias = stored(model)[node.input[2]]
    set_values(bias, np.zeros(bias.dims))
    return model


def channel_zeroed(model: ModelProto, layer: str = "block1.0.mlp.fc2") -> ModelProto:
    """Return the graph with one output channel of a convolution at 0: 12 dB or more in INT8."""
    node = next(node for node in model.graph.node if node.name == layer)
    maker = {n.output[0]: n for n in model.graph.node}.get(node.input[1])
    weight = node.input[1] if maker is None else maker.input[0]
    values = numpy_helper.to_array(stored(model)[weight]).astype(np.float64)
    if maker is not None:  # integers: their scales make them weights
        scales = numpy_helper.to_array(stored(model)[maker.input[1]]).astype(np.float64)
        values = values * scales.reshape(-1, *(1,) * (values.ndim - 1))
    largest = int(np.abs(values.reshape(len(values), -1)).sum(axis=1).argmax())
    for name in (weight, node.input[2]):
        zeroed_one = numpy_helper.to_array(stored(model)[name]).copy()
        zeroed_one[largest] = 0
        set_values(stored(model)[name], zeroed_one)
    return model


def scales_times(model: ModelProto, factor: float) -> ModelProto:
    """Return a Q/DQ graph with every activation's scale times a factor."""
    tensors = stored(model)
    for name in dict.fromkeys(n.input[1] for n in model.graph.node if n.op_type == QUANTIZE):
        set_values(tensors[name], numpy_helper.to_array(tensors[name]) * factor)
    return model


def scales_of_another_layer(model: ModelProto, step: int = 1) -> ModelProto:
    """Return a Q/DQ graph in which each activation has the scale of another one."""
    tensors = stored(model)
    names = list(dict.fromkeys(n.input[1] for n in model.graph.node if n.op_type == QUANTIZE))
    values = [numpy_helper.to_array(tensors[name]) for name in names]
    for name, other in zip(names, values[-step:] + values[:-step], strict=True):
        set_values(tensors[name], other)
    return model


def weights_rounded_anew(
    model: ModelProto, scales: Callable[[np.ndarray], np.ndarray]
) -> ModelProto:
    """Return a Q/DQ graph whose square weights were rounded with other scales.

    Args:
        model: the graph.
        scales: from weights ``(O, I)`` to their scales ``(O,)``.
    """
    tensors = stored(model)
    for node in model.graph.node:
        integers = tensors.get(node.input[0])
        if node.op_type != "DequantizeLinear" or integers is None:
            continue
        codes = numpy_helper.to_array(integers).astype(np.float64)
        old = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
        matrix = codes.reshape(len(codes), -1) * old[:, None]
        if matrix.shape[0] != matrix.shape[1]:
            continue
        new = scales(matrix).astype(np.float16).astype(np.float64)
        set_values(tensors[node.input[1]], new)
        rounded = np.clip(np.rint(matrix / new[:, None]), -127, 127)
        set_values(integers, rounded.reshape(codes.shape))
    return model


QUANTIZE = "QuantizeLinear"


def _behind_logits(model: ModelProto, nodes: list[NodeProto]) -> ModelProto:
    """Return the graph with nodes between what were its logits, now ``right``, and ``logits``."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == "logits":
                    names[index] = "right"
    return with_nodes(model, [*model.graph.node, *nodes])


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
