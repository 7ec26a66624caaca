"""A plan written for ONNX Runtime on a CPU: uint8 activations, int32 biases, the rest FP32.

An output with a step for every channel is written in the one form that ONNX Runtime
fuses, a QuantizeLinear with one step: the convolution's weights and bias are divided by
the steps, so that what comes out *is* the integer, to be rounded with a step of 1. A Mul
behind the DequantizeLinear returns to the network's own units.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.precision.cpu import PAIR_LIMIT, ZERO_POINT, CpuScales, pair_sums, quantized_nodes
from van_deploy.precision.plan import ConvPlan, QuantizationPlan

__all__ = ["qdq_for_cpu"]

LARGEST_BIAS = 2.0**30  # of an int32, with a factor of two to spare for the sum it joins


def qdq_for_cpu(
    plan: QuantizationPlan, scales: CpuScales, *, own_units: bool = False
) -> ModelProto:
    """Return the plan's graph with uint8 activations and int32 biases, the rest FP32.

    Args:
        plan: the convolutions and their rounded weights; its model is not changed.
        scales: from :func:`~van_deploy.precision.cpu.cpu_scales`, of this plan or of one
            with more convolutions.
        own_units: leave the convolutions in the network's own units, which ONNX Runtime
            does not fuse: to look into the graph, not to deploy it.
    """
    model = ModelProto()
    model.CopyFrom(plan.model)
    _CpuWriter(model, plan, scales, own_units).write_()
    return model


class _CpuWriter:
    """Puts Q/DQ around the quantised nodes of one graph."""

    def __init__(
        self, model: ModelProto, plan: QuantizationPlan, scales: CpuScales, own_units: bool
    ) -> None:
        self.graph = model.graph
        self.convs = plan.convs
        self.quantized = quantized_nodes(model, plan.convs)
        self.scales = scales
        self.own_units = own_units
        self.ends = {output.name for output in model.graph.output}
        self.read_as: dict[str, str] = {}  # what a quantised reader reads instead of a tensor
        self.made_quantized: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.new: list[TensorProto] = []

    def write_(self) -> None:
        for node in self.graph.node:
            quantized = node.name in self.quantized
            for index, name in enumerate(node.input):
                known = name in self.scales.tensors and name not in self.ends
                if known and (quantized or name in self.made_quantized):
                    node.input[index] = self._dequantized(name)
            conv = self.convs.get(node.name)
            output = self.scales.outputs.get(node.output[0]) if conv is not None else None
            if conv is not None:
                self._parameters_(node, conv, output)
            self.nodes.append(node)
            if output is not None:
                self._by_channel_(node, output)
            elif quantized:
                self.made_quantized |= set(node.output)
        self._replace_()

    def _replace_(self) -> None:
        """Put the nodes written into the graph, with the stored tensors that they read."""
        copied = [NodeProto.FromString(node.SerializeToString()) for node in self.nodes]
        used = {name for node in copied for name in node.input}
        kept = [
            TensorProto.FromString(tensor.SerializeToString())
            for tensor in (*self.graph.initializer, *self.new)
            if tensor.name in used
        ]
        for entries in (self.graph.node, self.graph.initializer, self.graph.value_info):
            del entries[:]
        self.graph.node.extend(copied)
        self.graph.initializer.extend(kept)

    def _dequantized(self, name: str) -> str:
        if name not in self.read_as:
            chosen = self.scales.tensors[name]
            integers, scale, zero = (f"{name}.{word}" for word in ("uint8", "scale", "zero_point"))
            self._store(scale, np.array(chosen.scale, np.float32))
            self._store(zero, np.array(chosen.zero_point, np.uint8))
            out = f"{name}.dequantized"
            self._make("QuantizeLinear", [name, scale, zero], integers)
            self._make("DequantizeLinear", [integers, scale, zero], out)
            self.read_as[name] = out
        return self.read_as[name]

    def _by_channel_(self, node: NodeProto, chosen: npt.NDArray[np.float32]) -> None:
        """Make what ``node`` gives pass through integers with the step of each channel."""
        name = node.output[0]
        raw, integers, units = (f"{name}.{word}" for word in ("made", "made.uint8", "made.units"))
        step, zero = f"{name}.made.scale", f"{name}.made.zero_point"
        node.output[0] = raw
        if self.own_units:
            self._store(step, chosen)
            self._store(zero, np.full(len(chosen), ZERO_POINT, np.uint8))
            self._make("QuantizeLinear", [raw, step, zero], integers, axis=1)
            self._make("DequantizeLinear", [integers, step, zero], name, axis=1)
            return
        self._store(step, np.array(1.0, np.float32))
        self._store(zero, np.array(ZERO_POINT, np.uint8))
        self._store(units, chosen.reshape(1, -1, 1, 1))
        self._make("QuantizeLinear", [raw, step, zero], integers)
        self._make("DequantizeLinear", [integers, step, zero], f"{name}.made.dequantized")
        self._make("Mul", [f"{name}.made.dequantized", units], name)

    def _parameters_(
        self, node: NodeProto, conv: ConvPlan, output: npt.NDArray[np.float32] | None
    ) -> None:
        """Replace a node's weight and bias by their integers behind DequantizeLinear."""
        activation = self.scales.tensors[conv.activation].scale
        bias = np.zeros(len(conv.weight_scale)) if conv.bias is None else conv.bias
        unit = np.ones(len(conv.weight_scale))
        if output is not None and not self.own_units:
            unit = output.astype(np.float64)
        weight, steps = _with_room(conv, bias, activation)
        name = node.input[1]
        node.input[1] = self._stored_integers(name, weight, steps / unit, np.int8)
        products = steps.astype(np.float64) * activation
        integers = np.rint(bias / products).astype(np.int32)
        name = node.input[2] if len(node.input) > 2 else f"{node.name}.bias"
        del node.input[2:]
        node.input.append(self._stored_integers(name, integers, products / unit, np.int32))

    def _stored_integers(
        self,
        name: str,
        integers: npt.NDArray[np.generic],
        steps: npt.NDArray[np.floating],
        kind: npt.DTypeLike,
    ) -> str:
        parts = [f"{name}.{word}" for word in ("integers", "scale", "zero_point")]
        self._store(parts[0], integers.astype(kind))
        self._store(parts[1], steps.astype(np.float32))
        self._store(parts[2], np.zeros(len(steps), kind))
        self._make("DequantizeLinear", parts, f"{name}.dequantized", axis=0)
        return f"{name}.dequantized"

    def _make(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        node = helper.make_node(operator, inputs, [output], name=f"{output}/{operator}")
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)

    def _store(self, name: str, values: npt.NDArray[np.generic]) -> None:
        self.new.append(numpy_helper.from_array(values, name))


def _with_room(
    conv: ConvPlan, bias: npt.NDArray[np.floating], activation: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return the integers and steps of a weight, with steps wide enough for what is summed.

    A channel of nearly no weights has a tiny step, and its bias would not fit into 32 bits.
    Two products must fit into 16; the plan's steps see to that, but refining may have moved
    both weights.
    """
    for_bias = np.abs(bias.astype(np.float64)) / (activation * LARGEST_BIAS)
    pairs = pair_sums(conv.weight)
    for_pairs = np.where(pairs > PAIR_LIMIT, pairs / (PAIR_LIMIT - 1), 1.0) * conv.weight_scale
    steps = np.maximum(for_pairs, for_bias).astype(np.float32)
    ratio = (conv.weight_scale / steps).reshape((-1,) + (1,) * (conv.weight.ndim - 1))
    return np.rint(conv.weight * ratio).astype(np.int8), steps
