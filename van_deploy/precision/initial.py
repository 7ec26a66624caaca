"""The first plan: which nodes a scope means, and each one's numbers from its tensor's range."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper

from van_deploy.errors import UsageError
from van_deploy.precision.plan import (
    INT8_LIMIT,
    ConvPlan,
    FloatArray,
    QuantizationPlan,
    parameters_of,
    weight_scales,
    weighted_nodes,
)
from van_deploy.precision.ranges import Ranges
from van_deploy.precision.scales import DEFAULT_PERCENTILE, Method, symmetric_scale

__all__ = ["SCOPES", "initial_plan", "is_pointwise", "nodes_in_scope", "rounded_weight"]

SCOPES = ("pointwise", "deep", "all")

_SHALLOW = re.compile(r"(patch_embed1|block1)\.")
"""The stem and the first stage: the most pixels, the fewest channels."""

Scope = str | Sequence[str]


def is_pointwise(node: NodeProto) -> bool:
    """Return whether ``node`` is a 1x1 convolution with one group."""
    if node.op_type != "Conv":
        return False
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return found.get("group", 1) == 1 and all(side == 1 for side in found.get("kernel_shape", [0]))


def nodes_in_scope(model: ModelProto, scope: Scope = "pointwise") -> tuple[str, ...]:
    """Return the names of the nodes that are to be quantised, in the graph's order.

    Args:
        model: an FP32 graph.
        scope: ``pointwise`` (the 1x1 convolutions), ``all`` (every convolution; the
            head stays as it is), ``deep`` (every convolution but those of the stem
            and of the first stage), or regular expressions searched for in the names
            of convolutions and the head.

    Raises:
        UsageError: an expression is wrong or matches nothing.
    """
    nodes = weighted_nodes(model)
    convs = [name for name, node in nodes.items() if node.op_type == "Conv"]
    if scope == "pointwise":
        return tuple(name for name, node in nodes.items() if is_pointwise(node))
    if scope == "all":
        return tuple(convs)
    if scope == "deep":
        return _deep(convs)
    expressions = [scope] if isinstance(scope, str) else list(scope)
    found = set().union(*(_matching(expression, list(nodes)) for expression in expressions))
    return tuple(name for name in nodes if name in found)


def _deep(convs: Sequence[str]) -> tuple[str, ...]:
    found = tuple(name for name in convs if not _SHALLOW.match(name))
    if not found:
        raise UsageError(
            "The scope 'deep' holds nothing: this network has no second stage.",
            "Ask for every convolution: --scope all.",
        )
    return found


def _matching(expression: str, names: Sequence[str]) -> set[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UsageError(
            f"The scope '{expression}' is neither {' nor '.join(SCOPES)} nor a regular "
            f"expression: {error}.",
            "Write for instance --scope 'block[34].*fc1'.",
        ) from error
    found = {name for name in names if pattern.search(name)}
    if not found:
        raise UsageError(
            f"The scope '{expression}' matches no convolution of this network.",
            f"Write {', '.join(SCOPES)}, or a part of names like '{names[1 % len(names)]}', which "
            "`van-deploy inspect` lists.",
        )
    return found


def initial_plan(
    model: ModelProto,
    ranges: Ranges,
    scope: Scope = "pointwise",
    method: Method = Method.MSE,
    *,
    percentile: float = DEFAULT_PERCENTILE,
    weight_steps: Callable[[FloatArray], FloatArray] = weight_scales,
) -> QuantizationPlan:
    """Return the plan with every weight rounded to nearest and every scale by ``method``.

    Args:
        model: the FP32 graph ``ranges`` were recorded on.
        ranges: of at least the inputs of the nodes in ``scope``, with histograms.
        scope: see :func:`nodes_in_scope`.
        method: how activation scales are read from the ranges.
        percentile: for :attr:`Method.PERCENTILE`, 0..1.
        weight_steps: gives the steps ``(O,)`` of a weight's output channels.

    Raises:
        UsageError: see :func:`nodes_in_scope`.
    """
    nodes = weighted_nodes(model)
    scales: dict[str, float] = {}
    convs: dict[str, ConvPlan] = {}
    for name in nodes_in_scope(model, scope):
        activation = nodes[name].input[0]
        if activation not in scales:
            record = ranges.tensors[activation]
            scales[activation] = symmetric_scale(record, method, percentile=percentile)
        convs[name] = _conv_plan(model, nodes[name], scales[activation], weight_steps)
    facts = {
        "method": method.value,
        "scope": scope if isinstance(scope, str) else list(scope),
        "calibration_images": ranges.images,
    }
    return QuantizationPlan(model, convs, facts)


def _conv_plan(
    model: ModelProto,
    node: NodeProto,
    scale: float,
    weight_steps: Callable[[FloatArray], FloatArray],
) -> ConvPlan:
    weight, bias = parameters_of(model, node)
    steps = weight_steps(weight)
    return ConvPlan(
        node=node.name,
        activation=node.input[0],
        activation_scale=scale,
        weight=rounded_weight(weight, steps),
        weight_scale=steps,
        bias=bias,
    )


def rounded_weight(
    weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    steps: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    """Return ``weight (O, ...)`` in integers of ``steps (O,)``, rounded to nearest."""
    shape = (-1,) + (1,) * (weight.ndim - 1)
    scaled = np.rint(weight / steps.reshape(shape))
    return np.clip(scaled, -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
