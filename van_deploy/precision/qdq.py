"""A plan written into a graph as explicit QuantizeLinear and DequantizeLinear.

``tensorrt``  The form TensorRT 10, 11 and RTX read: the *inputs* of the quantised layers pass
              a Q/DQ pair (symmetric int8, one scale a tensor), weights are stored as int8
              behind a DequantizeLinear (one scale an output channel), biases stay float.
              The rest is FP16, or FP32.
``cpu``       What ONNX Runtime's integer kernels want: uint8 activations on both sides, int32
              biases, the rest FP32. What a convolution adds to the residual stream has a
              scale for every channel, in the one form that ONNX Runtime fuses: weights and
              bias are divided by these scales, so that what comes out *is* the integer, to
              be rounded with a scale of 1, and a Mul returns to the network's own units.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import ModelProto

from van_deploy.errors import ConversionError
from van_deploy.graph.files import opset_of
from van_deploy.precision.fp16 import fp16_from_fp32
from van_deploy.precision.plan import LayerPlan, QuantizationPlan, parameters
from van_deploy.precision.scales import Quantizer, rounded

# The first opset whose QuantizeLinear and DequantizeLinear take FP16 scales.
OPSET_FOR_HALF_SCALES = 19

Array = npt.NDArray[np.generic]


def qdq_for_tensorrt(
    model: ModelProto,
    plan: QuantizationPlan,
    *,
    rest: str = "fp16",
    kept: Collection[str] = (),
) -> ModelProto:
    """Return the plan's graph in INT8 for TensorRT, everything else ``rest``.

    Args:
        model: the FP32 graph that the plan's network was rebuilt from; it is not changed.
        plan: the quantised layers and their numbers.
        rest: ``fp16`` or ``fp32``.
        kept: with ``fp16``, nodes that stay FP32.

    Raises:
        ConversionError: FP16 scales need a newer opset than the graph's.
    """
    model = _with_parameters(model, plan)
    if rest == "fp16":
        if opset_of(model) < OPSET_FOR_HALF_SCALES:
            raise ConversionError(
                f"The graph has opset {opset_of(model)}; FP16 scales need "
                f"{OPSET_FOR_HALF_SCALES} or newer.",
                "Export it again with --opset 20, or quantize with --rest fp32.",
            )
        model = fp16_from_fp32(model, kept)
    writer = _Writer(model)
    for node, layer in writer.quantized(plan):
        if layer.weight_scales is not None:
            floats = np.float16 if _input(node, 1).dtype is ir.DataType.FLOAT16 else np.float32
            writer.round_(node, 0, layer.input, floats)
            integers = rounded(parameters(plan.network, str(node.name))[0], layer.weight_scales)
            writer.integers_(node, 1, integers, layer.weight_scales.astype(floats))
    return writer.finished()


def qdq_for_cpu(model: ModelProto, plan: QuantizationPlan) -> ModelProto:
    """Return the plan's graph with uint8 activations and int32 biases, the rest FP32.

    Args:
        model: the FP32 graph that the plan's network was rebuilt from; it is not changed.
        plan: the quantised layers and their numbers, outputs included.
    """
    writer = _Writer(_with_parameters(model, plan))
    for node, layer in writer.quantized(plan):
        for place in (0,) if layer.weight_scales is not None else (0, 1):
            producer = _input(node, place).producer()
            if producer is None or producer.op_type != "DequantizeLinear":
                writer.round_(node, place, layer.input)
        if layer.weight_scales is not None:
            _write_integers_(writer, node, plan, layer)
    return writer.finished()


def _write_integers_(
    writer: _Writer, node: ir.Node, plan: QuantizationPlan, layer: LayerPlan
) -> None:
    """Make a convolution's weight and bias integers, and round what it gives."""
    weight, bias = parameters(plan.network, str(node.name))
    scales = np.asarray(layer.weight_scales, np.float64)
    products = scales * float(layer.input.scale)
    output = layer.output
    unit = 1.0 if output is None or output.scale.ndim == 0 else output.scale
    writer.integers_(node, 1, rounded(weight, scales), (scales / unit).astype(np.float32))
    integers = np.rint(bias / products).astype(np.int32)
    writer.integers_(node, 2, integers, (products / unit).astype(np.float32))
    if output is not None and output.scale.ndim:
        writer.round_output_(node, replace(output, scale=np.array(1.0)), output.scale)
    elif output is not None:
        writer.round_output_(node, output)


class _Writer:
    """Puts Q/DQ pairs into one graph."""

    def __init__(self, model: ModelProto) -> None:
        self.model = ir.from_proto(model)
        self.graph = self.model.graph
        self.pairs: dict[tuple[ir.Value, float], ir.Value] = {}

    def quantized(self, plan: QuantizationPlan) -> list[tuple[ir.Node, LayerPlan]]:
        """Return the nodes of the plan's layers, in order."""
        return [(n, plan.layers[str(n.name)]) for n in self.graph if n.name in plan.layers]

    def round_(
        self, node: ir.Node, place: int, quantizer: Quantizer, floats: npt.DTypeLike = np.float32
    ) -> None:
        """Put a pair before an input of ``node``, one for all readers with the same scale."""
        value = _input(node, place)
        key = (value, float(quantizer.scale))
        if key not in self.pairs:
            again = any(value is other for other, _ in self.pairs)
            stem = f"{value.name}.{node.name}" if again else str(value.name)
            self.pairs[key] = self._pair(node, value, stem, quantizer, floats)
        node.replace_input_with(place, self.pairs[key])

    def round_output_(self, node: ir.Node, quantizer: Quantizer, unit: Array | None = None) -> None:
        """Put a pair behind ``node``, and a Mul by the unit of each channel behind it."""
        made, name = node.outputs[0], str(node.outputs[0].name)
        uses = list(made.uses())
        after = self.graph[self.graph.index(node) + 1]
        if unit is not None:
            made.name = f"{name}.made"
        found = self._pair(after, made, str(made.name), quantizer, np.float32)
        if unit is not None:
            units = self.store(f"{name}.units", unit.reshape(1, -1, 1, 1).astype(np.float32))
            found = self.insert(after, "Mul", [found, units], name)
        for user, place in uses:
            user.replace_input_with(place, found)

    def integers_(self, node: ir.Node, place: int, integers: Array, scales: Array) -> None:
        """Replace a stored input by its integers ``(O, ...)`` behind a DequantizeLinear."""
        old = node.inputs[place] if len(node.inputs) > place else None
        name = f"{node.name}.bias" if old is None else str(old.name)
        stored = [
            self.store(f"{name}.{integers.dtype}", integers),
            self.store(f"{name}.scale", scales),
            self.store(f"{name}.zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        found = self.insert(node, "DequantizeLinear", stored, f"{name}.dequantized", axis=0)
        if old is None:
            node.resize_inputs(place + 1)
        node.replace_input_with(place, found)

    def _pair(
        self,
        before: ir.Node,
        value: ir.Value,
        name: str,
        quantizer: Quantizer,
        floats: npt.DTypeLike,
    ) -> ir.Value:
        kind = np.dtype(np.int8 if quantizer.signed else np.uint8)
        scale = self.store(f"{name}.scale", np.array(quantizer.scale, floats))
        zero = self.store(f"{name}.zero_point", np.array(quantizer.zero_point, kind))
        integers = self.insert(before, "QuantizeLinear", [value, scale, zero], f"{name}.{kind}")
        made = [integers, scale, zero]
        return self.insert(before, "DequantizeLinear", made, f"{name}.dequantized")

    def store(self, name: str, values: Array) -> ir.Value:
        """Return a new stored tensor."""
        array = np.ascontiguousarray(values).reshape(values.shape)  # a scalar stays one
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def insert(
        self, before: ir.Node, operator: str, inputs: list[ir.Value], name: str, **more: int
    ) -> ir.Value:
        """Put a node before another one; return what it gives, called ``name``."""
        made = ir.val(name)
        node = ir.node(operator, inputs, more, outputs=[made], name=f"{name}/{operator}")
        self.graph.insert_before(before, node)
        return made

    def finished(self) -> ModelProto:
        """Return the graph without the stored tensors that nothing reads any more."""
        for name in [n for n, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        return ir.to_proto(self.model)


def _with_parameters(model: ModelProto, plan: QuantizationPlan) -> ModelProto:
    """Return the FP32 graph with the plan's weights and biases, and what was inserted."""
    writer = _Writer(model)
    for node in [node for node in writer.graph if node.op_type in {"Conv", "Gemm"}]:
        name = str(node.name)
        for place, values in enumerate(parameters(plan.network, name), 1):
            if place < len(node.inputs):
                stored = _input(node, place)
                stored.const_value = ir.tensor(values, name=stored.name)
            elif values.any():
                node.resize_inputs(place + 1)
                node.replace_input_with(place, writer.store(f"{name}.bias", values))
        if name in plan.inserted:
            multiplier, offset = plan.inserted[name].multiply_add()
            for operator, values in (("Mul", multiplier), ("Add", offset)):
                constant = writer.store(f"{name}.{operator}.by", values.reshape(1, -1, 1, 1))
                given = [_input(node, 0), constant]
                made = writer.insert(node, operator, given, f"{name}.{operator.lower()}")
                node.replace_input_with(0, made)
    return writer.finished()


def _input(node: ir.Node, place: int) -> ir.Value:
    return cast("ir.Value", node.inputs[place])  # VAN's operators leave no input out
