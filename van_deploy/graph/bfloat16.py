"""BF16 graphs on processors that have no BF16 operators.

ONNX Runtime's CPU provider has no BF16 convolution, so a BF16 graph is judged there by an
*emulation* that is derived from it mechanically: the same operators with the same (rounded)
weights in FP32, and behind each operator whose result is BF16 a Cast to BF16 and one back. That
is how a GPU computes it, where sums are kept in FP32 and results are rounded to BF16; a kernel
that fuses several operators rounds less often.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

BF16_EMULATED = "BF16 emulated"  # what reports call such a run
BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def has_bf16(model: ModelProto) -> bool:
    """Return whether a graph stores weights in BF16, or takes or casts to it."""
    graph = model.graph
    return (
        any(tensor.data_type == BFLOAT16 for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in graph.input)
        or any(a.name == "to" and a.i == BFLOAT16 for node in graph.node for a in node.attribute)
    )


def emulate_bf16(model: ModelProto) -> ModelProto:
    """Return ``model`` with FP32 operators, each BF16 result rounded by a pair of Casts.

    Names stay: a tensor that was BF16 is FP32 under its own name, and holds BF16 numbers.
    Inputs and outputs that were BF16 are FP32. A graph without BF16 is returned as it is.
    """
    if not has_bf16(model):
        return model
    inferred = shape_inference.infer_shapes(model).graph
    halves = {
        value.name
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.type.tensor_type.elem_type == BFLOAT16
    }
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    graph.ClearField("node")
    graph.ClearField("value_info")
    for tensor in graph.initializer:
        if tensor.data_type == BFLOAT16:
            stored = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(stored.astype(np.float32), tensor.name))
    rounded = {value.name: f"{value.name}.rounded" for value in graph.input if value.name in halves}
    for name, new in rounded.items():
        graph.node.extend(_rounding(name, new))
    for value in (*graph.input, *graph.output):
        if value.name in halves:
            value.type.tensor_type.elem_type = FLOAT
    for original in model.graph.node:
        node = graph.node.add()
        node.CopyFrom(original)
        for place, name in enumerate(node.input):
            node.input[place] = rounded.get(name, name)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
        for place, name in enumerate(original.output):
            if name in halves:
                node.output[place] = f"{name}.exact"
                graph.node.extend(_rounding(f"{name}.exact", name))
    return result


def _rounding(source: str, target: str) -> list[NodeProto]:
    """Return the two nodes that make of FP32 ``source`` the FP32 ``target`` of BF16 numbers."""
    stored = f"{target}.bf16"
    return [
        helper.make_node("Cast", [source], [stored], name=f"{target}.to_bf16", to=BFLOAT16),
        helper.make_node("Cast", [stored], [target], name=f"{target}.from_bf16", to=FLOAT),
    ]
