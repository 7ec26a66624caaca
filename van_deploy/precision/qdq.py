"""Write a quantisation plan into a graph as explicit QuantizeLinear and DequantizeLinear.

``tensorrt``  The form that TensorRT 10, 11 and RTX read: a Q/DQ pair before the *inputs* of the
              quantised layers (symmetric int8, one scale per tensor), weights stored as int8
              with a DequantizeLinear (one scale per output channel), float biases. All other
              nodes are FP16 or FP32.
``cpu``       The form that ONNX Runtime's integer kernels need: uint8 inputs and outputs, int32
              biases, all other nodes FP32. Outputs that are added to the residual stream have
              one scale per channel, in the only form that ONNX Runtime fuses: weights and bias
              are divided by these scales, the output is quantised with a scale of 1, and a Mul
              multiplies by the scales again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import ModelProto

from van_deploy.precision.fp16 import fp16_from_fp32
from van_deploy.precision.plan import LayerPlan, QuantizationPlan, parameters
from van_deploy.precision.scales import Quantizer, quantize_weight

Array = npt.NDArray[np.generic]


def qdq_for_tensorrt(
    model: ModelProto,
    plan: QuantizationPlan,
    *,
    rest: str = "fp16",
    kept: Collection[str] = (),
) -> ModelProto:
    """Return the plan's INT8 graph for TensorRT.

    Args:
        model: the FP32 graph that the plan's network was rebuilt from; it stays unchanged.
        plan: the quantised layers and their scales.
        rest: type of the other nodes, ``fp16`` (from opset 19 on) or ``fp32``.
        kept: with ``fp16``, nodes that stay FP32, and with them the affines before them.
    """
    model = _with_parameters(model, plan)
    if rest == "fp16":
        layers = [name for name in plan.inserted if name in kept]
        affines = [f"{name}.{node}" for name in layers for node in ("mul/Mul", "add/Add")]
        model = fp16_from_fp32(model, {*kept, *affines})
    writer = _GraphWriter(model)
    for node, layer in writer.planned_nodes(plan):
        if layer.weight_scales is not None:
            dtype = np.float16 if _input(node, 1).dtype is ir.DataType.FLOAT16 else np.float32
            writer.quantize_input_(node, 0, layer.input, dtype)
            weight, _ = parameters(plan.network, str(node.name))
            integers = quantize_weight(weight, layer.weight_scales)
            writer.replace_constant_(node, 1, integers, layer.weight_scales.astype(dtype))
    return writer.result()


def qdq_for_cpu(model: ModelProto, plan: QuantizationPlan) -> ModelProto:
    """Return the plan's graph with uint8 activations and int32 biases, other nodes in FP32.

    Args:
        model: the FP32 graph that the plan's network was rebuilt from; it stays unchanged.
        plan: the quantised layers and their scales, including outputs.
    """
    writer = _GraphWriter(_with_parameters(model, plan))
    for node, layer in writer.planned_nodes(plan):
        for index in (0,) if layer.weight_scales is not None else (0, 1):
            producer = _input(node, index).producer()
            if producer is None or producer.op_type != "DequantizeLinear":
                writer.quantize_input_(node, index, layer.input)
        if layer.weight_scales is not None:
            _quantize_convolution_(writer, node, plan, layer)
    return writer.result()


def _quantize_convolution_(
    writer: _GraphWriter, node: ir.Node, plan: QuantizationPlan, layer: LayerPlan
) -> None:
    """Quantise the weight, the bias and the output of a convolution."""
    weight, bias = parameters(plan.network, str(node.name))
    scales = np.asarray(layer.weight_scales, np.float64)
    bias_scales = scales * float(layer.input.scale)
    output = layer.output
    unit = 1.0 if output is None or output.scale.ndim == 0 else output.scale
    integers = quantize_weight(weight, scales)
    writer.replace_constant_(node, 1, integers, (scales / unit).astype(np.float32))
    bias_integers = np.rint(bias / bias_scales).astype(np.int32)
    writer.replace_constant_(node, 2, bias_integers, (bias_scales / unit).astype(np.float32))
    if output is not None:
        writer.quantize_output_(node, output)


class _GraphWriter:
    """Inserts Q/DQ pairs into one graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ir.from_proto(model)
        self.graph = self.model.graph
        self.pairs: dict[ir.Value, ir.Value] = {}

    def planned_nodes(self, plan: QuantizationPlan) -> list[tuple[ir.Node, LayerPlan]]:
        """Return the nodes of the plan's layers, in order."""
        return [(n, plan.layers[str(n.name)]) for n in self.graph if n.name in plan.layers]

    def quantize_input_(
        self, node: ir.Node, index: int, quantizer: Quantizer, dtype: npt.DTypeLike = np.float32
    ) -> None:
        """Insert a Q/DQ pair before an input; all nodes that read the value share the pair."""
        value = _input(node, index)
        if value not in self.pairs:  # a plan has one scale for each value
            self.pairs[value] = self._insert_pair(node, value, str(value.name), quantizer, dtype)
        node.replace_input_with(index, self.pairs[value])

    def quantize_output_(self, node: ir.Node, quantizer: Quantizer) -> None:
        """Insert a Q/DQ pair after ``node``; scales per channel become 1, followed by a Mul."""
        output, name = node.outputs[0], str(node.outputs[0].name)
        uses = list(output.uses())
        after = self.graph[self.graph.index(node) + 1]
        factors = quantizer.scale.reshape(1, -1, 1, 1).astype(np.float32)
        if per_channel := quantizer.scale.ndim > 0:
            output.name = f"{name}.made"
            quantizer = replace(quantizer, scale=np.array(1.0))
        result = self._insert_pair(after, output, str(output.name), quantizer, np.float32)
        if per_channel:
            result = self.insert(after, "Mul", [result, self.store(f"{name}.units", factors)], name)
        for user, index in uses:
            user.replace_input_with(index, result)

    def replace_constant_(self, node: ir.Node, index: int, integers: Array, scales: Array) -> None:
        """Replace a constant input by integers ``(O, ...)`` with a DequantizeLinear."""
        old = node.inputs[index] if len(node.inputs) > index else None
        name = f"{node.name}.bias" if old is None else str(old.name)
        inputs = [
            self.store(f"{name}.{integers.dtype}", integers),
            self.store(f"{name}.scale", scales),
            self.store(f"{name}.zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        floats = self.insert(node, "DequantizeLinear", inputs, f"{name}.dequantized", axis=0)
        if old is None:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, floats)

    def _insert_pair(
        self, node: ir.Node, value: ir.Value, name: str, quantizer: Quantizer, dtype: npt.DTypeLike
    ) -> ir.Value:
        """Insert a Q/DQ pair of ``value`` before ``node``; return the dequantised value."""
        integer = np.dtype(np.int8 if quantizer.signed else np.uint8)
        scale = self.store(f"{name}.scale", np.array(quantizer.scale, dtype))
        zero = self.store(f"{name}.zero_point", np.array(quantizer.zero_point, integer))
        codes = self.insert(node, "QuantizeLinear", [value, scale, zero], f"{name}.{integer}")
        return self.insert(node, "DequantizeLinear", [codes, scale, zero], f"{name}.dequantized")

    def store(self, name: str, values: Array) -> ir.Value:
        """Return a new initialiser."""
        array = np.ascontiguousarray(values).reshape(values.shape)  # keeps scalars 0-dimensional
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def insert(
        self, before: ir.Node, operator: str, inputs: list[ir.Value], name: str, **attributes: int
    ) -> ir.Value:
        """Insert a node before another one; return its output, which gets the name ``name``."""
        output = ir.val(name)
        node = ir.node(operator, inputs, attributes, outputs=[output], name=f"{name}/{operator}")
        self.graph.insert_before(before, node)
        return output

    def result(self) -> ModelProto:
        """Return the graph without unused initialisers."""
        for name in [n for n, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        return ir.to_proto(self.model)


def _with_parameters(model: ModelProto, plan: QuantizationPlan) -> ModelProto:
    """Return the FP32 graph with the plan's weights, biases and inserted nodes."""
    writer = _GraphWriter(model)
    for node in [node for node in writer.graph if node.op_type in {"Conv", "Gemm"}]:
        name = str(node.name)
        for index, values in enumerate(parameters(plan.network, name), 1):
            if index < len(node.inputs):
                constant = _input(node, index)
                constant.const_value = ir.tensor(values, name=constant.name)
            elif values.any():
                node.resize_inputs(index + 1)
                node.replace_input_with(index, writer.store(f"{name}.bias", values))
        if name in plan.inserted:
            multiplier, offset = plan.inserted[name].multiply_add()
            for operator, values in (("Mul", multiplier), ("Add", offset)):
                constant = writer.store(f"{name}.{operator}.by", values.reshape(1, -1, 1, 1))
                inputs = [_input(node, 0), constant]
                output = writer.insert(node, operator, inputs, f"{name}.{operator.lower()}")
                node.replace_input_with(0, output)
    return writer.result()


def _input(node: ir.Node, index: int) -> ir.Value:
    return cast("ir.Value", node.inputs[index])  # VAN's operators have no omitted inputs
