"""A plan written for ONNX Runtime on a CPU, whose fast graphs differ from TensorRT's.

Its integer convolutions want uint8 activations on *both* sides and int32 biases,
else a pair of Q/DQ is only extra work. So every quantised convolution and gate
gets its output quantised as well; GELU, the residual additions, LayerNorm and the
head stay FP32 between them. All convolutions are quantised, the depth-wise ones
too: left in FP32 they cost a change of layout on each side, which is more than
they take (`benchmarks/precision.py --only cpu`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.precision.plan import ConvPlan, QuantizationPlan
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.scales import DEFAULT_PERCENTILE, AffineScale, Method, affine_scale

__all__ = ["CPU_SCOPE", "qdq_for_cpu"]

CPU_SCOPE = "all"
"""What is quantised by default for a CPU; see the module's docstring."""

LARGEST_BIAS = 2.0**30  # of an int32, with a factor of two to spare for the sum it joins


def qdq_for_cpu(
    plan: QuantizationPlan,
    ranges: Ranges,
    method: Method = Method.MSE,
    *,
    percentile: float = DEFAULT_PERCENTILE,
) -> ModelProto:
    """Return the plan's graph with uint8 activations and int32 biases, the rest FP32.

    Args:
        plan: the convolutions and their rounded weights; its model is not changed.
        ranges: of that model, with histograms of the tensors the convolutions
            read and make.
        method: how the activations' ranges are read.
        percentile: for :attr:`Method.PERCENTILE`, 0..1.
    """
    model = ModelProto()
    model.CopyFrom(plan.model)
    quantized = {**dict.fromkeys(plan.convs), **dict.fromkeys(_gates(model, plan.convs))}
    chosen = {
        name: affine_scale(ranges.tensors[name], method, percentile=percentile)
        for name in _tensors(model, set(quantized))
    }
    _CpuWriter(model, plan.convs, set(quantized), chosen).write_()
    return model


def _gates(model: ModelProto, convs: Mapping[str, ConvPlan]) -> list[str]:
    """Return the multiplications of which one side is made and the result read by ``convs``."""
    makers = {name: node.name for node in model.graph.node for name in node.output}
    readers = _readers(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Mul"
        and any(makers.get(name) in convs for name in node.input)
        and all(reader in convs for reader in readers[node.output[0]])
    ]


def _readers(model: ModelProto) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node.name)
    return readers


def _tensors(model: ModelProto, quantized: set[str]) -> list[str]:
    """Return the tensors the quantised nodes read and make, without stored ones and outputs."""
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.name not in quantized:
            continue
        inputs = node.input if node.op_type == "Mul" else node.input[:1]
        found |= dict.fromkeys(name for name in (*inputs, *node.output) if name not in stored)
    for output in model.graph.output:
        found.pop(output.name, None)
    return list(found)


class _CpuWriter:
    """Puts Q/DQ around the quantised nodes of one graph."""

    def __init__(
        self,
        model: ModelProto,
        convs: Mapping[str, ConvPlan],
        quantized: set[str],
        scales: Mapping[str, AffineScale],
    ) -> None:
        self.graph = model.graph
        self.convs = convs
        self.quantized = quantized
        self.scales = scales
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.read_as: dict[str, str] = {}  # what a quantised reader reads instead of a tensor
        self.made_quantized: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.new: list[TensorProto] = []

    def write_(self) -> None:
        dropped: set[str] = set()
        for node in self.graph.node:
            quantized = node.name in self.quantized
            for index, name in enumerate(node.input):
                if name in self.scales and (quantized or name in self.made_quantized):
                    node.input[index] = self._dequantized(name)
            if quantized and node.name in self.convs:
                dropped |= set(node.input[1:])
                self._parameters_(node, self.convs[node.name])
            self.nodes.append(node)
            if quantized:
                self.made_quantized |= {name for name in node.output if name in self.scales}
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
            chosen = self.scales[name]
            integers, scale, zero = (f"{name}.{word}" for word in ("uint8", "scale", "zero_point"))
            self._store(scale, np.array(chosen.scale, np.float32))
            self._store(zero, np.array(chosen.zero_point, np.uint8))
            out = f"{name}.dequantized"
            self._make("QuantizeLinear", [name, scale, zero], integers)
            self._make("DequantizeLinear", [integers, scale, zero], out)
            self.read_as[name] = out
        return self.read_as[name]

    def _parameters_(self, node: NodeProto, conv: ConvPlan) -> None:
        """Replace a node's weight and bias by their integers behind DequantizeLinear."""
        activation = self.scales[conv.activation].scale
        weight, steps = _with_room_for_bias(conv, activation)
        name = node.input[1]
        node.input[1] = self._stored_integers(name, weight, steps, np.int8)
        if conv.bias is None:
            return
        products = steps.astype(np.float64) * activation
        integers = np.rint(conv.bias.astype(np.float64) / products).astype(np.int32)
        bias = node.input[2] if len(node.input) > 2 else f"{node.name}.bias"
        del node.input[2:]
        node.input.append(
            self._stored_integers(bias, integers, products.astype(np.float32), np.int32)
        )

    def _stored_integers(
        self,
        name: str,
        integers: npt.NDArray[np.generic],
        steps: npt.NDArray[np.float32],
        kind: npt.DTypeLike,
    ) -> str:
        parts = [f"{name}.{word}" for word in ("integers", "scale", "zero_point")]
        self._store(parts[0], integers.astype(kind))
        self._store(parts[1], steps)
        self._store(parts[2], np.zeros(len(steps), kind))
        self._make("DequantizeLinear", parts, f"{name}.dequantized", axis=0)
        return f"{name}.dequantized"

    def _make(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        node = helper.make_node(operator, inputs, [output], name=output)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)

    def _store(self, name: str, values: npt.NDArray[np.generic]) -> None:
        self.new.append(numpy_helper.from_array(values, name))


def _with_room_for_bias(
    conv: ConvPlan, activation: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return the integers and steps of a weight, with steps wide enough for an int32 bias.

    A channel of nearly no weights has a tiny step, and its bias would not fit.
    """
    if conv.bias is None:
        return conv.weight, conv.weight_scale
    needed = np.abs(conv.bias.astype(np.float64)) / (activation * LARGEST_BIAS)
    steps = np.maximum(conv.weight_scale, needed).astype(np.float32)
    ratio = (conv.weight_scale / steps).reshape((-1,) + (1,) * (conv.weight.ndim - 1))
    return np.rint(conv.weight * ratio).astype(np.int8), steps
