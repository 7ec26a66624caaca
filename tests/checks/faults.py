"""Graphs that are wrong in one known way: what the gates must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

QUANTIZE = "QuantizeLinear"
Step = tuple[Any, ...]
"""An operator, the constants it takes, and perhaps its attributes."""


def stored(model: ModelProto) -> dict[str, TensorProto]:
    """Return the graph's initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Replace what an initialiser holds, in its own type."""
    kind = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.array(values).astype(kind), tensor.name))


def behind(model: ModelProto, tensor: str, *steps: Step) -> ModelProto:
    """Return the graph with steps behind a tensor: whatever read it reads the last one's result."""
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    given, last, place = tensor, f"{tensor}.wrong", 0
    makers = [place for place, node in enumerate(nodes) if tensor in node.output]
    if makers:
        given, last, place = f"{tensor}.right", tensor, makers[0] + 1
        nodes[makers[0]].output[0] = given
    for node in () if makers else nodes:
        node.input[:] = [last if name == tensor else name for name in node.input]
    new = []
    for number, (kind, constants, *options) in enumerate(steps):
        names = [f"{tensor}.{number}.{index}" for index in range(len(constants))]
        arrays = map(np.asarray, constants)
        model.graph.initializer.extend(map(numpy_helper.from_array, arrays, names))
        out = last if number == len(steps) - 1 else f"{tensor}.{number}"
        name = f"{tensor}.fault{number}"
        new.append(helper.make_node(kind, [given, *names], [out], name, **dict(*options)))
        given = out
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place:]])
    return model


def negated(model: ModelProto) -> ModelProto:
    """Return the graph with every logit's sign turned."""
    return behind(model, "logits", ("Neg", []))


def zeroed(model: ModelProto) -> ModelProto:
    """Return the graph whose logits are all 0."""
    return behind(model, "logits", ("Mul", [np.float32(0)]))


def rows_reversed(model: ModelProto) -> ModelProto:
    """Return the graph whose rows come out in reverse order: right for one image alone."""
    constants = [np.array([value]) for value in (-1, np.iinfo(np.int32).min, 0, -1)]
    return behind(model, "logits", ("Slice", constants))


def classes_swapped(model: ModelProto) -> ModelProto:
    """Return the graph with the first two classes in each other's place."""
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    return behind(model, "logits", ("Gather", [np.array([1, 0, *range(2, size)])], {"axis": 1}))


def wrong_normalisation(
    model: ModelProto, right: tuple[float, float], wrong: tuple[float, float]
) -> ModelProto:
    """Return the graph fed as if its images had been normalised with ``wrong`` mean and std."""
    factor, shift = right[1] / wrong[1], (right[0] - wrong[0]) / wrong[1]
    return behind(model, "images", ("Mul", [np.float32(factor)]), ("Add", [np.float32(shift)]))


def frozen_batch(model: ModelProto, tensor: str, shape: tuple[int, ...]) -> ModelProto:
    """Return the graph with a Reshape to a batch of one behind a tensor."""
    return behind(model, tensor, ("Reshape", [np.array([1, *shape[1:]])]))


def overflowing(model: ModelProto, tensor: str) -> ModelProto:
    """Return the graph with a tensor times 2^15 in FP16, and back.

    In real arithmetic this is the same network; in FP16 values above 2 pass 65504. ONNX
    Runtime computes it in FP32 on a CPU.
    """
    factor, half = np.float16(2**15), {"to": TensorProto.FLOAT16}
    there: tuple[Step, ...] = (("Cast", [], half), ("Mul", [factor]), ("Neg", []))
    back: tuple[Step, ...] = (("Mul", [-1 / factor]), ("Cast", [], {"to": TensorProto.FLOAT}))
    return behind(model, tensor, *there, *back)


def perturbed(model: ModelProto, block: str, share: float = 0.01) -> ModelProto:
    """Return the graph with every convolution weight of one block off by 1 % (RMS)."""
    rng = np.random.default_rng(0)
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


def layer_norm_epsilon(model: ModelProto, epsilon: float = 1e-3) -> ModelProto:
    """Return the graph with another epsilon in its LayerNorms."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = epsilon
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
    tensors, weight = stored(model), node.input[1] if maker is None else maker.input[0]
    values = numpy_helper.to_array(tensors[weight]).astype(np.float64)
    sizes = np.abs(values.reshape(len(values), -1)).sum(axis=1)
    if maker is not None:  # integers: their scales make them weights
        sizes *= numpy_helper.to_array(tensors[maker.input[1]])
    for name in (weight, node.input[2]):
        kept = numpy_helper.to_array(tensors[name]).copy()
        kept[int(sizes.argmax())] = 0
        set_values(tensors[name], kept)
    return model


# --- scales ----------------------------------------------------------------------------------


def scale_times(model: ModelProto, layer: str, of: str, factor: float) -> ModelProto:
    """Return a Q/DQ graph with another scale in one layer.

    Args:
        model: the graph.
        layer: the convolution.
        of: ``activation``, in its Q and its DQ; ``weight``, rounded anew with it.
        factor: over the right scale.
    """
    tensors = stored(model)
    makers = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.name == layer)
    scale = tensors[makers[conv.input[0 if of == "activation" else 1]].input[1]]
    set_values(scale, numpy_helper.to_array(scale) * factor)
    if of == "weight":
        integers = tensors[makers[conv.input[1]].input[0]]
        set_values(integers, np.rint(numpy_helper.to_array(integers) / factor))
    return model


def scales_changed(
    model: ModelProto, change: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> ModelProto:
    """Return a Q/DQ graph with other scales of all activations, made of the right ones."""
    names = dict.fromkeys(n.input[1] for n in model.graph.node if n.op_type == QUANTIZE)
    tensors = [stored(model)[name] for name in names]
    for tensor, value in zip(tensors, change([*map(numpy_helper.to_array, tensors)]), strict=True):
        set_values(tensor, value)
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
        if matrix.shape[0] == matrix.shape[1]:
            new = scales(matrix).astype(np.float16).astype(np.float64)
            set_values(tensors[node.input[1]], new)
            rounded = np.clip(np.rint(matrix / new[:, None]), -127, 127)
            set_values(integers, rounded.reshape(codes.shape))
    return model
