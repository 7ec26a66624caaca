"""A plan as a PyTorch function whose numbers can be learnt, and back to a plan.

Rounding has no useful gradient, so it is passed over in the backward pass (the
straight-through estimator, arXiv 1308.3432); the gradient of a step is that of
LSQ (arXiv 1902.08153).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import NodeProto
from torch import Tensor, nn

from van_deploy.precision.plan import (
    INT8_LIMIT,
    ConvPlan,
    QuantizationPlan,
    parameters_of,
    storable_scales,
    weighted_nodes,
)
from van_deploy.precision.torch_graph import TorchGraph, convolved

__all__ = ["RoundedConv", "RoundedNetwork"]

MOST_STEPS_MOVED = 1.0
"""How far learnt rounding may take a weight from where it was, in integer steps."""


class RoundedNetwork(nn.Module):
    """The quantised network of a plan, in float32, with gradients.

    Args:
        plan: the plan to start from. Untouched, the network computes what
            :func:`van_deploy.precision.plan.simulate` does.

    Attributes:
        convs: the quantised nodes; their parameters are offsets from the plan, all zero.
        log_scales: natural logarithms of each activation's change of step. Nodes
            that read one tensor with one step share it.
    """

    def __init__(self, plan: QuantizationPlan) -> None:
        super().__init__()
        self.plan = plan
        self.graph = TorchGraph(plan.model)
        nodes = weighted_nodes(plan.model)
        self.convs: dict[str, RoundedConv] = {}
        steps: dict[tuple[str, float], nn.Parameter] = {}
        for name, conv in plan.convs.items():
            key = (conv.activation, conv.activation_scale)
            step = steps.setdefault(key, nn.Parameter(torch.zeros(())))
            weight, _ = parameters_of(plan.model, nodes[name])
            self.convs[name] = RoundedConv(conv, weight, step)
        self.log_scales = list(steps.values())

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, S, S)`` to logits ``(N, K)``."""
        return self.graph.run(images, self._rounded)[0]

    def reference(self, images: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` without any rounding."""
        return self.graph.run(images)[0]

    def to_plan(self) -> QuantizationPlan:
        """Return the plan with what was learnt, as numbers a file can hold."""
        convs = {name: conv.to_plan() for name, conv in self.convs.items()}
        return replace(self.plan, convs=convs)

    def _rounded(self, node: NodeProto, x: Tensor) -> Tensor | None:
        conv = self.convs.get(node.name)
        return None if conv is None else conv.forward(node, x)


class RoundedConv:
    """One quantised node: its numbers from the plan, and what is learnt on top of them.

    Args:
        plan: the node's numbers.
        weight: its weight in the FP32 graph.
        log_scale: the change of its activation's step, shared with other readers.

    The weights' own steps stay as they are: a change of one hundredth moves the
    largest weights by more than a whole integer.

    Attributes:
        bias: ``(O,)`` what is added to the bias, in ``unit``; None where there is no bias.
        unit: ``(O,)`` of the bias, such as the usual size of the output.
        turn: what is added to each weight before rounding, in integer steps.
    """

    def __init__(
        self, plan: ConvPlan, weight: np.ndarray[Any, np.dtype[np.float32]], log_scale: nn.Parameter
    ) -> None:
        self.plan = plan
        self.log_scale = log_scale
        shape = (-1,) + (1,) * (plan.weight.ndim - 1)
        self.step = torch.from_numpy(plan.weight_scale).reshape(shape)
        limit = INT8_LIMIT + 0.49
        exact = (torch.from_numpy(weight) / self.step).clamp(-limit, limit)
        integers = torch.from_numpy(plan.weight.astype(np.float32))
        # A weight that was rounded the other way on purpose starts in the middle of its integer.
        self.start = torch.where(exact.round() == integers, exact, integers)
        self.turn = nn.Parameter(torch.zeros_like(self.start))
        self.bias = None if plan.bias is None else nn.Parameter(torch.zeros(len(plan.bias)))
        self.unit = torch.ones(len(plan.weight_scale))

    def forward(self, node: NodeProto, x: Tensor) -> Tensor:
        """Return the node's output for its unrounded input ``x``."""
        step = self.plan.activation_scale * self.log_scale.exp()
        rounded: Tensor = _RoundedInput.apply(x, step)
        return convolved(node, rounded, self.weight(), self.whole_bias())

    def weight(self) -> Tensor:
        """Return the weight as the integers give it."""
        return self.integers() * self.step

    def integers(self) -> Tensor:
        """Return the rounded weight, -127..127, with the straight-through gradient."""
        turn = self.turn.clamp(-MOST_STEPS_MOVED, MOST_STEPS_MOVED)
        moved = (self.start + turn).clamp(-INT8_LIMIT, INT8_LIMIT)
        return moved + (moved.round() - moved).detach()

    def whole_bias(self) -> Tensor | None:
        """Return the bias, or None where there is none."""
        if self.bias is None or self.plan.bias is None:
            return None
        return torch.from_numpy(self.plan.bias) + self.unit * self.bias

    @torch.no_grad()
    def to_plan(self) -> ConvPlan:
        """Return the node's new numbers."""
        step = float(self.plan.activation_scale * self.log_scale.exp())
        bias = self.whole_bias()
        return replace(
            self.plan,
            activation_scale=float(storable_scales(step)),
            weight=self.integers().round().numpy().astype(np.int8),
            bias=None if bias is None else bias.numpy().astype(np.float32),
        )


class _RoundedInput(torch.autograd.Function):
    """An activation through int8 and back, as QuantizeLinear and DequantizeLinear do it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        scaled = x / step
        integers = scaled.round().clamp(-INT8_LIMIT - 1, INT8_LIMIT)
        inside = (scaled > -INT8_LIMIT - 1) & (scaled < INT8_LIMIT)
        # of the step: the integer where clipped, else what rounding added
        ctx.save_for_backward(inside, torch.where(inside, integers - scaled, integers))
        return integers * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        inside, by_step = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * inside, (gradient * by_step).sum()
