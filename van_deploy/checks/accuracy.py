"""Accuracy on labelled images: PyTorch's, each artifact's, and what was lost between them.

A metric that has no meaning is absent: top-5 of five classes or fewer, calibration of many
labels. What is kept of an evaluation set are a few dozen bytes an image, whatever the number of
classes (:class:`Answers`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from van_deploy import metrics
from van_deploy.checks import gates
from van_deploy.checks.gates import Finding, Outcome
from van_deploy.checks.rules import Loss, judge_loss, judge_numbers, paired_loss
from van_deploy.config import GateProfile
from van_deploy.intervals import bootstrap_interval, wilson_interval
from van_deploy.metrics import Flip, Task

ECE_BINS = 15
"""Equal-width bins of confidence, as in Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017."""

TOP = 5
MOST_SHOWN = 20  # confusions, and classes that changed

Logits = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[Any]
"""``(N,)`` int64 classes, or ``(N, K)`` of 0 and 1 for many labels."""


class Answers(NamedTuple):
    """What one network says of some images.

    Attributes:
        classes: ``(n, k)`` int32. Of one of K classes: the first ``min(K, 5)``, most probable
            first. Of one logit or many labels: 0 or 1 for each label. -1 for a NaN.
        confidence: ``(n,)`` float32, probability of the top-1 class, or of the decision on one
            logit; 0 for a NaN and for many labels.
        margins: how far each decision is from another one, in logits
            (:func:`~van_deploy.metrics.decision_margins`); ``(n, 0)`` but of the reference.
        power: ``(n,)`` float64, mean square of the logits.
        noise: ``(n,)`` float64, mean square of the difference to the reference's.
    """

    classes: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    margins: npt.NDArray[np.float64]
    power: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, logits: Logits, task: Task = Task.SINGLE_LABEL, reference: Logits | None = None
    ) -> Answers:
        """Return the answers in ``logits (n, K)``; without a ``reference`` they are its own."""
        values = np.asarray(logits, np.float64)
        exact = values if reference is None else np.asarray(reference, np.float64)
        finite = np.isfinite(values).all(axis=1).reshape(-1, 1)
        safe = np.where(finite, values, 0.0)
        single = task is Task.SINGLE_LABEL
        classes = metrics.top_classes(safe, TOP) if single else metrics.decisions(safe, task)
        shares = metrics.probabilities(safe, task)
        confidence = shares.max(axis=1) if single else np.maximum(shares, 1 - shares)[:, 0]
        known = finite[:, 0] if task is not Task.MULTI_LABEL else np.zeros(len(values), bool)
        margins = metrics.decision_margins(exact, task)
        return cls(
            np.where(finite, classes, -1).astype(np.int32),
            np.where(known, confidence, 0.0).astype(np.float32),
            margins if reference is None else margins[:, :0],
            np.square(values).mean(axis=1),
            np.square(values - exact).mean(axis=1),
        )

    @classmethod
    def joined(cls, parts: Sequence[Answers], order: npt.NDArray[np.int64]) -> Answers:
        """Return the answers of several batches as one, in another order."""
        return cls(*(np.concatenate(column)[order] for column in zip(*parts, strict=True)))

    def sqnr_db(self, reference: Answers) -> float:
        """Return the SQNR of the logits against the reference's."""
        return metrics.decibels(float(reference.power.mean()), float(self.noise.mean()))

    def flips(self, reference: Answers, explained: float) -> list[Flip]:
        """Return the label flips, the widest margin first.

        Args:
            reference: PyTorch's answers to the same images.
            explained: margins up to this, in RMS logits, are noise.
        """
        scale = math.sqrt(float(reference.power.mean())) or 1.0
        return metrics.flips_between(
            reference.classes, self.classes, reference.margins / scale, explained
        )


@dataclass(frozen=True)
class Accuracy:
    """How often one network is right.

    Attributes:
        images: answered.
        metric: ``top-1``; for many labels ``F1 (micro)``.
        top1: share with the right top-1 class or decision, or the F1, 0 to 1.
        top1_interval: its 95 % interval: Wilson's, or of resampled images.
        top5: share with the right class among the first five, or None.
        top5_interval: likewise.
        ece: expected calibration error, 0 to 1, or None.
    """

    images: int
    metric: str
    top1: float
    top1_interval: tuple[float, float]
    top5: float | None
    top5_interval: tuple[float, float] | None
    ece: float | None


@dataclass(frozen=True)
class ClassChange:
    """One class whose accuracy changed.

    Attributes:
        label: the class.
        images: of it.
        before: how many PyTorch gets right.
        after: how many the artifact gets right.
    """

    label: int
    images: int
    before: int
    after: int


@dataclass(frozen=True)
class ArtefactLoss:
    """What an artifact lost against PyTorch on the same images, and what the gate says.

    Attributes:
        numeric: the numeric class it was judged in.
        loss: with its interval, in points.
        findings: of the gate.
        sqnr_db: of its logits on these images.
        flips: how many labels flipped.
        widest_flip: PyTorch's margin at the widest of them, in RMS logits; 0 for none.
        top5_change: of top-5, in points, or None.
        confusions: ``(PyTorch's class, the artifact's, count)`` of flipped labels.
        classes: the classes whose accuracy changed most.
    """

    JSON_PROPERTIES: ClassVar = ("outcome",)

    numeric: str
    loss: Loss
    findings: tuple[Finding, ...]
    sqnr_db: float
    flips: int
    widest_flip: float
    top5_change: float | None
    confusions: tuple[tuple[int, int, int], ...]
    classes: tuple[ClassChange, ...]

    @property
    def outcome(self) -> Outcome:
        """What all findings say together."""
        return gates.outcome_of(self.findings)


def accuracy_of(answers: Answers, labels: Labels, classes: int, task: Task) -> Accuracy:
    """Return how often ``answers`` are ``labels``, of a network with so many ``classes``."""
    total = len(labels)
    if task is Task.MULTI_LABEL:
        counts = _label_counts(answers, labels)
        interval = bootstrap_interval(lambda rows: _f1(counts[rows]), total)
        return Accuracy(total, "F1 (micro)", _f1(counts), interval, None, None, None)
    right, five, five_interval = answers.classes[:, 0] == labels, None, None
    first = int(right.sum())
    if task is Task.SINGLE_LABEL and classes > TOP:
        among = int((answers.classes == labels[:, None]).any(axis=1).sum())
        five, five_interval = among / total, wilson_interval(among, total)
    ece = expected_calibration_error(answers.confidence, right)
    interval = wilson_interval(first, total)
    return Accuracy(total, "top-1", first / total, interval, five, five_interval, ece)


def loss_of(before: Answers, after: Answers, labels: Labels, task: Task) -> Loss:
    """Return what was lost from ``before`` (PyTorch) to ``after``, in points."""
    total = len(labels)
    if task is not Task.MULTI_LABEL:
        right, still = (answers.classes[:, 0] == labels for answers in (before, after))
        return paired_loss(int((right & ~still).sum()), int((~right & still).sum()), total)
    one, other = (_label_counts(answers, labels) for answers in (before, after))

    def lost(rows: npt.NDArray[np.int64]) -> float:
        return 100 * (_f1(one[rows]) - _f1(other[rows]))

    return Loss(total, lost(np.arange(total)), bootstrap_interval(lost, total))


def judge_artefact(
    before: Answers,
    after: Answers,
    labels: Labels,
    classes: int,
    task: Task,
    numeric: str,
    noise_db: float,
    profile: GateProfile,
) -> ArtefactLoss:
    """Return what one artifact lost against PyTorch, and what the gate of its class says.

    Args:
        before: PyTorch's answers.
        after: the artifact's, to the same images.
        labels: of the images.
        classes: logits of the network.
        task: how logits become labels.
        numeric: the artifact's numeric class.
        noise_db: SQNR of PyTorch's float32 against its float64.
        profile: what a recipe sets otherwise.
    """
    floor, allowed = (
        gates.sqnr_floor(numeric, noise_db, profile),
        gates.allowed_loss(numeric, profile),
    )
    loss, sqnr = loss_of(before, after, labels, task), after.sqnr_db(before)
    flips = after.flips(before, gates.flip_margin(floor.value, task))
    what = "F1" if task is Task.MULTI_LABEL else "top-1"
    findings = [judge_loss(loss, allowed, what)]
    if not gates.CLASSES[numeric].lossy:
        findings = judge_numbers(loss, allowed, sqnr, floor, flips, task, what)
    old, new = (accuracy_of(a, labels, classes, task).top5 for a in (before, after))
    return ArtefactLoss(
        numeric=numeric,
        loss=loss,
        findings=tuple(findings),
        sqnr_db=sqnr,
        flips=len(flips),
        widest_flip=flips[0].margin if flips else 0.0,
        top5_change=None if old is None or new is None else 100 * (new - old),
        confusions=_confusions(flips),
        classes=_class_changes(before, after, labels),
    )


def _label_counts(answers: Answers, labels: Labels) -> npt.NDArray[np.int64]:
    """Return each image's labels that are found, wanted, and both, ``(N, 3)``."""
    found, wanted = answers.classes == 1, labels.astype(bool)
    return np.stack([found.sum(1), wanted.sum(1), (found & wanted).sum(1)], axis=1)


def _f1(counts: npt.NDArray[np.int64]) -> float:
    """Return the micro F1 of images' counts: twice the hits over what is found and wanted."""
    found, wanted, hits = counts.sum(axis=0).tolist()
    return 2 * hits / (found + wanted) if found + wanted else 1.0


def expected_calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike) -> float:
    """Return how far confidence is from being right, 0 to 1: the ECE.

    The mean over images of ``|accuracy - mean confidence|`` of each image's bin, one of
    :data:`ECE_BINS` of equal width ``(k/bins, (k+1)/bins]``.

    Args:
        confidence: ``(N,)`` probability of the top-1 class, 0 to 1.
        correct: ``(N,)`` whether the top-1 class was right.
    """
    scores, right = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    index = np.clip(np.ceil(scores * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    surplus = np.bincount(index, weights=scores - right, minlength=ECE_BINS)
    return float(np.abs(surplus).sum() / len(scores))


def _confusions(flips: list[Flip]) -> tuple[tuple[int, int, int], ...]:
    """Return which decision flipped into which, and how often, the commonest first."""
    counts = Counter((flip.expected, flip.found) for flip in flips)
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple((*pair, count) for pair, count in ordered[:MOST_SHOWN])


def _class_changes(before: Answers, after: Answers, labels: Labels) -> tuple[ClassChange, ...]:
    """Return the classes whose accuracy changed, the largest change first; of ``(N,)`` labels."""
    if labels.ndim > 1:
        return ()
    counts, old, new = (
        np.bincount(labels[rows], minlength=int(labels.max()) + 1)
        for rows in (slice(None), before.classes[:, 0] == labels, after.classes[:, 0] == labels)
    )
    order = sorted(
        np.flatnonzero(old != new), key=lambda label: (-abs(new[label] - old[label]), label)
    )
    return tuple(
        ClassChange(int(label), int(counts[label]), int(old[label]), int(new[label]))
        for label in order[:MOST_SHOWN]
    )
