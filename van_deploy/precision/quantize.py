"""A plan written into a graph as explicit QuantizeLinear and DequantizeLinear.

The form TensorRT 10, 11 and RTX read: the *inputs* of the quantised convolutions
pass a Q/DQ pair (symmetric int8, one scale a tensor), their weights are stored
as int8 behind a DequantizeLinear (one scale an output channel), and the bias
stays float. What is not quantised is FP16, or FP32 if asked.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.errors import ConversionError
from van_deploy.precision.half import half_from_fp32
from van_deploy.precision.plan import ConvPlan, QuantizationPlan, storable_scales, weighted_nodes

__all__ = ["OPSET_FOR_HALF_SCALES", "multiply_adds", "qdq_from_plan", "quantized_share"]

OPSET_FOR_HALF_SCALES = 19
"""The first opset whose QuantizeLinear and DequantizeLinear take FP16 scales."""


def qdq_from_plan(
    plan: QuantizationPlan,
    *,
    rest: str = "fp16",
    kept: Mapping[str, str] | None = None,
    half_io: bool = False,
) -> ModelProto:
    """Return the plan's graph in INT8 for TensorRT, everything else ``rest``.

    Args:
        plan: what to quantise; its model is not changed.
        rest: ``fp16`` or ``fp32``.
        kept: with ``fp16``, nodes that stay FP32, and why.
        half_io: with ``fp16``, make the graph's input and output FP16 too.

    Raises:
        ConversionError: FP16 scales need a newer opset than the graph's, or a
            scale of the plan is zero in FP16.
    """
    model = plan.model
    if rest == "fp16":
        _require_half_scales(model)
        model = half_from_fp32(model, kept or {}, half_io=half_io).model
    result = ModelProto()
    result.CopyFrom(model)
    writer = _Writer(result, plan)
    writer.write_()
    return result


def _require_half_scales(model: ModelProto) -> None:
    opset = next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})
    if opset < OPSET_FOR_HALF_SCALES:
        raise ConversionError(
            f"The graph has opset {opset}; FP16 scales need {OPSET_FOR_HALF_SCALES} or newer.",
            "Export it again with --opset 20, or quantize with --rest fp32.",
        )


class _Writer:
    """Puts the pairs of one plan into one graph."""

    def __init__(self, model: ModelProto, plan: QuantizationPlan) -> None:
        self.graph = model.graph
        self.plan = plan
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.pairs: dict[tuple[str, float], str] = {}
        self.nodes: list[NodeProto] = []

    def write_(self) -> None:
        for node in self.graph.node:
            conv = self.plan.convs.get(node.name)
            if conv is not None:
                self._quantize_(node, conv)
            self.nodes.append(node)
        copied = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        used = {name for node in copied for name in node.input}
        stored = [
            TensorProto.FromString(tensor.SerializeToString())
            for tensor in self.graph.initializer
            if tensor.name in used
        ]
        for field in (self.graph.node, self.graph.initializer):
            del field[:]
        self.graph.node.extend(copied)
        self.graph.initializer.extend(stored)

    def _quantize_(self, node: NodeProto, conv: ConvPlan) -> None:
        floats = numpy_helper.to_array(self.stored[node.input[1]]).dtype
        weight_name = node.input[1]
        node.input[0] = self._activation(node.input[0], conv, floats)
        node.input[1] = self._weight(weight_name, conv, floats)
        if conv.bias is not None:
            name = node.input[2] if len(node.input) > 2 else f"{node.name}.bias"
            self._store(name, conv.bias.astype(floats))
            del node.input[2:]
            node.input.append(name)

    def _activation(self, name: str, conv: ConvPlan, floats: npt.DTypeLike) -> str:
        """Return the name of the activation after its pair, one pair for all its readers."""
        key = (name, conv.activation_scale)
        if key not in self.pairs:
            suffix = f".{conv.node}" if any(name == other for other, _ in self.pairs) else ""
            out = f"{name}{suffix}.dequantized"
            integers, scale, zero = (
                f"{name}{suffix}.{word}" for word in ("int8", "scale", "zero_point")
            )
            self._store(scale, np.array(_scale(conv.activation_scale, conv.node), floats))
            self._store(zero, np.array(0, np.int8))
            self._pair_half("QuantizeLinear", [name, scale, zero], integers)
            self._pair_half("DequantizeLinear", [integers, scale, zero], out)
            self.pairs[key] = out
        return self.pairs[key]

    def _weight(self, name: str, conv: ConvPlan, floats: npt.DTypeLike) -> str:
        """Return the name of the weight after its DequantizeLinear."""
        integers, scale, zero = (f"{name}.{word}" for word in ("int8", "scale", "zero_point"))
        out = f"{name}.dequantized"
        self._store(integers, conv.weight)
        self._store(scale, _scale(conv.weight_scale, conv.node).astype(floats))
        self._store(zero, np.zeros(len(conv.weight_scale), np.int8))
        self._pair_half("DequantizeLinear", [integers, scale, zero], out, axis=0)
        return out

    def _pair_half(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        self.nodes.append(
            helper.make_node(operator, inputs, [output], name=output, **attributes)  # type: ignore[arg-type]
        )

    def _store(self, name: str, values: npt.NDArray[np.generic]) -> None:
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        if values.ndim == 0:  # ascontiguousarray makes a scalar a vector
            tensor = numpy_helper.from_array(np.array(values), name)
        if name in self.stored:
            self.stored[name].CopyFrom(tensor)
        else:
            self.graph.initializer.append(tensor)
            self.stored[name] = self.graph.initializer[-1]


def _scale(scales: npt.ArrayLike, node: str) -> npt.NDArray[np.float32]:
    """Return scales as they can be stored, after refusing what is none.

    Raises:
        ConversionError: one is not positive and finite.
    """
    values = np.asarray(scales, np.float32)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ConversionError(
            f"A scale of '{node}' is not a positive number: {values.min():g}.",
            "This is a fault of the method that made the plan; choose another --method.",
        )
    return storable_scales(values)


def quantized_share(plan: QuantizationPlan) -> float:
    """Return which share (0..1) of the graph's multiply-adds runs in INT8."""
    work = multiply_adds(plan.model)
    return sum(work[name] for name in plan.convs) / sum(work.values())


def multiply_adds(model: ModelProto) -> dict[str, int]:
    """Return the multiply-adds of each Conv and Gemm for one image."""
    from onnx.shape_inference import infer_shapes

    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*infer_shapes(model).graph.value_info, *model.graph.output)
    }
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    return {
        name: sizes[node.input[1]] * int(np.prod(shapes[node.output[0]][2:]) or 1)
        for name, node in weighted_nodes(model).items()
    }
