"""What each network says of an evaluation set, in arrays of fixed size.

A few dozen bytes an image are kept, whatever the number of classes: the first five classes and
a confidence, or each label's decision, and for an artifact the noise of its logits and the
decisions that flipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.metrics import Flip, Task, decisions, find_flips, probabilities, top_classes

__all__ = ["Answered", "Answers", "Table", "answered"]

TOP = 5
LEFT_OUT = -2  # the answer to an image that could not be read

Logits = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Answers:
    """What one network says of some images.

    Attributes:
        classes: ``(n, k)`` int32. Of one of K classes: the first ``min(K, 5)``, most probable
            first. Of one logit or many labels: 0 or 1 for each label. -1 for a NaN.
        confidence: ``(n,)`` float32, probability of the first class, or of the decision on one
            logit; 0 for a NaN and for many labels.
    """

    classes: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]

    @classmethod
    def of(cls, logits: Logits, task: Task = Task.SINGLE_LABEL) -> Answers:
        """Return the answers in ``logits (n, K)``."""
        finite = np.isfinite(np.asarray(logits)).all(axis=1).reshape(-1, 1)
        safe = np.where(finite, logits, 0.0).astype(np.float64)
        single = task is Task.SINGLE_LABEL
        classes = top_classes(safe, TOP) if single else decisions(safe, task)
        shares = probabilities(safe, task)
        confidence = shares.max(axis=1) if single else np.maximum(shares, 1 - shares)[:, 0]
        known = finite[:, 0] & (task is not Task.MULTI_LABEL)
        return cls(
            np.where(finite, classes, -1).astype(np.int32),
            np.where(known, confidence, 0.0).astype(np.float32),
        )

    @classmethod
    def empty(cls, images: int, width: int) -> Answers:
        """Return room for the answers to ``images``."""
        return cls(np.full((images, width), LEFT_OUT, np.int32), np.zeros(images, np.float32))

    def take(self, rows: npt.NDArray[Any]) -> Answers:
        """Return the answers of some images."""
        return Answers(self.classes[rows], self.confidence[rows])


@dataclass(frozen=True)
class Answered:
    """What several networks say of one batch; the reference's own entry has no noise.

    Attributes:
        indices: which images they are.
        unreadable: index and reason of each image that could not be read.
        answers: by network.
        signal: sum of the squares of the reference's logits.
        noise: by artifact: sum of the squares of the difference.
        flips: by artifact: decisions that changed, their margins in logits.
    """

    indices: tuple[int, ...]
    unreadable: tuple[tuple[int, str], ...]
    answers: Mapping[str, Answers]
    signal: float
    noise: Mapping[str, float]
    flips: Mapping[str, Sequence[Flip]]


def answered(
    indices: Sequence[int],
    unreadable: Sequence[tuple[int, str]],
    logits: Mapping[str, Logits],
    reference: str,
    task: Task,
) -> Answered:
    """Return what the logits of one batch say.

    Args:
        indices: which images they are.
        unreadable: index and reason of the others.
        logits: ``(n, K)`` by network; empty where no image could be read.
        reference: the network the others are compared with.
        task: how logits become labels.
    """
    others = {name: found for name, found in logits.items() if name != reference}
    signal, noise, flips = 0.0, {}, {}
    if logits:
        expected = logits[reference].astype(np.float64)
        signal = float(np.square(expected).sum())
        for name, found in others.items():
            error = float(np.square(found - expected).sum())
            noise[name] = error if math.isfinite(error) else math.inf
            changed = find_flips(expected, found, task, math.inf)
            flips[name] = [_placed(flip, indices, expected) for flip in changed]
    answers = {name: Answers.of(found, task) for name, found in logits.items()}
    return Answered(tuple(indices), tuple(unreadable), answers, signal, noise, flips)


def _placed(flip: Flip, indices: Sequence[int], expected: Logits) -> Flip:
    """Return a batch's flip as the evaluation set's, its margin in logits."""
    scale = math.sqrt(float(np.square(expected).mean()))
    return Flip(
        indices[flip.image], flip.expected, flip.found, flip.margin * scale, flip.fault, flip.label
    )


@dataclass
class Table:
    """The answers of every network to every image.

    Attributes:
        images: how many.
        names: of the networks, the reference first.
        classes: logits of the network.
        task: how logits become labels.
    """

    images: int
    names: Sequence[str]
    classes: int
    task: Task
    unreadable: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make room."""
        width = min(TOP, self.classes) if self.task is Task.SINGLE_LABEL else self.classes
        self.readable = np.zeros(self.images, bool)
        self._answers = {name: Answers.empty(self.images, width) for name in self.names}
        self._signal = 0.0
        self._noise = dict.fromkeys(self.names[1:], 0.0)
        self._flips: dict[str, list[Flip]] = {name: [] for name in self.names[1:]}

    def enter(self, batch: Answered) -> None:
        """Enter one batch."""
        self.unreadable |= dict(batch.unreadable)
        rows = list(batch.indices)
        self.readable[rows] = True
        self._signal += batch.signal
        for name, answers in batch.answers.items():
            self._answers[name].classes[rows] = answers.classes
            self._answers[name].confidence[rows] = answers.confidence
        for name, noise in batch.noise.items():
            self._noise[name] += noise
            self._flips[name] += batch.flips[name]

    def answers(self, name: str) -> Answers:
        """Return a network's answers to the images that could be read."""
        return self._answers[name].take(self.readable)

    def sqnr_db(self, name: str) -> float:
        """Return the SQNR of an artifact's logits against the reference's."""
        noise = self._noise[name]
        if noise == 0.0:
            return math.inf
        finite = math.isfinite(noise) and self._signal > 0
        return 10 * math.log10(self._signal / noise) if finite else -math.inf

    def flips(self, name: str, explained: float) -> list[Flip]:
        """Return an artifact's label flips, the widest margin first.

        Args:
            name: of the artifact.
            explained: margins up to this, in RMS logits, are noise.
        """
        count = max(int(self.readable.sum()) * self.classes, 1)
        scale = math.sqrt(self._signal / count) or 1.0
        found = [
            Flip(
                f.image,
                f.expected,
                f.found,
                f.margin / scale,
                f.margin / scale > explained or f.found < 0,
                f.label,
            )
            for f in self._flips[name]
        ]
        return sorted(found, key=lambda flip: -flip.margin)
