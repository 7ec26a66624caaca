"""Which tensors a CPU's graph quantises, and with which numbers.

ONNX Runtime's integer convolutions want uint8 activations on *both* sides and int32
biases, else a pair of Q/DQ is only extra work. So every quantised convolution and gate
gets its output quantised as well; GELU, the residual additions, LayerNorm and the head
stay FP32 between them. Depth-wise convolutions are quantised too: left in FP32 they cost
a change of layout on each side, which is more than they take. The stem and the first stage
are not: they have the most pixels and the fewest channels, so that rounding takes as long
there as integers save, and the whole network hears what is lost there
(`benchmarks/precision.py --only cpu`).

What a convolution adds to the residual stream has a step for every channel: its own
weights are put into these units, and one Mul behind returns to the network's
(:mod:`van_deploy.precision.cpu_writer`). A DequantizeLinear by channel would say the
same without a node, but in the channels-last layout that ONNX Runtime 1.32 chooses it
takes a third of the whole time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from van_deploy.precision.plan import (
    FP16_LARGEST,
    SMALLEST_SCALE,
    ConvPlan,
    QuantizationPlan,
    storable_scales,
    weight_scales,
)
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.scales import (
    DEFAULT_PERCENTILE,
    UINT8_LIMIT,
    AffineScale,
    Method,
    affine_between,
    affine_scale,
    clip_magnitude,
)
from van_deploy.precision.tensor_range import TensorRange

__all__ = [
    "CPU_SCOPE",
    "PAIR_LIMIT",
    "ZERO_POINT",
    "CpuScales",
    "added_tensors",
    "cpu_scales",
    "cpu_weight_scales",
    "pair_sums",
    "quantized_nodes",
]

CPU_SCOPE = "deep"
"""What is quantised by default for a CPU; see the module's docstring."""

GELU_ENDS = -4.0
"""GELU of anything smaller is within 1.3e-4 of zero: no integers are spent on it."""

ZERO_POINT = 128
"""Of an output with a step for every channel."""

PAIR_LIMIT = 128
"""Largest magnitude of the sum of two weights that are multiplied side by side: x86 processors
without VNNI add two products of uint8 and int8 in 16 bits (``vpmaddubsw``), where 255 times
more does not fit and is cut off (ONNX Runtime's page on quantisation, "When and why do I
need to try U8U8?")."""

_ROUNDING = 4  # by which rounding may lengthen such a sum; both weights may be moved by two


@dataclass(frozen=True)
class CpuScales:
    """The numbers of every tensor that a CPU's graph quantises.

    Attributes:
        tensors: steps and zero-points.
        outputs: of what convolutions add to the residual stream: the step of each
            channel, ``(C,)``; the zero-point is :data:`ZERO_POINT`.
    """

    tensors: Mapping[str, AffineScale]
    outputs: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)


def cpu_scales(
    plan: QuantizationPlan,
    ranges: Ranges,
    method: Method = Method.MSE,
    *,
    percentile: float = DEFAULT_PERCENTILE,
) -> CpuScales:
    """Return the numbers of every tensor that a plan's graph for a CPU quantises.

    Args:
        plan: the convolutions that are quantised.
        ranges: of its model, with histograms of the tensors the convolutions
            read and make, and with the channels of :func:`added_tensors`; where those
            were not recorded, such an output has one step like any other.
        method: how the activations' ranges are read.
        percentile: for :attr:`Method.PERCENTILE`, 0..1.
    """
    quantized = quantized_nodes(plan.model, plan.convs)
    outputs = {
        name: _channel_steps(ranges.tensors[name])
        for name in added_tensors(plan.model, plan.convs)
        if ranges.tensors[name].channels
    }
    before_gelu = {n.input[0] for n in plan.model.graph.node if n.op_type == "Gelu"}
    tensors: dict[str, AffineScale] = {}
    for name, read in _tensors(plan.model, quantized).items():
        record = ranges.tensors[name]
        if name in before_gelu:
            tensors[name] = affine_between(
                max(record.minimum, GELU_ENDS), clip_magnitude(record, Method.PERCENTILE)
            )
        elif read or name not in outputs:
            tensors[name] = affine_scale(record, method, percentile=percentile)
    return CpuScales(tensors, outputs)


def _channel_steps(record: TensorRange) -> npt.NDArray[np.float32]:
    """Return the steps ``(C,)`` with which nothing is clipped.

    Least squared error, as for whole tensors, clips what these outputs cannot lack: on
    van_b0 it left 30.3 dB of the logits, against 33.4 dB without clipping.
    """
    largest = np.maximum(record.channel_maximum, -record.channel_minimum)
    return np.clip(largest / (UINT8_LIMIT - ZERO_POINT), SMALLEST_SCALE, FP16_LARGEST)


def pair_sums(weight: npt.NDArray[np.number]) -> npt.NDArray[np.float64]:
    """Return each output channel's largest ``|w + v|`` of two neighbouring weights, ``(O,)``.

    Neighbours in the order in which ONNX Runtime multiplies them: kernel row, kernel column,
    input channel. A depth-wise convolution has none: it adds in 32 bits.

    >>> pair_sums(np.array([[3.0, 4.0, -5.0, 1.0]]).reshape(1, 4, 1, 1))
    array([7.])
    """
    if weight.ndim != 4 or weight.shape[1] == 1:
        return np.zeros(len(weight))
    rows = weight.astype(np.float64).transpose(0, 2, 3, 1).reshape(len(weight), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return np.abs(rows[:, ::2] + rows[:, 1::2]).max(axis=1)


def cpu_weight_scales(weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return each output channel's step ``(O,)``, wide enough that no two products overflow."""
    wide = storable_scales(pair_sums(weight) / (PAIR_LIMIT - _ROUNDING))
    return np.maximum(weight_scales(weight), wide)


def quantized_nodes(model: ModelProto, convs: Mapping[str, ConvPlan]) -> set[str]:
    """Return the names of the nodes that run in integers: ``convs`` and the gates between."""
    return {*convs, *_gates(model, convs)}


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


def added_tensors(model: ModelProto, convs: Collection[str] | None = None) -> tuple[str, ...]:
    """Return what convolutions make and an addition reads, in the graph's order.

    Args:
        model: the graph.
        convs: only these convolutions.
    """
    read = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    return tuple(
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Conv" and node.output[0] in read
        if convs is None or node.name in convs
    )


def _tensors(model: ModelProto, quantized: Collection[str]) -> dict[str, bool]:
    """Return the tensors quantised nodes read or make, and whether they read them.

    Without stored ones and the graph's outputs.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, bool] = {}
    for node in model.graph.node:
        if node.name not in quantized:
            continue
        inputs = node.input if node.op_type == "Mul" else node.input[:1]
        found |= {name: True for name in inputs if name not in stored}
        found |= {name: name in found and found[name] for name in node.output}
    for output in model.graph.output:
        found.pop(output.name, None)
    return found
