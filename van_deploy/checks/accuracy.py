"""Accuracy on labelled images: PyTorch's, each artefact's, and what was lost between them.

Both answer the same images, so they are compared as pairs. A few dozen bytes an
image are kept, whatever its size.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.checks.contestants import TOP, Answers
from van_deploy.checks.statistics import (
    expected_calibration_error,
    mcnemar_exact,
    tango_interval,
    wilson_interval,
)

__all__ = ["SIGNIFICANCE", "Accuracy", "ClassChange", "PairedDrift", "accuracy_of", "paired_drift"]

SIGNIFICANCE = 0.05
MOST_CONFUSIONS, MOST_CLASSES = 20, 20

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Accuracy:
    """How often one network is right.

    Attributes:
        images: answered.
        top1: share with the right first class, 0 to 1.
        top1_interval: its 95 % interval (Wilson).
        top5: share with the right class among the first five.
        top5_interval: likewise.
        ece: expected calibration error, 0 to 1.
    """

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    ece: float


@dataclass(frozen=True)
class ClassChange:
    """One class whose accuracy changed.

    Attributes:
        label: the class.
        images: of it.
        before: how many PyTorch gets right.
        after: how many the artefact gets right.
    """

    label: int
    images: int
    before: int
    after: int


@dataclass(frozen=True)
class PairedDrift:
    """What an artefact lost against PyTorch on the same images.

    Attributes:
        images: both answered.
        lost: images only PyTorch gets right.
        won: images only the artefact gets right.
        change: of top-1, as a share: ``(won - lost) / images``.
        interval: its 95 % interval.
        p_value: McNemar's exact test.
        top5_change: of top-5, as a share.
        agreement: share with the same first class.
        confusions: ``(PyTorch's class, the artefact's, count)`` of changed predictions.
        classes: the classes whose accuracy changed most.
        top1_drop_allowed: in points (percent).
        passed: whether the drop is within that, or not beyond chance.
        note: what the number of images does not settle.
    """

    images: int
    lost: int
    won: int
    change: float
    interval: tuple[float, float]
    p_value: float
    top5_change: float
    agreement: float
    confusions: tuple[tuple[int, int, int], ...]
    classes: tuple[ClassChange, ...]
    top1_drop_allowed: float
    passed: bool
    note: str

    @property
    def top1_drop(self) -> float:
        """Points of top-1 lost; negative where the artefact is better."""
        return -100 * self.change

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {**asdict(self), "top1_drop": self.top1_drop}


def accuracy_of(answers: Answers, labels: Labels) -> Accuracy:
    """Return how often ``answers`` are ``labels``, ``(N,)``."""
    right, among = _right(answers, labels), _among_first(answers, labels)
    total = len(labels)
    first, five = int(right.sum()), int(among.sum())
    return Accuracy(
        images=total,
        top1=first / max(total, 1),
        top1_interval=wilson_interval(first, total),
        top5=five / max(total, 1),
        top5_interval=wilson_interval(five, total),
        ece=expected_calibration_error(answers.confidence, right),
    )


def paired_drift(before: Answers, after: Answers, labels: Labels, top1_drop: float) -> PairedDrift:
    """Return what was lost from ``before`` (PyTorch) to ``after``.

    The gate fails where more than ``top1_drop`` points are lost *and* McNemar's
    test says that chance does not explain it (p below 0.05).
    """
    right, still = _right(before, labels), _right(after, labels)
    lost, won = int((right & ~still).sum()), int((~right & still).sum())
    total = len(labels)
    change, p_value = (won - lost) / max(total, 1), mcnemar_exact(lost, won)
    interval = tango_interval(won, lost, total)
    passed = not (-100 * change > top1_drop and p_value < SIGNIFICANCE)
    top5 = _among_first(after, labels).mean() - _among_first(before, labels).mean()
    return PairedDrift(
        images=total,
        lost=lost,
        won=won,
        change=change,
        interval=interval,
        p_value=p_value,
        top5_change=float(top5) if total else 0.0,
        agreement=float((before.classes[:, 0] == after.classes[:, 0]).mean()) if total else 1.0,
        confusions=_confusions(before, after),
        classes=_class_changes(right, still, labels),
        top1_drop_allowed=top1_drop,
        passed=passed,
        note=_unsettled(-100 * interval[0], top1_drop, total) if passed else "",
    )


def _unsettled(most: float, allowed: float, images: int) -> str:
    if most <= allowed:
        return ""
    return (
        f"not proved: with {images} images up to {most:.2f} points may be lost, "
        f"more than the {allowed:g} allowed"
    )


def _right(answers: Answers, labels: Labels) -> npt.NDArray[np.bool_]:
    right: npt.NDArray[np.bool_] = answers.classes[:, 0] == labels
    return right


def _among_first(answers: Answers, labels: Labels) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (answers.classes[:, :TOP] == labels[:, None]).any(axis=1)
    return found


def _confusions(before: Answers, after: Answers) -> tuple[tuple[int, int, int], ...]:
    old, new = before.classes[:, 0], after.classes[:, 0]
    changed = np.flatnonzero(old != new)
    counts = Counter((int(old[row]), int(new[row])) for row in changed)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple((source, target, count) for (source, target), count in ordered[:MOST_CONFUSIONS])


def _class_changes(
    right: npt.NDArray[np.bool_], still: npt.NDArray[np.bool_], labels: Labels
) -> tuple[ClassChange, ...]:
    size = int(labels.max()) + 1 if len(labels) else 0
    counts = np.bincount(labels, minlength=size)
    before, after = (np.bincount(labels[hit], minlength=size) for hit in (right, still))
    changed = np.flatnonzero(before != after)
    order = sorted(changed, key=lambda label: (-abs(int(after[label] - before[label])), label))
    return tuple(
        ClassChange(int(label), int(counts[label]), int(before[label]), int(after[label]))
        for label in order[:MOST_CLASSES]
    )
