"""Metrics between two sets of logits, and the labels that logits give. Pure functions.

Logits are ``(N, K)``: one row per image, one column per class.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Task(str, enum.Enum):
    """How logits become labels."""

    SINGLE_LABEL = "single-label"
    """One of K classes: softmax, the largest logit."""
    BINARY = "binary"
    """One logit: sigmoid, positive from 0.5."""
    MULTI_LABEL = "multi-label"
    """K independent labels: sigmoid, each positive from 0.5."""
    REGRESSION = "regression"
    """Values without probabilities or decisions."""

    @classmethod
    def of(cls, classes: int, problem_type: str | None = None) -> Task:
        """Return the task of a network with ``classes`` logits.

        Args:
            classes: number of logits.
            problem_type: the ``problem_type`` of a Transformers configuration, or None.

        >>> Task.of(1), Task.of(5, "multi_label_classification")
        (<Task.BINARY: 'binary'>, <Task.MULTI_LABEL: 'multi-label'>)
        """
        if problem_type == "regression":
            return cls.REGRESSION
        if classes == 1:
            return cls.BINARY
        multi = problem_type == "multi_label_classification"
        return cls.MULTI_LABEL if multi else cls.SINGLE_LABEL


@dataclass(frozen=True)
class Comparison:
    """Metrics of logits against their reference.

    Attributes:
        images: number of rows.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: ``max|difference| / max|reference|``.
        cosine: the minimum cosine similarity of any row.
        sqnr_db: see :func:`sqnr_db`.
        kl: mean Kullback-Leibler divergence of the softmax, in nats; None if the columns are not
            the classes of one label.
        top1_agreement: share of rows with the same decisions, 0 to 1; None without decisions.
        top5_agreement: see :func:`topk_agreement`, with ``k = 5``; None with 5 classes or fewer,
            and like ``kl``.
    """

    images: int
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    sqnr_db: float
    kl: float | None
    top1_agreement: float | None
    top5_agreement: float | None


def compare(reference: Array, actual: Array, task: Task | None = Task.SINGLE_LABEL) -> Comparison:
    """Return the metrics of ``actual`` against ``reference``, both ``(N, K)``, in float64.

    ``task`` is how logits become labels; None if the values are not logits. NaN in ``actual``
    gives NaN or ``-inf``, which exceed every tolerance.
    """
    expected, result = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    difference, single = np.abs(result - expected), task is Task.SINGLE_LABEL
    agreement = top5 = None
    if single and expected.shape[1] > 5:
        top5 = topk_agreement(expected, result, 5)
    if task not in (None, Task.REGRESSION):
        before, after = decisions(expected, task), decisions(result, task)
        agreement = float((before == after).all(axis=1).mean())
    return Comparison(
        images=len(expected),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=float(difference.max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny)),
        cosine=float(cosine(expected, result).min()),
        sqnr_db=sqnr_db(expected, result),
        kl=float(kl_divergence(expected, result).mean()) if single else None,
        top1_agreement=agreement,
        top5_agreement=top5,
    )


def signal_and_noise(reference: Array, actual: Array) -> Array:
    """Return the sums of squares of a tensor and of its error, ``(2,)`` float64.

    The sums of several batches may be added. With different shapes the error is infinite.
    """
    exact = np.asarray(reference, np.float64)
    same = actual.shape == exact.shape
    error = np.square(np.asarray(actual, np.float64) - exact).sum() if same else math.inf
    return np.array([np.square(exact).sum(), error])


def decibels(signal: float, noise: float) -> float:
    """Return ``10 log10(signal / noise)``: ``inf`` without noise, ``-inf`` if noise is not finite.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0), decibels(1.0, math.nan)
    (20.0, inf, -inf)
    """
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if math.isfinite(noise) and signal > 0 else -math.inf


def sqnr_db(reference: Array, actual: Array) -> float:
    """Return the signal to quantisation noise ratio in decibels.

    ``10 log10(sum(reference^2) / sum((actual - reference)^2))``; ``inf`` if they are equal,
    ``-inf`` if ``actual`` has a NaN or an infinity.

    >>> sqnr_db(np.array([[10.0, 0.0]]), np.array([[9.0, 0.0]]))
    20.0
    """
    return decibels(*signal_and_noise(reference, actual))


def offset_db(values: Array) -> float:
    """Return how far the values ``(N, K)`` are above their differences between rows, in dB.

    Constant outputs have this SQNR. A single row has no differences: 0.

    >>> round(offset_db(np.array([[55.0], [45.0]])), 2)
    20.04
    """
    mean = np.broadcast_to(values.mean(axis=0), values.shape)
    return sqnr_db(values, mean) if len(values) > 1 else 0.0


def rms(logits: Array) -> float:
    """Return the root mean square of all logits."""
    return math.sqrt(float(np.square(np.asarray(logits, np.float64)).mean()))


def worst_row_sqnr_db(reference: Array, actual: Array) -> float:
    """Return the SQNR of the row with most noise, against the mean signal of all rows, in dB.

    The signal is the mean of all rows, so that rows with small logits do not count as worse.
    """
    expected = np.asarray(reference, np.float64)
    noise = np.square(np.asarray(actual, np.float64) - expected).mean(axis=1)
    return decibels(float(np.square(expected).mean()), float(noise.max()))


def cosine(reference: Array, actual: Array) -> Array:
    """Return each row's cosine similarity, ``(N,)``: 1 for two zero rows, 0 for one zero row.

    >>> cosine(np.zeros((2, 1)), np.array([[0.0], [3.0]]))
    array([1., 0.])
    """
    first, second = np.linalg.norm(reference, axis=1), np.linalg.norm(actual, axis=1)
    norms, both_zero = first * second, (first == 0) & (second == 0)
    dots: Array = np.einsum("nk,nk->n", reference, actual)
    return dots / np.where(norms == 0, 1.0, norms) + both_zero


def probabilities(logits: Array, task: Task = Task.SINGLE_LABEL) -> Array:
    """Return the probabilities ``(N, K)``: softmax, or a sigmoid of each logit.

    The values of a regression are returned unchanged.
    """
    if task is Task.SINGLE_LABEL:
        return softmax(logits)
    if task is Task.REGRESSION:
        return logits
    return np.exp(-np.logaddexp(0, -np.asarray(logits)))  # never overflows


def softmax(logits: Array) -> Array:
    """Return the softmax of each row, ``(N, K)``."""
    return np.exp(_log_softmax(logits))


def kl_divergence(reference: Array, actual: Array) -> Array:
    """Return each row's ``KL(softmax(reference) || softmax(actual))`` in nats, ``(N,)``."""
    log_p, log_q = _log_softmax(reference), _log_softmax(actual)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def top_classes(logits: Array, k: int) -> npt.NDArray[np.int64]:
    """Return the top ``k`` classes of each row, ``(N, min(k, K))``, the largest logit first.

    Ties go to the lower class, as in :func:`numpy.argmax`.

    >>> top_classes(np.array([[0.1, 0.7, 0.2]]), 2)
    array([[1, 2]])
    """
    order: npt.NDArray[np.int64] = np.argsort(-np.asarray(logits), axis=1, kind="stable")
    return order[:, :k]


def topk_agreement(reference: Array, actual: Array, k: int) -> float:
    """Return the mean share of common classes in the top ``k`` of each row, 0 to 1.

    Their order does not count. A row of ``actual`` with a NaN has no agreement. With ``K <= k``
    classes the top-k classes are always the same.

    >>> topk_agreement(np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[3.0, 0.0, 2.0, 1.0]]), 2)
    0.5
    """
    expected, top = top_classes(reference, k), top_classes(actual, k)
    shared = (expected[:, :, None] == top[:, None, :]).any(axis=2).mean(axis=1)
    return float((shared * np.isfinite(actual).all(axis=1)).mean())


def decision_margins(logits: Array, task: Task = Task.SINGLE_LABEL) -> Array:
    """Return the margin of each decision, in logits.

    Single-label: difference of the two largest logits, ``(N, 1)``. Binary and multi-label:
    distance of each logit from 0, ``(N, K)``. A regression has no decisions: ``(N, 0)``.

    >>> decision_margins(np.array([[0.5, 2.0, -1.0]]))
    array([[1.5]])
    """
    if task is not Task.SINGLE_LABEL or logits.shape[1] < 2:
        return np.abs(logits[:, :0] if task is Task.REGRESSION else logits)
    return np.diff(np.partition(logits, -2, axis=1)[:, -2:], axis=1)


def decisions(logits: Array, task: Task = Task.SINGLE_LABEL) -> npt.NDArray[np.int64]:
    """Return the decisions: the class ``(N, 1)``, or 0 or 1 for each label ``(N, K)``.

    Rows with a NaN or an infinity have -1.
    """
    labels = logits.argmax(axis=1)[:, None] if task is Task.SINGLE_LABEL else logits >= 0
    finite = np.isfinite(logits).all(axis=1, keepdims=True)
    return np.where(finite, labels, -1).astype(np.int64)


@dataclass(frozen=True)
class Flip:
    """A decision that changed (label flip).

    Attributes:
        image: index of the image, from 0.
        expected: PyTorch's decision: the class, or 0 or 1.
        actual: the artifact's decision; -1 for a NaN or an infinity.
        margin: margin of PyTorch's decision, in RMS logits.
        fault: whether the margin is larger than the allowed noise explains.
        label: index of the label, for multi-label networks.
    """

    image: int
    expected: int
    actual: int
    margin: float
    fault: bool
    label: int = 0


def find_flips(expected: Array, actual: Array, task: Task, explained: float) -> list[Flip]:
    """Return the decisions that changed between two sets of logits, the widest margin first.

    Args:
        expected: ``(N, K)`` of the reference.
        actual: ``(N, K)``; a row that is not finite is a flip, and always a fault.
        task: how logits become decisions.
        explained: maximum margin, in RMS logits, that noise explains.
    """
    margins = decision_margins(expected, task) / max(rms(expected), np.finfo(np.float64).tiny)
    return flips_between(decisions(expected, task), decisions(actual, task), margins, explained)


def flips_between(
    before: npt.NDArray[Any], after: npt.NDArray[Any], margins: Array, explained: float
) -> list[Flip]:
    """Return the decisions that changed, the widest margin first.

    Args:
        before: decisions of the reference ``(N, k)``; the first ``m`` columns are compared.
        after: decisions of the artifact; -1 is always a fault.
        margins: margins of the reference ``(N, m)``, in RMS logits.
        explained: maximum margin that noise explains.
    """
    flips = []
    for row, label in np.argwhere(before[:, : margins.shape[1]] != after[:, : margins.shape[1]]):
        expected, actual, margin = before[row, label], after[row, label], margins[row, label]
        fault = bool(margin > explained or actual < 0)
        flips.append(Flip(int(row), int(expected), int(actual), float(margin), fault, int(label)))
    return sorted(flips, key=lambda flip: -flip.margin)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
