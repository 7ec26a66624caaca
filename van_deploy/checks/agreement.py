"""Whether an artefact answers as the original PyTorch network does, at every batch size.

Two questions are asked of the same images: are the logits those of the
original, unfolded network, and does each row of a batch come out as the same
image does alone?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from van_deploy.metrics import Comparison, compare
from van_deploy.runners.base import Images, Logits, Runner

__all__ = ["FP32", "AgreementReport", "BatchAgreement", "Tolerance", "check_agreement"]


@dataclass(frozen=True)
class Tolerance:
    """What still counts as the same network.

    Attributes:
        sqnr_db: least signal to noise ratio, in dB.
        relative: largest ``max|difference| / max|logit|``.
        cosine: least cosine similarity of any row.
        row_relative: largest ``max|difference| / max|logit|`` between an image
            in a batch and alone.
        tie_relative: a changed first class counts only where PyTorch's two
            first logits differ by more than this share of ``max|logit|``.
    """

    sqnr_db: float
    relative: float
    cosine: float
    row_relative: float
    tie_relative: float


FP32 = Tolerance(sqnr_db=90.0, relative=1e-4, cosine=0.999999, row_relative=1e-4, tie_relative=1e-5)
"""For float32 against float32.

The same weights summed in another order leave 115 to 130 dB on trained VANs,
whose own spread between float32 and float64 is of that size; 90 dB is 30 dB of
room for other processors and still far from any change of a weight.
"""


@dataclass(frozen=True)
class BatchAgreement:
    """The comparison at one batch size.

    Attributes:
        batch: images in the batch.
        comparison: against the original network.
        row_relative: against the same images one at a time.
        flips: rows whose first class changed, ties left out.
        failures: a sentence for each tolerance that was passed.
    """

    batch: int
    comparison: Comparison
    row_relative: float
    flips: int
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every tolerance holds."""
        return not self.failures


@dataclass(frozen=True)
class AgreementReport:
    """The verdict over every batch size.

    Attributes:
        reference: what was compared with.
        runner: what ran the artefact.
        images: what the images were.
        tolerance: what was asked.
        batches: one entry a batch size.
    """

    reference: str
    runner: str
    images: str
    tolerance: Tolerance
    batches: tuple[BatchAgreement, ...]

    @property
    def passed(self) -> bool:
        """Whether every batch size agrees (and there was one)."""
        return bool(self.batches) and all(batch.passed for batch in self.batches)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    @property
    def failures(self) -> list[str]:
        """Every failure with its batch size."""
        return [f"batch {b.batch}: {text}" for b in self.batches for text in b.failures]

    def as_dict(self) -> dict[str, object]:
        """Return the figures, ready for JSON."""
        return {
            "reference": self.reference,
            "runner": self.runner,
            "images": self.images,
            "passed": self.passed,
            "tolerance": asdict(self.tolerance),
            "batches": [
                {
                    "batch": entry.batch,
                    "passed": entry.passed,
                    **entry.comparison.as_dict(),
                    "row_relative": entry.row_relative,
                    "flips": entry.flips,
                    "failures": list(entry.failures),
                }
                for entry in self.batches
            ],
        }


def check_agreement(
    expected: Logits,
    runner: Runner,
    images: Images,
    batches: Iterable[int],
    *,
    tolerance: Tolerance = FP32,
    described: str = "",
) -> AgreementReport:
    """Return how ``runner`` compares with the original network's logits.

    Args:
        expected: ``(N, K)`` logits of the original, unfolded network in float32.
        runner: the artefact, opened.
        images: the ``(N, C, S, S)`` those logits belong to, all different.
        batches: batch sizes to try. A batch of more than N repeats the images,
            in a rotated order each time, so that rows N apart differ too.
        tolerance: what still counts as agreement.
        described: what the images are, for the report.
    """
    alone = np.concatenate([runner.run(images[i : i + 1]) for i in range(len(images))])
    entries = []
    for batch in sorted(set(batches)):
        rows = _rows(batch, len(images))
        together = alone[:1] if batch == 1 else runner.run(images[rows])
        entries.append(_compare_batch(expected[rows], together, alone[rows], tolerance))
    return AgreementReport(
        reference="PyTorch, original network, float32",
        runner=runner.name,
        images=described,
        tolerance=tolerance,
        batches=tuple(entries),
    )


def _rows(batch: int, images: int) -> npt.NDArray[np.intp]:
    """Return which image stands in each row of a batch.

    >>> _rows(5, 2).tolist()
    [0, 1, 1, 0, 0]
    """
    rows = np.arange(batch)
    return (rows + rows // images) % images


def _compare_batch(
    expected: Logits, actual: Logits, alone: Logits, tolerance: Tolerance
) -> BatchAgreement:
    if actual.shape != expected.shape:
        message = f"the output has shape {actual.shape} where PyTorch's has {expected.shape}"
        nothing = compare(expected, np.full_like(expected, np.nan))
        return BatchAgreement(len(expected), nothing, float("nan"), 0, (message,))
    figures = compare(expected, actual)
    row_relative = compare(alone, actual).relative
    flips = _flips(expected, actual, tolerance.tie_relative)
    return BatchAgreement(
        batch=len(expected),
        comparison=figures,
        row_relative=row_relative,
        flips=flips,
        failures=tuple(_failures(figures, row_relative, flips, tolerance)),
    )


def _failures(
    figures: Comparison, row_relative: float, flips: int, tolerance: Tolerance
) -> Iterable[str]:
    if not figures.sqnr_db >= tolerance.sqnr_db:
        yield f"SQNR {figures.sqnr_db:.1f} dB is below {tolerance.sqnr_db:g} dB"
    if not figures.relative <= tolerance.relative:
        yield f"relative error {figures.relative:.1e} is above {tolerance.relative:g}"
    if not figures.cosine >= tolerance.cosine:
        yield f"cosine {figures.cosine:.6f} is below {tolerance.cosine:g}"
    if not row_relative <= tolerance.row_relative:
        yield f"an image alone and in the batch differ by {row_relative:.1e}"
    if flips:
        yield f"{flips} predictions changed"


def _flips(expected: Logits, actual: Logits, tie_relative: float) -> int:
    """Return how many first classes changed where PyTorch had clearly decided."""
    changed = expected.argmax(axis=1) != actual.argmax(axis=1)
    first_two = np.sort(expected, axis=1)[:, -2:]
    margin = np.ptp(first_two, axis=1)
    return int((changed & (margin > tie_relative * np.abs(expected).max())).sum())
