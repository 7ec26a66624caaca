"""A plan's numbers improved against the network's own answer on calibration images.

A tensor's own rounding error says little about what it does to the logits. Here
the FP32 graph is the teacher: what is changed is judged by how far the quantised
logits are from its own. No labels are used.

===================  =========================================================
``bias_correction``  the mean error that rounding brings to each convolution's
                     output is taken out in its bias
``rounding``         which way each weight is rounded is chosen for its row as a
                     whole, on the inputs that occur
                     (:mod:`van_deploy.precision.correct` for both)
``scales``           the steps of activations, by gradient descent
``biases``           the biases, likewise
``turns``            which way each weight is rounded, likewise (in the spirit
                     of AdaRound, arXiv 2004.10568, but jointly and against the
                     logits instead of layer by layer)
===================  =========================================================

A part of the images is held out, and a change is kept only if the logits of the
held-out part come nearer as well. The last three only help where the first two left
much, and take a minute; they are off by default (`docs/precision.md` has the figures).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from van_deploy.errors import ImageError
from van_deploy.metrics import sqnr_db
from van_deploy.precision.correct import Written, corrected_plan
from van_deploy.precision.learning import Progress, learnt_plan
from van_deploy.precision.plan import QuantizationPlan, simulate
from van_deploy.precision.refine_settings import RefineSettings
from van_deploy.precision.session import logits_session

__all__ = ["RefineReport", "RefineStep", "refine_plan"]

CORRECTION_IMAGES = 128
CORRECTION_PIXELS = 2**20
"""Layers are corrected on at most so many images and pixels, all in memory at once."""

Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RefineStep:
    """One change that was tried.

    Attributes:
        name: ``bias_correction``, ``rounding`` or ``learning``.
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
    *,
    written: Written = simulate,
    threads: int | None = None,
) -> RefineReport:
    """Return ``plan`` with better numbers, for the same graph.

    The same plan, images, settings and number of threads give the same result.

    Args:
        plan: to start from; it is not changed.
        batches: normalised calibration images ``(N, C, S, S)`` float32; all of
            them are held in memory.
        settings: what to refine (default: what pays).
        progress: told of each step of gradient descent.
        written: the graph whose rounding counts: of a plan, in the network's own
            units. What is learnt by gradient descent knows TensorRT's only.
        threads: of ONNX Runtime.

    Raises:
        ImageError: fewer than two images.
        ConversionError: the graph is not one of this project's.
    """
    settings = settings or RefineSettings()
    learnt, held_out = _split(batches, settings)
    judged = _logits(plan.model, held_out, threads)

    def quality(candidate: QuantizationPlan) -> float:
        return sqnr_db(judged, _logits(written(candidate), held_out, threads))

    changes: list[RefineStep] = []
    best, best_db = plan, quality(plan)
    for name, change in _changes(settings, learnt, written, progress):
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
    settings: RefineSettings, images: Images, written: Written, progress: Progress | None
) -> Iterator[tuple[str, _Change]]:
    """Yield what to try, in order."""
    few = torch.from_numpy(images[: _fitting(images)])
    biases = settings.bias_correction
    if biases:
        yield "bias_correction", lambda plan: corrected_plan(plan, few, written=written)
    if settings.rounding:
        yield (
            "rounding",
            lambda plan: corrected_plan(plan, few, biases=biases, rounding=True, written=written),
        )
    if settings.learns:
        answers = functools.partial(_logits, images=images, threads=None)
        yield (
            "learning",
            lambda plan: learnt_plan(
                plan,
                torch.from_numpy(images),
                torch.from_numpy(answers(plan.model)),
                settings,
                progress,
            ),
        )


def _split(batches: Iterable[Images], settings: RefineSettings) -> tuple[Images, Images]:
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
    images = np.concatenate(parts)
    images = images[np.random.default_rng(settings.seed).permutation(count)]
    judging = min(max(round(count * settings.held_out), 1), count - 1)
    return images[judging:], images[:judging]


def _fitting(images: Images) -> int:
    """Return how many of ``images (N, C, H, W)`` stay within both limits, one at least."""
    return max(min(CORRECTION_IMAGES, len(images), CORRECTION_PIXELS // images[0, 0].size), 1)


def _logits(model: ModelProto, images: Images, threads: int | None, batch: int = 32) -> Images:
    run = logits_session(model, fuse=False, threads=threads)
    return np.concatenate([run(images[i : i + batch]) for i in range(0, len(images), batch)])
