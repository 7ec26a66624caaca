"""What a precision has to hold, whether it does, and which one is recommended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.checks.gates import (
    LOSSY,
    Finding,
    Outcome,
    allowed_loss,
    flip_margin,
    sqnr_floor,
)
from van_deploy.checks.rules import at_least, judge_loss, judge_numbers, paired_loss
from van_deploy.intervals import wilson_interval
from van_deploy.metrics import Task, compare, find_flips, sqnr_db

__all__ = ["PrecisionRow", "precision_row", "recommended"]

WORTHWHILE = 0.9
"""A precision is worth its loss if it takes at most this share of the larger one's size or time."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PrecisionRow:
    """One line of the comparison; the reference is FP32.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        size_bytes: of the file.
        sqnr_db: of the logits over all images.
        cosine: smallest of any image.
        kl: mean over the images, in nats.
        agreement: share (0..1) of images with the same first class.
        images: how many.
        correct: how many were classified right, or None without labels.
        ms_per_image: median on this CPU, or None where it was not measured.
        passed: whether it holds its gate; None for FP32 itself.
        failures: what it does not hold.
        doubts: what the images are too few to decide.
        agreement_interval: of 95 %, of ``agreement``.
    """

    precision: str
    size_bytes: int
    sqnr_db: float
    cosine: float
    kl: float
    agreement: float
    images: int
    correct: int | None
    ms_per_image: float | None
    passed: bool | None
    failures: tuple[str, ...]
    doubts: tuple[str, ...] = ()
    agreement_interval: tuple[float, float] = (0.0, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the line as JSON can hold it; infinite figures become None."""
        values = asdict(self)
        values |= {key: list(values[key]) for key in ("failures", "doubts", "agreement_interval")}
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in values.items()
        }


def precision_row(
    precision: str,
    size_bytes: int,
    expected: Logits,
    found: Logits,
    labels: npt.NDArray[Any] | None = None,
    ms: float | None = None,
    *,
    reference: bool = False,
) -> PrecisionRow:
    """Return one line of the comparison.

    Args:
        precision: ``fp32``, ``fp16`` or ``int8``.
        size_bytes: of the file.
        expected: FP32's logits ``(N, K)``.
        found: this precision's.
        labels: ``(N,)`` right classes, or None.
        ms: median time an image, or None.
        reference: whether this is FP32 itself, which has no gate to hold.
    """
    figures = compare(expected, found)
    correct = None if labels is None else int((found.argmax(axis=1) == labels).sum())
    same = wilson_interval(round(figures.top1_agreement * figures.images), figures.images)
    findings = [] if reference else _judged(precision, expected, found, labels)
    failures = tuple(f.message for f in findings if f.outcome is Outcome.FAIL)
    doubts = tuple(f.message for f in findings if f.outcome is Outcome.INCONCLUSIVE)
    return PrecisionRow(
        precision=precision,
        size_bytes=size_bytes,
        sqnr_db=figures.sqnr_db,
        cosine=figures.cosine,
        kl=figures.kl,
        agreement=figures.top1_agreement,
        images=figures.images,
        correct=correct,
        ms_per_image=ms,
        passed=None if reference else not failures,
        failures=failures,
        doubts=doubts,
        agreement_interval=same,
    )


def _judged(
    precision: str, expected: Logits, found: Logits, labels: npt.NDArray[Any] | None
) -> list[Finding]:
    """Return what the gates say of a precision, FP32 taken for PyTorch."""
    floor = sqnr_floor(precision, np.inf)
    sqnr = at_least("SQNR", sqnr_db(expected, found), floor)
    if labels is None:
        return [sqnr]
    before, after = expected.argmax(axis=1) == labels, found.argmax(axis=1) == labels
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    loss, allowed = paired_loss(lost, won, len(labels)), allowed_loss(precision)
    if precision in LOSSY:
        return [sqnr, judge_loss(loss, allowed)]
    flips = find_flips(expected, found, Task.SINGLE_LABEL, flip_margin(floor.value))
    return judge_numbers(loss, allowed, sqnr.value or 0.0, floor, flips)


def recommended(rows: tuple[PrecisionRow, ...], target: str) -> tuple[str, str]:
    """Return the smallest precision that holds its gate and pays, and why."""
    best, why = rows[0], "nothing smaller holds its gate and pays"
    for row in rows[1:]:
        if not row.passed:
            continue
        cost = _cost(row, target) / _cost(best, target)
        if cost <= WORTHWHILE:
            best, why = row, _gain(row, rows[0], target)
    others = [_dismissal(row, best, target) for row in rows[1:] if row is not best]
    return best.precision, "; ".join([why, *filter(None, others)])


def _cost(row: PrecisionRow, target: str) -> float:
    if target == "cpu" and row.ms_per_image is not None:
        return row.ms_per_image
    return float(row.size_bytes)


def _gain(row: PrecisionRow, reference: PrecisionRow, target: str) -> str:
    size = f"{reference.size_bytes / row.size_bytes:.2f} times smaller than FP32"
    if target == "cpu" and row.ms_per_image and reference.ms_per_image:
        return f"{reference.ms_per_image / row.ms_per_image:.2f} times FP32's speed here, {size}"
    return f"{size}, at {100 * row.agreement:.2f} % agreement"


def _dismissal(row: PrecisionRow, best: PrecisionRow, target: str) -> str:
    """Return why a precision was passed over, or "" where a smaller one was taken."""
    name = row.precision.upper()
    if not row.passed:
        return f"{name} is not worth it: {'; '.join(row.failures)}"
    if _cost(row, target) > WORTHWHILE * _cost(best, target) and row.precision == "int8":
        what = "time" if target == "cpu" and row.ms_per_image is not None else "size"
        ratio = _cost(row, target) / _cost(best, target)
        return f"{name} is not worth it: {ratio:.2f} times the {what} of {best.precision.upper()}"
    return ""
