"""How far one set of logits is from another, and how sure that is. Pure functions.

Logits are ``(N, K)``: one row an image, one column a class.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "CONFIDENCE",
    "Comparison",
    "compare",
    "cosine",
    "decision_margins",
    "kl_divergence",
    "paired_difference_interval",
    "softmax",
    "sqnr_db",
    "top1_agreement",
    "top_classes",
    "topk_agreement",
    "wilson_interval",
]

Array = npt.NDArray[Any]
Interval = tuple[float, float]

CONFIDENCE = 0.95
"""Of an interval, where nothing else is asked."""


@dataclass(frozen=True)
class Comparison:
    """The usual figures of merit of some logits against their reference.

    Attributes:
        images: rows compared.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference.
        relative: ``max|difference| / max|reference|``.
        cosine: the smallest cosine similarity of any row.
        sqnr_db: see :func:`sqnr_db`.
        kl: mean Kullback-Leibler divergence of the softmax, in nats.
        top1_agreement: share of rows with the same first class, 0 to 1.
        top5_agreement: see :func:`topk_agreement`, with ``k = 5``.
    """

    images: int
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    sqnr_db: float
    kl: float
    top1_agreement: float
    top5_agreement: float

    def as_dict(self) -> dict[str, float | int]:
        """Return the figures by name."""
        return asdict(self)


def compare(reference: Array, actual: Array) -> Comparison:
    """Return how far ``actual`` is from ``reference``, both ``(N, K)``, in float64.

    NaN in ``actual`` gives NaN or ``-inf`` figures, which pass no tolerance.
    """
    expected, found = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    difference = np.abs(found - expected)
    return Comparison(
        images=len(expected),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        relative=float(difference.max() / max(np.abs(expected).max(), np.finfo(np.float64).tiny)),
        cosine=float(cosine(expected, found).min()),
        sqnr_db=sqnr_db(expected, found),
        kl=float(kl_divergence(expected, found).mean()),
        top1_agreement=top1_agreement(expected, found),
        top5_agreement=topk_agreement(expected, found, 5),
    )


def sqnr_db(reference: Array, actual: Array) -> float:
    """Return the signal to quantisation noise ratio in decibels.

    ``10 log10(sum(reference^2) / sum((actual - reference)^2))``; ``inf`` where
    they are equal, ``-inf`` where ``actual`` holds a NaN or an infinity.

    >>> sqnr_db(np.array([[10.0, 0.0]]), np.array([[9.0, 0.0]]))
    20.0
    """
    expected, found = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    if not np.isfinite(found).all():
        return -math.inf
    noise = float(np.square(found - expected).sum())
    signal = float(np.square(expected).sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def cosine(reference: Array, actual: Array) -> Array:
    """Return each row's cosine similarity, ``(N,)``; one for two rows of zeros."""
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(actual, axis=1)
    dots = np.einsum("nk,nk->n", reference, actual)
    return np.where(norms > 0, dots / np.where(norms > 0, norms, 1.0), 1.0)


def softmax(logits: Array) -> Array:
    """Return the probabilities ``(N, K)`` of each row's classes."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def kl_divergence(reference: Array, actual: Array) -> Array:
    """Return each row's ``KL(softmax(reference) || softmax(actual))`` in nats, ``(N,)``."""
    log_p, log_q = _log_softmax(reference), _log_softmax(actual)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=1)


def top1_agreement(reference: Array, actual: Array) -> float:
    """Return the share of rows whose largest column is the same, 0 to 1.

    A row of ``actual`` with a NaN agrees with nothing.
    """
    same = reference.argmax(axis=1) == actual.argmax(axis=1)
    return float((same & np.isfinite(actual).all(axis=1)).mean())


def top_classes(logits: Array, k: int) -> npt.NDArray[np.int64]:
    """Return each row's ``k`` largest columns ``(N, min(k, K))``, the largest first.

    Ties go to the lower column, as in :func:`numpy.argmax`.

    >>> top_classes(np.array([[0.1, 0.7, 0.2]]), 2)
    array([[1, 2]])
    """
    order: npt.NDArray[np.int64] = np.argsort(-np.asarray(logits), axis=1, kind="stable")
    return order[:, :k]


def topk_agreement(reference: Array, actual: Array, k: int) -> float:
    """Return the mean share of each row's first ``k`` classes that are the same, 0 to 1.

    Their order does not count. A row of ``actual`` with a NaN agrees with nothing.
    With ``K <= k`` classes the first classes are always the same.

    >>> topk_agreement(np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[3.0, 0.0, 2.0, 1.0]]), 2)
    0.5
    """
    expected, found = top_classes(reference, k), top_classes(actual, k)
    shared = (expected[:, :, None] == found[:, None, :]).any(axis=2).mean(axis=1)
    return float((shared * np.isfinite(actual).all(axis=1)).mean())


def decision_margins(logits: Array) -> Array:
    """Return how far each row's first class is ahead of its second, ``(N,)``, in logits.

    >>> decision_margins(np.array([[0.5, 2.0, -1.0]]))
    array([1.5])
    """
    first_two = np.partition(logits, -2, axis=1)[:, -2:]
    margins: Array = first_two[:, 1] - first_two[:, 0]
    return margins


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def wilson_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of the share ``hits / total`` (0 to 1).

    Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22, 1927. Without images nothing is known: (0, 1).

    >>> low, high = wilson_interval(90, 100)
    >>> round(low, 4), round(high, 4)
    (0.8256, 0.9448)
    """
    if total == 0:
        return 0.0, 1.0
    z = _quantile(confidence)
    share, weight = hits / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    low = max(0.0, centre - half) if hits else 0.0  # exactly: rounding leaves 1e-18
    high = min(1.0, centre + half) if hits < total else 1.0
    return low, high


def paired_difference_interval(
    lost: int, won: int, total: int, confidence: float = CONFIDENCE
) -> Interval:
    """Return an interval of ``(won - lost) / total``, the change of a share in paired answers.

    Wald's interval after adding half a case to each of the four cells (Agresti
    and Min, "Simple improved confidence intervals for comparing matched
    proportions", Statistics in Medicine 24, 2005), which covers well also
    where few or no answers changed. Without images: (-1, 1).

    >>> low, high = paired_difference_interval(10, 4, 1000)
    >>> round(low, 5), round(high, 5)
    (-0.01355, 0.00158)
    """
    if total == 0:
        return -1.0, 1.0
    b, c, n = lost + 0.5, won + 0.5, total + 2
    centre = (c - b) / n
    half = _quantile(confidence) * math.sqrt(b + c - (c - b) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def _quantile(confidence: float) -> float:
    """Return ``z`` with which a normal variable is inside ``+-z`` that often."""
    return NormalDist().inv_cdf((1 + confidence) / 2)
