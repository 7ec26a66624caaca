"""A VAN's ONNX graph run by PyTorch: any tensor can be watched, and gradients flow.

Only the operators this project exports are known. It exists because what raises
fidelity needs two things ONNX Runtime does not give: gradients, and float64 to
prove that a re-scaling is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from van_deploy.errors import ConversionError

__all__ = ["TorchGraph", "convolved"]

Attributes = Mapping[str, Any]
WeightedHook = Callable[[NodeProto, Tensor], "Tensor | None"]


class TorchGraph:
    """An ONNX graph as a PyTorch function.

    Args:
        model: an FP32 (or float64) graph with one input and one output.

    Attributes:
        tensors: the stored tensors by name; no gradients.
        nodes: the graph's nodes, in order.
        dtype: of the weights.

    Raises:
        ConversionError: the graph holds an operator that is not known here.
    """

    def __init__(self, model: ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.tensors = {
            stored.name: torch.from_numpy(np.array(numpy_helper.to_array(stored)))
            for stored in model.graph.initializer
        }
        floats = (t.dtype for t in self.tensors.values() if t.is_floating_point())
        self.dtype = next(floats, torch.float32)
        self.source = model.graph.input[0].name
        self.result = model.graph.output[0].name
        self._attributes = [_attributes(node) for node in self.nodes]
        self._last_use = _last_uses(self.nodes)
        for node in self.nodes:
            if node.op_type not in _OPERATORS and node.op_type not in _WEIGHTED:
                raise ConversionError(
                    f"The operator {node.op_type} of '{node.name}' is none that a VAN needs.",
                    "Export the network again with van-deploy, or switch refinement and "
                    "equalisation off.",
                )

    def run(
        self,
        images: Tensor,
        weighted: WeightedHook | None = None,
        watch: Collection[str] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits ``(N, K)`` of ``images (N, C, S, S)``, and the tensors in ``watch``.

        Args:
            images: of the dtype of the graph's weights.
            weighted: called with each Conv and Gemm and its input; what it returns is
                the node's output, None stands for the ordinary one.
            watch: names of tensors to return.
        """
        values: dict[str, Tensor] = {self.source: images}
        watched: dict[str, Tensor] = {}
        for position, (node, attributes) in enumerate(
            zip(self.nodes, self._attributes, strict=True)
        ):
            inputs = [self._value(values, name) for name in node.input]
            out: Tensor | None = None
            if node.op_type in _WEIGHTED:
                if weighted is not None:
                    out = weighted(node, inputs[0])
                if out is None:
                    out = convolved(node, *inputs)
            else:
                out = _OPERATORS[node.op_type](inputs, attributes)
            values[node.output[0]] = out
            for name in self._last_use.get(position, ()):
                if name in watch:
                    watched[name] = values[name]
                values.pop(name, None)
        for name in watch:
            if name in values:
                watched[name] = values[name]
        return values[self.result], watched

    def _value(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        return values[name] if name in values else self.tensors[name]


def convolved(node: NodeProto, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what a Conv or Gemm ``node`` makes of ``x`` with this weight and bias."""
    attributes = _attributes(node)
    if node.op_type == "Gemm":
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0:
            raise ConversionError(f"The Gemm '{node.name}' is not of the form a VAN's head has.")
        weight = weight.T if attributes.get("transB", 0) else weight
        return x @ weight if bias is None else x @ weight + bias
    pads = attributes.get("pads", [0, 0, 0, 0])
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        raise ConversionError(f"The padding of '{node.name}' is not symmetric: {pads}.")
    return functional.conv2d(
        x,
        weight,
        bias,
        stride=attributes.get("strides", [1, 1]),
        padding=pads[: len(pads) // 2],
        dilation=attributes.get("dilations", [1, 1]),
        groups=attributes.get("group", 1),
    )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _last_uses(nodes: list[NodeProto]) -> dict[int, list[str]]:
    """Return which tensors are not needed any more after each node."""
    last: dict[str, int] = {}
    made = {name for node in nodes for name in node.output}
    for position, node in enumerate(nodes):
        last |= {name: position for name in node.input if name in made}
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        uses.setdefault(position, []).append(name)
    return uses


def _gelu(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    approximate = attributes.get("approximate", b"none").decode()
    return functional.gelu(inputs[0], approximate=approximate)


def _layer_norm(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    axis = attributes.get("axis", -1)
    shape = inputs[0].shape[axis:]
    bias = inputs[2] if len(inputs) > 2 else None
    epsilon = attributes.get("epsilon", 1e-5)
    return functional.layer_norm(inputs[0], shape, inputs[1], bias, epsilon)


def _mean(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    axes = inputs[1].tolist() if len(inputs) > 1 else attributes["axes"]
    return inputs[0].mean(dim=tuple(axes), keepdim=bool(attributes.get("keepdims", 1)))


def _quantize(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    """Return the integers, as floats: PyTorch has no arithmetic for uint8 that saturates."""
    x, (step, zero) = inputs[0], _along(inputs, attributes)
    limits = torch.iinfo(inputs[2].dtype)
    return (x / step).round().add(zero).clamp(limits.min, limits.max)


def _dequantize(inputs: list[Tensor], attributes: Attributes) -> Tensor:
    step, zero = _along(inputs, attributes)
    return (inputs[0].to(step.dtype) - zero) * step


def _along(inputs: list[Tensor], attributes: Attributes) -> tuple[Tensor, Tensor]:
    """Return step and zero-point, both floats, in the shape that meets the tensor's axis."""
    integers, step, zero = inputs
    shape = [1] * integers.ndim
    if step.ndim:
        shape[attributes.get("axis", 1)] = -1
    return step.reshape(shape), zero.to(step.dtype).reshape(shape)


_WEIGHTED = frozenset({"Conv", "Gemm"})
_OPERATORS: dict[str, Callable[[list[Tensor], Attributes], Tensor]] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "Sub": lambda inputs, _: inputs[0] - inputs[1],
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "DequantizeLinear": _dequantize,
    "Div": lambda inputs, _: inputs[0] / inputs[1],
    "Erf": lambda inputs, _: torch.erf(inputs[0]),
    "Gelu": _gelu,
    "Identity": lambda inputs, _: inputs[0],
    "LayerNormalization": _layer_norm,
    "QuantizeLinear": _quantize,
    "ReduceMean": _mean,
    "Transpose": lambda inputs, attributes: inputs[0].permute(*attributes["perm"]),
}
