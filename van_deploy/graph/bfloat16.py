"""Emulate BF16 graphs in FP32 on processors without BF16 operators.

ONNX Runtime's CPU provider has no BF16 convolution. There, a BF16 graph runs as an *emulation* that
is derived from it mechanically: the same operators with the same (rounded) weights in FP32, and
after each operator with a BF16 result a Cast to BF16 and back. A GPU computes alike: it accumulates
in FP32 and rounds results to BF16; a kernel that fuses several operators rounds less often.
"""

import ml_dtypes
import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

BF16_EMULATED = "BF16 emulated"  # label in reports
BFLOAT16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def has_bf16(model: ModelProto) -> bool:
    """Return whether a graph has BF16 weights or inputs, or a Cast to BF16."""
    graph = model.graph
    return (
        any(tensor.data_type == BFLOAT16 for tensor in graph.initializer)
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in graph.input)
        or any(a.name == "to" and a.i == BFLOAT16 for node in graph.node for a in node.attribute)
    )


def emulate_bf16(model: ModelProto) -> ModelProto:
    """Return ``model`` with FP32 operators and each BF16 result rounded by a pair of Casts.

    A BF16 tensor becomes an FP32 tensor of the same name whose values are exact in BF16.
    BF16 inputs and outputs become FP32. A graph without BF16 is returned unchanged.
    """
    if not has_bf16(model):
        return model
    inferred = shape_inference.infer_shapes(model).graph
    bf16_names = {
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
            weights = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(weights.astype(np.float32), tensor.name))
    rounded = {i.name: f"{i.name}.rounded" for i in graph.input if i.name in bf16_names}
    for name, new in rounded.items():
        graph.node.extend(_round_to_bf16(name, new))
    for value in (*graph.input, *graph.output):
        if value.name in bf16_names:
            value.type.tensor_type.elem_type = FLOAT
    for original in model.graph.node:
        node = graph.node.add()
        node.CopyFrom(original)
        for index, name in enumerate(node.input):
            node.input[index] = rounded.get(name, name)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
        for index, name in enumerate(original.output):
            if name in bf16_names:
                node.output[index] = f"{name}.exact"
                graph.node.extend(_round_to_bf16(f"{name}.exact", name))
    return result


def _round_to_bf16(source: str, target: str) -> list[NodeProto]:
    """Return two Casts that round the FP32 tensor ``source`` to BF16 and back into ``target``."""
    bf16 = f"{target}.bf16"
    return [
        helper.make_node("Cast", [source], [bf16], name=f"{target}.to_bf16", to=BFLOAT16),
        helper.make_node("Cast", [bf16], [target], name=f"{target}.from_bf16", to=FLOAT),
    ]
