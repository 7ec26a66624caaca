"""How far one set of logits is from another. Pure functions of NumPy arrays.

Logits are ``(N, K)``: one row an image, one column a class.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Comparison",
    "compare",
    "cosine",
    "decision_margins",
    "kl_divergence",
    "softmax",
    "sqnr_db",
    "top1_agreement",
    "top_classes",
    "topk_agreement",
]

Array = npt.NDArray[Any]


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
