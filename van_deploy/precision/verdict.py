"""What a precision has to hold, whether it does, and which one is recommended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.intervals import tango_interval, wilson_interval
from van_deploy.metrics import compare

__all__ = ["GATES", "Gate", "PrecisionRow", "precision_row", "recommended"]

WORTHWHILE = 0.9
"""A precision is worth its loss if it takes at most this share of the larger one's size or time."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """What a precision has to hold to be recommended.

    Shares of images are only as sure as the images are many: agreement and top-1 fail
    where their 95 % interval lies wholly on the wrong side. Where it holds the limit,
    the images are too few to tell, and the line says so.

    Attributes:
        agreement: smallest share (0..1) of images with FP32's first class.
        sqnr_db: smallest SQNR of the logits.
        drop_points: largest loss of top-1, in percentage points, where labels exist.
    """

    agreement: float
    sqnr_db: float
    drop_points: float


GATES = {
    "fp32": Gate(1.0, 100.0, 0.0),
    "fp16": Gate(0.998, 40.0, 0.1),
    "int8": Gate(0.985, 25.0, 0.5),
}
"""FP16's and INT8's: looser than what a good run reaches (99.9 %, 60 dB; 99.3 %, 33 dB), so that
a few images more or less do not decide; a network far off them has a fault."""


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
    failures: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    if not reference:
        gate = GATES[precision]
        checks = [_agreement_check(gate, figures.top1_agreement, same, figures.images)]
        if labels is not None:
            checks.append(_drop_check(gate, expected, found, labels))
        failures, doubts = _sorted_out(checks)
        if not figures.sqnr_db >= gate.sqnr_db:
            failures += (f"SQNR {figures.sqnr_db:.1f} dB is below {gate.sqnr_db:g} dB",)
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


_Check = tuple[str, bool]
"""What is wrong ("" for nothing), and whether that is sure."""


def _agreement_check(
    gate: Gate, share: float, interval: tuple[float, float], images: int
) -> _Check:
    if share >= gate.agreement:
        return "", True
    low, high = (100 * end for end in interval)
    said = (
        f"agreement {100 * share:.2f} % ({low:.1f} to {high:.1f} on {images} images) "
        f"is below {100 * gate.agreement:g} %"
    )
    return said, interval[1] < gate.agreement


def _drop_check(gate: Gate, expected: Logits, found: Logits, labels: npt.NDArray[Any]) -> _Check:
    before, after = expected.argmax(axis=1) == labels, found.argmax(axis=1) == labels
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    points = 100 * (lost - won) / len(labels)
    if points <= gate.drop_points:
        return "", True
    low, high = (100 * end for end in tango_interval(lost, won, len(labels)))
    said = (
        f"top-1 lost {points:.2f} points ({low:.2f} to {high:.2f}), more than {gate.drop_points:g}"
    )
    return said, low > gate.drop_points


def _sorted_out(checks: list[_Check]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what failed for sure, and what may be chance."""
    wrong = [check for check in checks if check[0]]
    return tuple(said for said, sure in wrong if sure), tuple(s for s, sure in wrong if not sure)


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
