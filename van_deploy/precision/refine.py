"""A plan's numbers improved against the network's own answer on calibration images.

A tensor's own rounding error says little about what it does to the logits. Here
the FP32 graph is the teacher: what is changed is judged by how far the quantised
logits are from its own. No labels are used.

===================  =========================================================
``bias_correction``  the mean error that rounding brings to each convolution's
                     output is taken out in its bias (arXiv 1906.04721, 4.2)
``scales``           the steps of activations, by gradient descent
``biases``           the biases, likewise
``rounding``         which way each weight is rounded, likewise (in the spirit
                     of AdaRound, arXiv 2004.10568, but jointly and against the
                     logits instead of layer by layer)
===================  =========================================================

A part of the images is held out, and a change is kept only if the logits of the
held-out part come nearer as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto
from torch import Tensor

from van_deploy.errors import ImageError, UsageError
from van_deploy.metrics import sqnr_db
from van_deploy.precision.plan import QuantizationPlan
from van_deploy.precision.rounded import RoundedNetwork
from van_deploy.precision.torch_graph import convolved

__all__ = ["RefineReport", "RefineSettings", "RefineStep", "corrected_biases", "refine_plan"]

CORRECTION_IMAGES = 64
CORRECTION_PIXELS = 2**20
"""The biases are corrected on at most so many images and pixels, all in memory at once."""

STEP_PIXELS = 2**18
"""At most so many pixels a step: 5 images of 224 x 224. Keeps the time a step in bounds."""

Images = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps there are."""


@dataclass(frozen=True)
class RefineSettings:
    """What to refine, and how long.

    Attributes:
        bias_correction: see the module's table.
        scales: likewise.
        biases: likewise.
        rounding: likewise.
        steps: of gradient descent, each on one batch.
        batch: images a step; fewer where that would be more than :data:`STEP_PIXELS`.
        scale_rate: Adam's rate for the logarithms of steps.
        bias_rate: Adam's rate for biases, in each output channel's standard deviation.
        rounding_rate: Adam's rate for weights, in integer steps.
        held_out: share (0..1) of the images that only judge.
        seed: of the shuffling and of the choice of the held-out part.
    """

    bias_correction: bool = True
    scales: bool = True
    biases: bool = True
    rounding: bool = True
    steps: int = 64
    batch: int = 32
    scale_rate: float = 0.005
    bias_rate: float = 0.001
    rounding_rate: float = 0.005
    held_out: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if self.steps < 1 or self.batch < 1 or not 0.0 < self.held_out < 1.0:
            raise UsageError(
                f"Refining with {self.steps} steps of {self.batch} images and a held-out share "
                f"of {self.held_out} makes no sense.",
                "Give at least one step and one image, and a share between 0 and 1.",
            )


@dataclass(frozen=True)
class RefineStep:
    """One change that was tried.

    Attributes:
        name: ``bias_correction`` or ``learning``.
        before_db: SQNR of the logits of the held-out images before it.
        after_db: and after it.
        kept: whether it was kept.
    """

    name: str
    before_db: float
    after_db: float
    kept: bool


@dataclass(frozen=True)
class RefineReport:
    """A refined plan and what each change brought.

    Attributes:
        plan: never further from the FP32 logits, on the held-out images, than the plan given.
        changes: what was tried, in order.
        images_learnt: how many images were learnt from.
        images_held_out: how many judged.
        settings: what was asked.
    """

    plan: QuantizationPlan
    changes: tuple[RefineStep, ...]
    images_learnt: int
    images_held_out: int
    settings: RefineSettings

    @property
    def gain_db(self) -> float:
        """SQNR gained on the held-out images by what was kept."""
        return sum(change.after_db - change.before_db for change in self.changes if change.kept)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "settings": asdict(self.settings),
            "changes": [asdict(change) for change in self.changes],
            "images_learnt": self.images_learnt,
            "images_held_out": self.images_held_out,
        }


def refine_plan(
    plan: QuantizationPlan,
    batches: Iterable[Images],
    settings: RefineSettings | None = None,
    progress: Progress | None = None,
) -> RefineReport:
    """Return ``plan`` with better numbers, for the same graph.

    The same plan, images, settings and number of threads give the same result.

    Args:
        plan: to start from; it is not changed.
        batches: normalised calibration images ``(N, C, S, S)`` float32; all of
            them are held in memory.
        settings: what to refine (default: everything).
        progress: told of each step of gradient descent.

    Raises:
        ImageError: fewer than two images.
        ConversionError: the graph is not one of this project's.
    """
    settings = settings or RefineSettings()
    learnt, held_out = _split(batches, settings)
    with torch.no_grad():
        teacher = RoundedNetwork(plan)
        answers, judged = _logits(teacher.reference, learnt), _logits(teacher.reference, held_out)

    def quality(candidate: QuantizationPlan) -> float:
        return _sqnr_db(judged, _logits(RoundedNetwork(candidate), held_out))

    changes: list[RefineStep] = []
    best, best_db = plan, quality(plan)
    for name, change in _changes(settings, learnt, answers, progress):
        candidate = change(best)
        found = quality(candidate)
        kept = found > best_db
        changes.append(RefineStep(name, round(best_db, 2), round(found, 2), kept))
        if kept:
            best, best_db = candidate, found
    facts = {**best.facts, "refined": [change.name for change in changes if change.kept]}
    best = replace(best, facts=facts)
    return RefineReport(best, tuple(changes), len(learnt), len(held_out), settings)


_Change = Callable[[QuantizationPlan], QuantizationPlan]


def _changes(
    settings: RefineSettings, images: Tensor, answers: Tensor, progress: Progress | None
) -> Iterator[tuple[str, _Change]]:
    """Yield what to try, in order."""
    if settings.bias_correction:
        few = images[: _fitting(images, CORRECTION_IMAGES, CORRECTION_PIXELS)]
        yield "bias_correction", lambda plan: corrected_biases(plan, few)
    if settings.scales or settings.biases or settings.rounding:
        yield "learning", lambda plan: _learnt(plan, images, answers, settings, progress)


def _split(batches: Iterable[Images], settings: RefineSettings) -> tuple[Tensor, Tensor]:
    """Return the images to learn from and those that judge, shuffled with the seed.

    Raises:
        ImageError: fewer than two images.
    """
    parts = list(batches)
    count = sum(len(part) for part in parts)
    if count < 2:
        raise ImageError(
            f"Refining needs at least two calibration images, and there are {count}.",
            "Pass more images with --images DIR, or switch refinement off.",
        )
    images = torch.from_numpy(np.concatenate(parts))
    images = images[torch.randperm(count, generator=_generator(settings))]
    judging = min(max(round(count * settings.held_out), 1), count - 1)
    return images[judging:], images[:judging]


def _fitting(images: Tensor, count: int, pixels: int) -> int:
    """Return how many of ``images (N, C, H, W)`` stay within both limits, one at least."""
    return max(min(count, len(images), pixels // images[0, 0].numel()), 1)


def _generator(settings: RefineSettings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


@torch.no_grad()
def _logits(network: Callable[[Tensor], Tensor], images: Tensor, batch: int = 32) -> Tensor:
    return torch.cat([network(part) for part in images.split(batch)])


def _sqnr_db(reference: Tensor, actual: Tensor) -> float:
    return sqnr_db(reference.numpy(), actual.numpy())


# --- bias correction -----------------------------------------------------------------------


@torch.no_grad()
def corrected_biases(plan: QuantizationPlan, images: Tensor) -> QuantizationPlan:
    """Return ``plan`` with the mean error of each quantised node's output taken out in its bias.

    The FP32 and the quantised network run side by side, so that each bias also
    answers for what the corrected nodes before it still get wrong.

    Args:
        plan: to correct.
        images: ``(N, C, S, S)`` float32, all at once in memory.
    """
    network = RoundedNetwork(plan)
    graph = network.graph
    biases: dict[str, npt.NDArray[np.float32]] = {}

    def side_by_side(node: NodeProto, x: Tensor) -> Tensor | None:
        conv = network.convs.get(node.name)
        if conv is None:
            return None
        exact, rounded = x.chunk(2)
        expected = convolved(node, exact, *(graph.tensors[name] for name in node.input[1:]))
        found = conv.forward(node, rounded)
        if conv.plan.bias is not None:
            axes = [axis for axis in range(found.ndim) if axis != 1]
            missing = (expected - found).double().mean(dim=axes).float()
            biases[node.name] = conv.plan.bias + missing.numpy()
            found += missing.reshape(1, -1, *(1,) * (found.ndim - 2))
        return torch.cat([expected, found])

    graph.run(torch.cat([images, images]), side_by_side)
    convs = {
        name: replace(conv, bias=biases.get(name, conv.bias)) for name, conv in plan.convs.items()
    }
    return replace(plan, convs=convs)


# --- learning ------------------------------------------------------------------------------


def _learnt(
    plan: QuantizationPlan,
    images: Tensor,
    answers: Tensor,
    settings: RefineSettings,
    progress: Progress | None,
) -> QuantizationPlan:
    """Return ``plan`` after gradient descent on the squared error of the logits."""
    network = RoundedNetwork(plan)
    batch = _fitting(images, settings.batch, STEP_PIXELS)
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
    generator = _generator(settings)
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
        (settings.rounding, turns, settings.rounding_rate),
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
