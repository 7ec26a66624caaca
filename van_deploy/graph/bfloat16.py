"""Emulate BF16 graphs in FP32 on processors without BF16 operators.

ONNX Runtime's CPU provider has no BF16 convolution. There, a BF16 graph runs as an *emulation* that
is derived from it mechanically: the same operators with the same (rounded) weights in FP32, and
after each operator with a BF16 result a Cast to BF16 and back. A GPU computes alike: it accumulates
in FP32 and rounds results to BF16; a kernel that fuses several operators rounds less often.
"""

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, TensorProto, shape_inference

BF16_EMULATED = "BF16 emulated"  # label in reports
FLOAT, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.BFLOAT16


def has_bf16(model: ModelProto) -> bool:
    """Return whether a graph has BF16 weights or inputs, or a Cast to BF16."""
    graph, bf16 = model.graph, TensorProto.BFLOAT16
    return (
        any(tensor.data_type == bf16 for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == bf16 for value in graph.input)
        or any(a.name == "to" and a.i == bf16 for node in graph.node for a in node.attribute)
    )


def emulate_bf16(model: ModelProto) -> ModelProto:
    """Return ``model`` with FP32 operators and each BF16 result rounded by a pair of Casts.

    A BF16 tensor becomes an FP32 tensor of the same name whose values are exact in BF16.
    BF16 inputs and outputs become FP32. A graph without BF16 is returned unchanged.
    """
    if not has_bf16(model):
        return model
    result = ir.from_proto(shape_inference.infer_shapes(model))
    graph = result.graph
    for weight in graph.initializers.values():
        if weight.dtype is BFLOAT16 and weight.const_value is not None:
            values = weight.const_value.numpy().astype(np.float32)
            weight.const_value, weight.dtype = ir.tensor(values, name=weight.name), FLOAT
    for node in graph:
        if "to" in node.attributes and node.attributes["to"].value == BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    for value in (*graph.inputs, *[output for node in graph for output in node.outputs]):
        if value.dtype is BFLOAT16:
            _round_to_bf16_(graph, value)
    return ir.to_proto(result)


def _round_to_bf16_(graph: ir.Graph, value: ir.Value) -> None:
    """Insert two Casts after a tensor, to BF16 and back; the second output gets its name."""
    name, producer, uses = str(value.name), value.producer(), list(value.uses())
    value.dtype = FLOAT
    if producer is None:  # inputs keep their names
        name = f"{name}.rounded"
    else:
        value.name = f"{name}.exact"
    bf16, rounded = ir.val(f"{name}.bf16", BFLOAT16, value.shape), ir.val(name, FLOAT, value.shape)
    casts = [
        ir.node("Cast", [value], {"to": BFLOAT16}, outputs=[bf16], name=f"{name}.to_bf16"),
        ir.node("Cast", [bf16], {"to": FLOAT}, outputs=[rounded], name=f"{name}.from_bf16"),
    ]
    if producer is None:
        graph.insert_before(graph[0], casts)
    else:
        graph.insert_after(producer, casts)
    for user, index in uses:
        user.replace_input_with(index, rounded)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = rounded
