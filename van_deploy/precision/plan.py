"""What is going to be quantised, and with which numbers: decided before any file is written.

Everything that raises fidelity (equalisation, bias correction, refined scales,
learnt rounding, a search) takes a plan and returns another. Only
:mod:`van_deploy.precision.quantize` turns one into a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from van_deploy.errors import ConversionError

__all__ = [
    "FP16_LARGEST",
    "INT8_LIMIT",
    "SMALLEST_SCALE",
    "ConvPlan",
    "QuantizationPlan",
    "parameters_of",
    "simulate",
    "storable_scales",
    "weight_scales",
    "weighted_nodes",
]

INT8_LIMIT = 127
"""Symmetric: -128 is not used, so that a value and its opposite are both there."""

SMALLEST_SCALE = 2.0**-14
"""Smallest normal FP16 number, 6.1e-5. A smaller scale would be denormal or zero as FP16,
and TensorRT refuses zero; the weights are rounded with the floored scale."""

FP16_LARGEST = 65504.0

Int8Array = npt.NDArray[np.int8]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ConvPlan:
    """One convolution, or the Gemm of the head, that will run in INT8.

    Attributes:
        node: name of the node in the FP32 graph, which is its PyTorch module path.
        activation: name of the tensor it reads.
        activation_scale: step of that tensor: symmetric int8, zero-point 0.
        weight: ``(O, I/g, kh, kw)`` (Gemm: as in the graph), already rounded, in -127..127.
        weight_scale: ``(O,)`` step of each output channel's weights.
        bias: ``(O,)`` float32, or None where the node has none.
    """

    node: str
    activation: str
    activation_scale: float
    weight: Int8Array
    weight_scale: FloatArray
    bias: FloatArray | None

    @property
    def dequantized_weight(self) -> FloatArray:
        """The weights the quantised convolution really multiplies with, float32."""
        shape = (-1,) + (1,) * (self.weight.ndim - 1)
        return np.multiply(self.weight, self.weight_scale.reshape(shape), dtype=np.float32)


@dataclass(frozen=True)
class QuantizationPlan:
    """Every quantised node of a graph.

    Attributes:
        model: the FP32 graph the plan is for, equalised or not; never changed.
        convs: the quantised nodes by name, in the graph's order.
        facts: what made the plan what it is, for the manifest.
    """

    model: ModelProto
    convs: Mapping[str, ConvPlan]
    facts: Mapping[str, Any] = field(default_factory=dict)


def weighted_nodes(model: ModelProto) -> dict[str, NodeProto]:
    """Return the Conv and Gemm nodes by name, in the graph's order."""
    return {node.name: node for node in model.graph.node if node.op_type in {"Conv", "Gemm"}}


def parameters_of(model: ModelProto, node: NodeProto) -> tuple[FloatArray, FloatArray | None]:
    """Return a weighted node's weight and bias (None where it has none) as float32 arrays.

    Raises:
        ConversionError: the weight is not stored in the graph.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if node.input[1] not in stored:
        raise ConversionError(
            f"The weights of '{node.name}' are computed in the graph, not stored in it.",
            "Export the network again with van-deploy.",
        )
    weight = numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
    if len(node.input) < 3 or not node.input[2]:
        return weight, None
    return weight, numpy_helper.to_array(stored[node.input[2]]).astype(np.float32)


def weight_scales(weight: FloatArray) -> FloatArray:
    """Return each output channel's step ``(O,)``: its largest magnitude over 127, storable."""
    return storable_scales(np.abs(weight.reshape(len(weight), -1)).max(axis=1) / INT8_LIMIT)


def storable_scales(scales: npt.ArrayLike) -> FloatArray:
    """Return positive ``scales`` as float32 numbers that FP16 holds exactly.

    Each is rounded up, so that what a scale covered is still covered, and is at
    least :data:`SMALLEST_SCALE`. Integers rounded with these scales mean the same
    in a file whose scales are FP16.

    >>> storable_scales([0.0, 0.1]).tolist()
    [6.103515625e-05, 0.10003662109375]
    """
    wanted = np.clip(np.asarray(scales, np.float64), SMALLEST_SCALE, FP16_LARGEST)
    half = wanted.astype(np.float16)
    short = half.astype(np.float64) < wanted
    up = np.nextafter(half, np.where(short, np.float16(np.inf), half))
    return np.asarray(up, dtype=np.float32)


def simulate(plan: QuantizationPlan) -> ModelProto:
    """Return the FP32 graph with the plan's rounding in it, quick to run on a CPU.

    Activations pass a QuantizeLinear and a DequantizeLinear (float32 scale, int8),
    weights are stored dequantised. Every node keeps its name and its output's
    name, so any of them can be asked for as an extra output. ONNX Runtime must
    not fuse the pairs into integer kernels, which on a CPU are slower for
    symmetric int8: open the session with ``session.disable_quant_qdq = 1``.
    """
    model = ModelProto()
    model.CopyFrom(plan.model)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    faked: dict[tuple[str, float], str] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        conv = plan.convs.get(node.name)
        if conv is not None:
            key = (conv.activation, conv.activation_scale)
            if key not in faked:
                suffix = f"/{node.name}" if conv.activation in {a for a, _ in faked} else ""
                faked[key] = f"{conv.activation}.simulated{suffix}"
                nodes += _fake_quantize(graph, conv, faked[key])
            node.input[0] = faked[key]
            _replace(tensors[node.input[1]], conv.dequantized_weight)
            if conv.bias is not None:
                _replace(tensors[node.input[2]], conv.bias)
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return model


def _fake_quantize(graph: Any, conv: ConvPlan, name: str) -> list[NodeProto]:
    """Return the pair of nodes that rounds ``conv``'s input; its parameters go into ``graph``."""
    scale, zero = f"{name}.scale", f"{name}.zero_point"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(conv.activation_scale, np.float32), scale),
            helper.make_tensor(zero, TensorProto.INT8, [], [0]),
        ]
    )
    integer = f"{name}.int8"
    return [
        helper.make_node("QuantizeLinear", [conv.activation, scale, zero], [integer], integer),
        helper.make_node("DequantizeLinear", [integer, scale, zero], [name], name),
    ]


def _replace(tensor: TensorProto, values: FloatArray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
