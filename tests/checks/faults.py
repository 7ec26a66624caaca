"""Faulty graphs for tests of the gates."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

QUANTIZE = "QuantizeLinear"
Step = tuple[Any, ...]
"""An operator, its constant inputs, and optionally its attributes."""
Fault = Callable[[ModelProto], ModelProto]


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
    makers = [place for place, node in enumerate(nodes) if tensor in node.output]
    given, last = (f"{tensor}.right", tensor) if makers else (tensor, f"{tensor}.wrong")
    if makers:
        nodes[makers[0]].output[0] = given
    for node in () if makers else nodes:
        node.input[:] = [last if name == tensor else name for name in node.input]
    new = []
    for number, (kind, constants, *options) in enumerate(steps, 1):
        names = [f"{tensor}.{number}.{index}" for index in range(len(constants))]
        arrays = map(np.asarray, constants)
        model.graph.initializer.extend(map(numpy_helper.from_array, arrays, names))
        out = last if number == len(steps) else f"{tensor}.{number}"
        new.append(helper.make_node(kind, [given, *names], [out], f"{out}.fault", **dict(*options)))
        given = out
    place = makers[0] + 1 if makers else 0
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *new, *nodes[place:]])
    return model


def inserted(tensor: str, *steps: Step) -> Fault:
    """Return a fault: operators after a tensor."""
    return lambda model: insert_after(model, tensor, *steps)


negate_logits = inserted("logits", ("Neg", []))
zero_logits = inserted("logits", ("Mul", [np.float32(0)]))
LAST_TO_FIRST = [np.array([value]) for value in (-1, np.iinfo(np.int32).min, 0, -1)]
reverse_rows = inserted("logits", ("Slice", LAST_TO_FIRST))  # correct at batch 1


def swap_classes(model: ModelProto) -> ModelProto:
    """Swap the first two classes."""
    size = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    order = np.array([1, 0, *range(2, size)])
    return insert_after(model, "logits", ("Gather", [order], {"axis": 1}))


def change_normalisation(old: tuple[float, float], new: tuple[float, float]) -> Fault:
    """Normalise with the ``new`` mean and standard deviation instead of the ``old`` ones."""
    factor, shift = np.float32(old[1] / new[1]), np.float32((old[0] - new[0]) / new[1])
    return inserted("images", ("Mul", [factor]), ("Add", [shift]))


def fix_batch(tensor: str, shape: tuple[int, ...]) -> Fault:
    """Insert a Reshape to batch 1 after a tensor."""
    return inserted(tensor, ("Reshape", [np.array([1, *shape])]))


def overflow_fp16(tensor: str) -> Fault:
    """Multiply a tensor by 2^15 in FP16 and divide it again.

    In FP16 values above 2 overflow. ONNX Runtime computes it in FP32 on a CPU.
    """
    factor, half = np.float16(2**15), {"to": TensorProto.FLOAT16}
    there: tuple[Step, ...] = (("Cast", [], half), ("Mul", [factor]), ("Neg", []))
    back: tuple[Step, ...] = (("Mul", [-1 / factor]), ("Cast", [], {"to": TensorProto.FLOAT}))
    return inserted(tensor, *there, *back)


def perturb_block(model: ModelProto, block: str) -> ModelProto:
    """Perturb the convolution weights of one block by 1 % (RMS)."""
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.name.startswith(f"{block}.") and tensor.name.endswith(".weight"):
            values = numpy_helper.to_array(tensor).astype(np.float64)
            set_values(tensor, values * (1 + 0.01 * rng.standard_normal(values.shape)))
    return model


def swap_channels(model: ModelProto) -> ModelProto:
    """Swap red and blue."""
    weight = initializers(model)["patch_embed1.proj.weight"]
    set_values(weight, numpy_helper.to_array(weight)[:, ::-1])
    return model


def change_epsilon(model: ModelProto) -> ModelProto:
    """Change the epsilon of the LayerNorms."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-3
    return model


def zero_channel(model: ModelProto) -> ModelProto:
    """Set the output channel with the largest weights to 0: 12 dB or more in INT8."""
    tensors, layer = initializers(model), "block1.0.mlp.fc2"
    arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    if f"{layer}.weight" in arrays:
        sizes = abs(arrays[f"{layer}.weight"].astype(np.float64)).sum(axis=(1, 2, 3))
    else:  # integers: their scales make them weights
        sizes = abs(arrays[f"{layer}.weight.int8"].astype(np.float64)).sum(axis=(1, 2, 3))
        sizes *= arrays[f"{layer}.weight.scale"]
    kept = np.ones((len(sizes), 1, 1), arrays[f"{layer}.bias"].dtype)
    kept[sizes.argmax()] = 0
    return insert_after(model, layer, ("Mul", [kept]))


# --- scales ----------------------------------------------------------------------------------


def multiply_scale(model: ModelProto, layer: str, factor: float) -> ModelProto:
    """Multiply the scale of a convolution's input in a Q/DQ graph."""
    makers = {node.output[0]: node for node in model.graph.node}
    conv = next(node for node in model.graph.node if node.name == layer)
    scale = initializers(model)[makers[conv.input[0]].input[1]]
    set_values(scale, numpy_helper.to_array(scale) * factor)
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


def requantize_weights(
    model: ModelProto, scales: Callable[[np.ndarray], np.ndarray], layer: str = ""
) -> ModelProto:
    """Round weights of a Q/DQ graph with other scales.

    Args:
        model: the graph.
        scales: maps weights ``(O, I)`` to their scales ``(O,)``.
        layer: the convolution; by default all with as many outputs as inputs.
    """
    tensors = initializers(model)
    for node in model.graph.node:
        integers = tensors.get(node.input[0])
        if node.op_type != "DequantizeLinear" or integers is None:
            continue
        codes = numpy_helper.to_array(integers).astype(np.float64)
        old = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
        matrix = codes.reshape(len(codes), -1) * old[:, None]
        chosen = integers.name.startswith(f"{layer}.") if layer else len(set(matrix.shape)) == 1
        if chosen:
            new = scales(matrix).astype(np.float16).astype(np.float64)
            set_values(tensors[node.input[1]], new)
            rounded = np.clip(np.rint(matrix / new[:, None]), -127, 127)
            set_values(integers, rounded.reshape(codes.shape))
    return model
