"""Weights and biases chosen anew, layer after layer, for what each layer really gets to read.

The quantised graph runs on calibration images, and every quantised convolution is
improved before its output goes on, so that each one also answers for what the ones
before it still get wrong.

``biases``    the mean error of each output channel is taken out in its bias (arXiv
              1906.04721, section 4.2)
``rounding``  each weight of a 1x1 convolution is rounded up or down so that the errors of
              a row cancel on the inputs that occur: column by column, what one column
              got wrong is taken in by the columns still to come (the closed form of
              AdaRound's layer-wise problem, arXiv 2004.10568; arXiv 2210.17323)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from van_deploy.precision.initial import is_pointwise
from van_deploy.precision.plan import (
    INT8_LIMIT,
    ConvPlan,
    QuantizationPlan,
    parameters_of,
    simulate,
    weighted_nodes,
)
from van_deploy.precision.torch_graph import TorchGraph, convolved

__all__ = ["corrected_biases", "corrected_plan", "rounded_by_error"]

DAMPING = 0.01
"""Of the mean variance of the inputs, added to each one's own (arXiv 2210.17323, section 3.3)."""

_COLUMNS = 64  # whose errors are handed on together

Written = Callable[[QuantizationPlan], ModelProto]


@torch.no_grad()
def corrected_plan(
    plan: QuantizationPlan,
    images: Tensor,
    *,
    biases: bool = True,
    rounding: bool = False,
    written: Written = simulate,
) -> QuantizationPlan:
    """Return ``plan`` with better biases and weights for the same scales.

    Args:
        plan: to correct; it is not changed.
        images: ``(N, C, S, S)`` float32, all at once in memory.
        biases: see the module's table.
        rounding: likewise.
        written: the graph whose rounding counts: of a plan, with QuantizeLinear and
            DequantizeLinear in it.
    """
    wanted = _mean_outputs(plan.model, plan.convs, images) if biases else {}
    nodes = weighted_nodes(plan.model)
    convs: dict[str, ConvPlan] = {}

    def improved(node: NodeProto, x: Tensor) -> Tensor | None:
        conv = plan.convs.get(node.name)
        if conv is None:
            return None
        if rounding and is_pointwise(node):
            weight, _ = parameters_of(plan.model, nodes[node.name])
            integers = rounded_by_error(weight[:, :, 0, 0], conv.weight_scale, _spread(x, biases))
            conv = replace(conv, weight=integers.reshape(conv.weight.shape))
        bias = None if conv.bias is None else torch.from_numpy(conv.bias)
        found = convolved(node, x, torch.from_numpy(conv.dequantized_weight), bias)
        if bias is not None and biases:
            missing = (wanted[node.name] - _mean(found)).float()
            found += missing.reshape(1, -1, *(1,) * (found.ndim - 2))
            conv = replace(conv, bias=(bias + missing).numpy())
        convs[node.name] = conv
        return found

    TorchGraph(written(plan)).run(images, improved)
    return replace(plan, convs=convs)


def corrected_biases(
    plan: QuantizationPlan, images: Tensor, written: Written = simulate
) -> QuantizationPlan:
    """Return ``plan`` with the mean error of each quantised node's output taken out in its bias.

    See :func:`corrected_plan`, of which this is one half.
    """
    return corrected_plan(plan, images, written=written)


def _mean_outputs(
    model: ModelProto, names: Collection[str], images: Tensor
) -> Mapping[str, Tensor]:
    """Return what each node gives without any rounding, on average: ``(O,)`` float64."""
    graph = TorchGraph(model)
    means: dict[str, Tensor] = {}

    def observe(node: NodeProto, x: Tensor) -> Tensor | None:
        if node.name not in names:
            return None
        found = convolved(node, x, *(graph.tensors[name] for name in node.input[1:]))
        means[node.name] = _mean(found)
        return found

    graph.run(images, observe)
    return means


def _mean(values: Tensor) -> Tensor:
    return values.double().mean(dim=[axis for axis in range(values.ndim) if axis != 1])


def _spread(x: Tensor, centred: bool) -> npt.NDArray[np.float64]:
    """Return the covariance ``(C, C)`` of the channels of ``x (N, C, H, W)``.

    Without a bias to take the mean in, the second moment.
    """
    rows = x.transpose(0, 1).flatten(1)
    if centred:
        rows = rows - rows.mean(dim=1, keepdim=True)
    return np.asarray((rows @ rows.T).double().numpy() / rows.shape[1])


def rounded_by_error(
    weight: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    spread: npt.NDArray[np.float64],
) -> npt.NDArray[np.int8]:
    """Return ``weight (O, I)`` in integers of ``steps (O,)``, -127..127, rounded as a whole.

    Args:
        weight: as the FP32 graph has it.
        steps: of each output channel.
        spread: ``(I, I)`` covariance of the inputs.
    """
    variance = spread.diagonal()
    if not variance.any():  # nothing ever arrives here: any rounding is as good
        spread, variance = np.eye(len(spread)), np.ones(len(spread))
    order = np.argsort(-variance, kind="stable")  # what matters most is rounded first
    damped = spread[np.ix_(order, order)] + DAMPING * variance.mean() * np.eye(len(order))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight.astype(np.float64)[:, order]
    step = steps.astype(np.float64)
    integers = np.empty(left.shape)
    for start in range(0, len(order), _COLUMNS):
        stop = min(start + _COLUMNS, len(order))
        errors = np.empty((len(left), stop - start))
        for column in range(start, stop):
            rounded = np.clip(np.rint(left[:, column] / step), -INT8_LIMIT, INT8_LIMIT)
            integers[:, column] = rounded
            error = (left[:, column] - rounded * step) / upper[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : stop] -= np.outer(error, upper[column, column + 1 : stop])
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    result = np.empty(integers.shape, np.int8)
    result[:, order] = integers.astype(np.int8)
    return result
