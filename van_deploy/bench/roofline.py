"""The least time a network can take: its operations and bytes against a device's limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from van_deploy.bench.ceilings import Ceilings
from van_deploy.config.sizes import ImageSize, sides_of

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Limit", "Work", "limit_of", "work_of", "work_of_file"]

FREE = {"QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Shape", "Constant"}
"""They move or relabel numbers; what they cost is not arithmetic."""

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Work:
    """What one batch asks of a device.

    Attributes:
        batch: images.
        operations: all of them.
        matrix_ops: operations of ordinary and 1x1 convolutions and matrix products in
            floating point; a multiply-add is two.
        quantized_ops: the same where both factors are quantised.
        depthwise_ops: of depth-wise convolutions.
        other_ops: one for each number the remaining operators make.
        weights: number of weights read.
        quantized_weights: how many of those are stored in 8 bits.
        input_values: numbers in the input.
        output_values: numbers in the output.
        operator_values: numbers that pass through memory if every operator reads its
            inputs from it and writes its outputs to it.
    """

    batch: int
    operations: int
    matrix_ops: int
    quantized_ops: int
    depthwise_ops: int
    other_ops: int
    weights: int
    quantized_weights: int
    input_values: int
    output_values: int
    operator_values: int


@dataclass(frozen=True)
class Limit:
    """The least time for some work on some device, and what sets it.

    Attributes:
        ms: the least time: no runtime can be faster.
        bound: which limit that is.
        compute_ms: all operations at the device's rates.
        memory_ms: the weights, the input and the output once through memory, everything
            between them kept in caches.
        traffic_ms: every operator's inputs and outputs through memory: what a run time
            that fuses nothing and caches nothing would need for that alone.
        source: where the device's figures come from.
    """

    ms: float
    bound: Literal["compute", "memory"]
    compute_ms: float
    memory_ms: float
    traffic_ms: float
    source: str


def work_of_file(path: Path, batch: int, image_size: ImageSize | None = None) -> Work:
    """Return the work of one batch through the graph in ``path``."""
    import onnx

    return work_of(onnx.load_model(path, load_external_data=False), batch, image_size)


def work_of(model: ModelProto, batch: int, image_size: ImageSize | None = None) -> Work:
    """Return the work of one batch through ``model``, counted node by node.

    Args:
        model: a graph whose first dimension is the batch.
        batch: images.
        image_size: of the input where it is not the graph's own.
    """
    import onnx

    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    _fix_input_(graph, batch, image_size)
    inferred = onnx.shape_inference.infer_shapes(graph, data_prop=True).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.output, *inferred.value_info)
    }
    weights = {tensor.name: tensor for tensor in inferred.initializer}
    shapes |= {name: list(tensor.dims) for name, tensor in weights.items()}
    counts = _count(inferred.node, shapes, set(weights))
    eight_bit = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    stored = {name: math.prod(tensor.dims) for name, tensor in weights.items()}
    return Work(
        batch=batch,
        weights=sum(stored.values()),
        quantized_weights=sum(stored[n] for n, t in weights.items() if t.data_type in eight_bit),
        input_values=sum(math.prod(shapes[value.name]) for value in inferred.input),
        output_values=sum(math.prod(shapes[value.name]) for value in inferred.output),
        **counts,
    )


def limit_of(work: Work, ceilings: Ceilings, precision: str) -> Limit | None:
    """Return the least time for ``work`` in ``precision``, or None without its rate.

    A graph with quantised parts does those at the INT8 rate and the rest at
    that of ``precision`` (``int8`` counts as ``fp32`` there, as on a CPU).
    """
    kind = "fp32" if precision == "int8" else precision
    rates = ceilings.ops_per_s
    if kind not in rates or (work.quantized_ops and "int8" not in rates):
        return None
    vector = ceilings.vector_ops_per_s or rates["fp32"]
    seconds = work.matrix_ops / rates[kind] + (work.depthwise_ops + work.other_ops) / vector
    if work.quantized_ops:
        seconds += work.quantized_ops / rates["int8"]
    size = BYTES[kind]
    once = work.quantized_weights + size * (work.weights - work.quantized_weights)
    once += 4 * (work.input_values + work.output_values)  # both stay float32
    compute_ms, memory_ms = 1e3 * seconds, 1e3 * once / ceilings.bytes_per_s
    return Limit(
        ms=max(compute_ms, memory_ms),
        bound="compute" if compute_ms >= memory_ms else "memory",
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        traffic_ms=1e3 * size * work.operator_values / ceilings.bytes_per_s,
        source=ceilings.source,
    )


def _fix_input_(model: ModelProto, batch: int, image_size: ImageSize | None) -> None:
    """Set the free dimensions of the input and forget every inferred shape."""
    del model.graph.value_info[:]
    for value in model.graph.output:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        dims[0].dim_value = batch
        if image_size is not None and len(dims) == 4:
            sides = (1, 2) if dims[3].dim_value in {1, 3, 4} else (2, 3)  # bytes come NHWC
            for axis, side in zip(sides, sides_of(image_size), strict=True):
                dims[axis].dim_value = side


def _count(nodes: Any, shapes: Mapping[str, list[int]], constants: set[str]) -> dict[str, int]:
    """Return the operations of every node by kind, and the numbers all of them touch."""
    makers = {output: node for node in nodes for output in node.output}
    counts = dict.fromkeys(("matrix_ops", "quantized_ops", "depthwise_ops", "other_ops"), 0)
    touched = 0
    for node in nodes:
        if node.op_type in FREE:
            continue
        kind, operations = _operations(node, shapes, makers)
        counts[kind] += operations
        names = (*node.input, *node.output)
        touched += sum(math.prod(shapes[name]) for name in names if name in shapes)
    return {"operations": sum(counts.values()), **counts, "operator_values": touched}


def _operations(
    node: NodeProto, shapes: Mapping[str, list[int]], makers: Mapping[str, NodeProto]
) -> tuple[str, int]:
    """Return what kind of work a node is and how many operations."""
    made = math.prod(shapes.get(node.output[0], [0]))
    if node.op_type in {"Conv", "QLinearConv", "ConvInteger"}:
        weight = shapes[node.input[3] if node.op_type == "QLinearConv" else node.input[1]]
        operations = 2 * made * math.prod(weight[1:])
        if weight[1] == 1 and weight[0] > 1 and _groups(node) == weight[0]:
            return "depthwise_ops", operations
        return _float_or_not(node, makers), operations
    if node.op_type in {"Gemm", "MatMul", "QLinearMatMul", "MatMulInteger"}:
        inner = shapes[node.input[0]][-1]
        return _float_or_not(node, makers), 2 * made * inner
    if node.op_type == "ReduceMean":
        return "other_ops", math.prod(shapes.get(node.input[0], [0]))
    return "other_ops", made


def _float_or_not(node: NodeProto, makers: Mapping[str, NodeProto]) -> str:
    """Return whether both factors of a product are quantised, as the kind of work."""
    if node.op_type in {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"}:
        return "quantized_ops"
    factors = [makers.get(name) for name in node.input[:2]]
    quantized = all(f is not None and f.op_type == "DequantizeLinear" for f in factors)
    return "quantized_ops" if quantized else "matrix_ops"


def _groups(node: NodeProto) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "group"), 1)
