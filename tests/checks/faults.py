"""Faulty graphs for tests of the gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

QUANTIZE = "QuantizeLinear"
Step = tuple[Any, ...]
"""An operator, its constant inputs, and optionally its attributes."""


def initializers(model: ModelProto) -> dict[str, TensorProto]:
    """Return the graph's initialisers by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Replace the values of an initialiser and keep its type."""
    kind = numpy_helper.to_array(tensor).dtype
    tensor.CopyFrom(numpy_helper.from_array(np.array(values).astype(kind), tensor.name))


def insert_after(model: ModelProto, tensor: str, *steps: Step) -> ModelProto:
    """Insert operators after a tensor; its readers read the output of the last one."""
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


def negate_logits(model: ModelProto) -> ModelProto:
    """Negate the logits."""
    return insert_after(model, "logits", ("Neg", []))


def zero_logits(model: ModelProto) -> ModelProto:
    """Set all logits to 0."""
    return insert_after(model, "logits", ("Mul", [np.float32(0)]))


def reverse_rows(model: ModelProto) -> ModelProto:
    """Reverse the rows, which is correct at batch 1."""
    constants = [np.array([value]) for value in (-1, np.iinfo(np.int32).min, 0, -1)]
    return insert_after(model, "logits", ("Slice", constants))


def swap_classes(model: ModelProto) -> ModelProto:
    """Swap the first two classes."""
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    return insert_after(
        model, "logits", ("Gather", [np.array([1, 0, *range(2, size)])], {"axis": 1})
    )


def change_normalisation(
    model: ModelProto, old: tuple[float, float], new: tuple[float, float]
) -> ModelProto:
    """Normalise images with the ``new`` mean and standard deviation instead of the ``old`` ones."""
    factor, shift = old[1] / new[1], (old[0] - new[0]) / new[1]
    return insert_after(
        model, "images", ("Mul", [np.float32(factor)]), ("Add", [np.float32(shift)])
    )


def fix_batch(model: ModelProto, tensor: str, shape: tuple[int, ...]) -> ModelProto:
    """Insert a Reshape to batch 1 after a tensor."""
    return insert_after(model, tensor, ("Reshape", [np.array([1, *shape[1:]])]))


def overflow_fp16(model: ModelProto, tensor: str) -> ModelProto:
    """Multiply a tensor by 2^15 in FP16 and divide it again.

    In FP16 values above 2 overflow. ONNX Runtime computes it in FP32 on a CPU.
    """
    factor, half = np.float16(2**15), {"to": TensorProto.FLOAT16}
    there: tuple[Step, ...] = (("Cast", [], half), ("Mul", [factor]), ("Neg", []))
    back: tuple[Step, ...] = (("Mul", [-1 / factor]), ("Cast", [], {"to": TensorProto.FLOAT}))
    return insert_after(model, tensor, *there, *back)


def perturb_block(model: ModelProto, block: str, share: float = 0.01) -> ModelProto:
    """Perturb the convolution weights of one block by 1 % (RMS)."""
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(f"{block}.") and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            set_values(tensor, values * (1 + share * rng.standard_normal(values.shape)))
    return model


def swap_channels(model: ModelProto) -> ModelProto:
    """Swap red and blue."""
    weight = initializers(model)["patch_embed1.proj.weight"]
    set_values(weight, numpy_helper.to_array(weight)[:, ::-1])
    return model


def change_epsilon(model: ModelProto, epsilon: float = 1e-3) -> ModelProto:
    """Change the epsilon of the LayerNorms."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = epsilon
    return model


def remove_bias(model: ModelProto, layer: str = "block2.1.mlp.fc1") -> ModelProto:
    """Set the bias of one convolution to 0."""
    node = next(node for node in model.graph.node if node.name == layer)
    bias = initializers(model)[node.input[2]]
    set_values(bias, np.zeros(bias.dims))
    return model


def zero_channel(model: ModelProto, layer: str = "block1.0.mlp.fc2") -> ModelProto:
    """Set one output channel of a convolution to 0: 12 dB or more in INT8."""
    node = next(node for node in model.graph.node if node.name == layer)
    maker = {n.output[0]: n for n in model.graph.node}.get(node.input[1])
    tensors, weight = initializers(model), node.input[1] if maker is None else maker.input[0]
    values = numpy_helper.to_array(tensors[weight]).astype(np.float64)
    sizes = np.abs(values.reshape(len(values), -1)).sum(axis=1)
    if maker is not None:  # integers: their scales make them weights
        sizes *= numpy_helper.to_array(tensors[maker.input[1]])
    for name in (weight, node.input[2]):
        values = numpy_helper.to_array(tensors[name]).copy()
        values[int(sizes.argmax())] = 0
        set_values(tensors[name], values)
    return model


# --- scales ----------------------------------------------------------------------------------


def multiply_scale(model: ModelProto, layer: str, of: str, factor: float) -> ModelProto:
    """Multiply a scale of one layer of a Q/DQ graph.

    Args:
        model: the graph.
        layer: the convolution.
        of: ``activation``, in Q and DQ; ``weight``, whose integers are rounded again.
        factor: ratio to the correct scale.
    """
    tensors = initializers(model)
    makers = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.name == layer)
    scale = tensors[makers[conv.input[0 if of == "activation" else 1]].input[1]]
    set_values(scale, numpy_helper.to_array(scale) * factor)
    if of == "weight":
        integers = tensors[makers[conv.input[1]].input[0]]
        set_values(integers, np.rint(numpy_helper.to_array(integers) / factor))
    return model


def change_scales(
    model: ModelProto, change: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> ModelProto:
    """Change the scales of all activations of a Q/DQ graph."""
    names = dict.fromkeys(n.input[1] for n in model.graph.node if n.op_type == QUANTIZE)
    tensors = [initializers(model)[name] for name in names]
    for tensor, value in zip(tensors, change([*map(numpy_helper.to_array, tensors)]), strict=True):
        set_values(tensor, value)
    return model


def requantize_weights(model: ModelProto, scales: Callable[[np.ndarray], np.ndarray]) -> ModelProto:
    """Round the square weights of a Q/DQ graph with other scales.

    Args:
        model: the graph.
        scales: maps weights ``(O, I)`` to their scales ``(O,)``.
    """
    tensors = initializers(model)
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
