"""How much accuracy a quantised network costs, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Drop", "top1_drop"]

CHANGED = 2.0
"""Answers that may change, for better or worse, over those that may be lost."""

Logits = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Drop:
    """How much accuracy a plan costs, in percentage points.

    Attributes:
        points: of top-1 where there are labels, else of top-1 agreement.
        error: its standard error, from the images that changed sides.
        of: ``top-1`` or ``agreement``.
        changed: points of images whose first class is another one, for better or worse.
    """

    points: float
    error: float
    of: str
    changed: float = 0.0

    @property
    def upper(self) -> float:
        """The drop plus one standard error: what is held against the budget."""
        return self.points + self.error

    def holds(self, budget: float) -> bool:
        """Return whether the drop is within ``budget``, and not only because losses met wins.

        At most twice the budget of answers may have changed at all.
        """
        return self.upper <= budget and self.changed <= CHANGED * budget


def top1_drop(reference: Logits, actual: Logits, labels: npt.NDArray[Any] | None = None) -> Drop:
    """Return how much accuracy ``actual`` lost against ``reference``, both ``(N, K)``.

    Args:
        reference: FP32 logits.
        actual: logits of the quantised network.
        labels: ``(N,)`` right classes, or None to count agreement.

    >>> top1_drop(np.eye(4), np.eye(4)[[0, 1, 2, 2]]).points
    25.0
    """
    before, after = reference.argmax(axis=1), actual.argmax(axis=1)
    count = len(before)
    if labels is None:
        changed = int((before != after).sum())
        points = 100 * changed / count
        return Drop(points, 100 * math.sqrt(changed) / count, "agreement", points)
    lost = int(((before == labels) & (after != labels)).sum())
    won = int(((before != labels) & (after == labels)).sum())
    points, error = 100 * (lost - won) / count, 100 * math.sqrt(lost + won) / count
    return Drop(points, error, "top-1", 100 * float((before != after).mean()))
