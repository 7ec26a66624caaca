"""A plan's numbers learnt by gradient descent on the error of the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from onnx import NodeProto
from torch import Tensor

from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.refine_settings import RefineSettings
from van_deploy.precision.rounded import RoundedNetwork

__all__ = ["learnt_plan"]

STEP_PIXELS = 2**18
"""At most so many pixels a step: 5 images of 224 x 224. Keeps the time a step in bounds."""

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps there are."""


def learnt_plan(
    plan: QuantizationPlan,
    images: Tensor,
    answers: Tensor,
    settings: RefineSettings,
    progress: Progress | None,
) -> QuantizationPlan:
    """Return ``plan`` after gradient descent on the squared error of the logits.

    Args:
        plan: to start from; for TensorRT's rounding.
        images: ``(N, C, S, S)`` float32, all in memory.
        answers: ``(N, K)`` the FP32 logits.
        settings: what is learnt, how fast, and for how long.
        progress: told of each step.
    """
    network = RoundedNetwork(plan)
    pixels = images[0, 0].numel()
    batch = max(min(settings.batch, len(images), STEP_PIXELS // pixels), 1)
    _measure_units_(network, images[:batch])
    optimizer = torch.optim.Adam(_parameter_groups(network, settings))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    power = answers.square().mean()
    picks = _picks(len(images), batch, settings)
    for step in range(settings.steps):
        pick = next(picks)
        error = (network(images[pick]) - answers[pick]).square().mean() / power
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, settings.steps)
    return network.to_plan()


def _picks(count: int, batch: int, settings: RefineSettings) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, shuffled anew each time through."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % batch].split(batch)


def _parameter_groups(network: RoundedNetwork, settings: RefineSettings) -> list[dict[str, Any]]:
    convs = network.convs.values()
    biases = [conv.bias for conv in convs if conv.bias is not None]
    turns = [conv.turn for conv in convs]
    groups = (
        (settings.scales, network.log_scales, settings.scale_rate),
        (settings.biases, biases, settings.bias_rate),
        (settings.turns, turns, settings.turn_rate),
    )
    found = []
    for wanted, parameters, rate in groups:
        for parameter in parameters:
            parameter.requires_grad_(wanted)
        if wanted and parameters:
            found.append({"params": parameters, "lr": rate})
    return found


@torch.no_grad()
def _measure_units_(network: RoundedNetwork, images: Tensor) -> None:
    """Make the unit of each learnt bias the standard deviation of its output channel."""

    def measure(node: NodeProto, x: Tensor) -> Tensor | None:
        conv = network.convs.get(node.name)
        if conv is None:
            return None
        found = conv.forward(node, x)
        conv.unit = found.transpose(0, 1).flatten(1).std(dim=1).clamp(min=1e-6)
        return found

    network.graph.run(images, measure)
