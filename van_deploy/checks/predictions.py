"""What a network says of an evaluation set, in arrays of a fixed size an image.

A few dozen bytes an image are kept, whatever the number of classes: the first five classes and
a confidence, or each label's decision, and how far the logits are from the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from van_deploy.metrics import (
    Flip,
    Task,
    decibels,
    decision_margins,
    decisions,
    flips_between,
    probabilities,
    top_classes,
)

TOP = 5

Logits = npt.NDArray[np.floating[Any]]


class Answers(NamedTuple):
    """What one network says of some images.

    Attributes:
        classes: ``(n, k)`` int32. Of one of K classes: the first ``min(K, 5)``, most probable
            first. Of one logit or many labels: 0 or 1 for each label. -1 for a NaN.
        confidence: ``(n,)`` float32, probability of the first class, or of the decision on one
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
        finite = np.isfinite(values).all(axis=1, keepdims=True)
        safe = np.where(finite, values, 0.0)
        single = task is Task.SINGLE_LABEL
        classes = top_classes(safe, TOP) if single else decisions(safe, task)
        shares = probabilities(safe, task)
        confidence = shares.max(axis=1) if single else np.maximum(shares, 1 - shares)[:, 0]
        known = finite[:, 0] if task is not Task.MULTI_LABEL else np.zeros(len(values), bool)
        margins = decision_margins(exact, task)
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
        return decibels(float(reference.power.mean()), float(self.noise.mean()))

    def flips(self, reference: Answers, explained: float) -> list[Flip]:
        """Return the label flips, the widest margin first.

        Args:
            reference: PyTorch's answers to the same images.
            explained: margins up to this, in RMS logits, are noise.
        """
        scale = math.sqrt(float(reference.power.mean())) or 1.0
        return flips_between(reference.classes, self.classes, reference.margins / scale, explained)
