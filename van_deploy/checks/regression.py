"""A bundle against its gates and a baseline: every row, and whether it got worse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.checks.baseline import Baseline, images_digest
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.figures import Figure
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.data import CheckImages
from van_deploy.errors import InputError

__all__ = ["SCHEMA", "CheckReport", "CheckRow", "compare_with_baseline"]

SCHEMA = "van-deploy/check/1"
PASSED, FAILED, SKIPPED, NEW = "passed", "failed", "skipped", "new"


@dataclass(frozen=True)
class CheckRow:
    """One line of the check.

    Attributes:
        name: of the figure or the gate.
        outcome: ``passed``, ``failed``, ``skipped`` or ``new``.
        now: what was measured, or None.
        baseline: what it was, or None.
        message: what is wrong, or why it was skipped.
    """

    name: str
    outcome: str
    now: float | None = None
    baseline: float | None = None
    message: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The verdict of a check.

    Attributes:
        model: what was checked.
        rows: every gate and every figure.
        allow_skip: whether what this machine cannot check may be left unchecked.
        images: what was verified on.
    """

    model: str
    rows: tuple[CheckRow, ...]
    allow_skip: bool
    images: str

    def having(self, outcome: str) -> list[CheckRow]:
        """Return the rows with that outcome."""
        return [row for row in self.rows if row.outcome == outcome]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, something passed, and nothing was skipped without leave."""
        skipped = self.having(SKIPPED) and not self.allow_skip
        return bool(self.having(PASSED)) and not self.having(FAILED) and not skipped

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the report, ready for JSON."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "passed": self.passed,
            "allow_skip": self.allow_skip,
            "images": self.images,
            "counts": {o: len(self.having(o)) for o in (PASSED, FAILED, SKIPPED, NEW)},
            "rows": [asdict(row) for row in self.rows],
        }


def compare_with_baseline(
    bundle: Bundle,
    pictures: CheckImages,
    baseline: Baseline | None,
    figures: Sequence[Figure],
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    *,
    allow_skip: bool = False,
) -> CheckReport:
    """Return every gate, and every figure against the baseline.

    Args:
        bundle: what was measured.
        pictures: what it was verified on.
        baseline: what was good; None while a new one is being written.
        figures: what was measured now.
        verify: whose gates are rows as well.
        evaluate: likewise, if there were labelled images.
        allow_skip: whether rows may stay unchecked.

    Raises:
        InputError: the baseline is of another model, other weights or other images.
    """
    if baseline is not None:
        _require_same(bundle, pictures, baseline)
    rows = [*_gate_rows(verify, evaluate), *_figure_rows(baseline, figures)]
    return CheckReport(bundle.name, tuple(rows), allow_skip, pictures.description)


def _gate_rows(verify: VerifyReport, evaluate: EvaluateReport | None) -> Iterator[CheckRow]:
    for verdict in verify.artefacts:
        yield CheckRow(
            f"gate/verify/{verdict.artefact}",
            verdict.outcome,
            message=verdict.reason or _some(verdict),
        )
    if evaluate is None:
        return
    for name, drift in evaluate.drifts.items():
        message = (
            f"{drift.top1_drop:+.2f} points of top-1 lost, {drift.top1_drop_allowed:g} allowed "
            f"(p = {drift.p_value:.2g})"
        )
        yield CheckRow(
            f"gate/evaluate/{name}",
            PASSED if drift.passed else FAILED,
            drift.top1_drop,
            message=message,
        )
    for entry in evaluate.skipped:
        yield CheckRow(f"gate/evaluate/{entry.artefact}", SKIPPED, message=entry.reason)


def _some(verdict: ArtefactVerdict, most: int = 4) -> str:
    shown = list(verdict.failures[:most])
    if len(verdict.failures) > most:
        shown.append(f"and {len(verdict.failures) - most} more")
    return "; ".join(shown)


def _figure_rows(baseline: Baseline | None, figures: Sequence[Figure]) -> Iterator[CheckRow]:
    known = {} if baseline is None else dict(baseline.figures)
    now = {figure.name: figure for figure in figures}
    for name, old in known.items():
        if name not in now:
            yield CheckRow(
                name, SKIPPED, None, old.value, "in the baseline, and not measured this time"
            )
            continue
        worse = old.worse_by(now[name].value)
        room = old.room_for(now[name])
        failed = not worse <= room  # NaN fails
        message = f"worse by {worse:.4g}, {room:.4g} allowed" if failed else ""
        yield CheckRow(name, FAILED if failed else PASSED, now[name].value, old.value, message)
    for name, figure in now.items():
        if name not in known:
            yield CheckRow(name, NEW, figure.value, None, "not in the baseline")


def _require_same(bundle: Bundle, pictures: CheckImages, baseline: Baseline) -> None:
    weights = bundle.manifest.weights.sha256
    pairs = (
        ("model", baseline.model, bundle.name),
        ("weights", baseline.weights_sha256[:12], weights[:12]),
        ("images", baseline.images_sha256[:12], images_digest(pictures)[:12]),
    )
    for what, then, now in pairs:
        if then != now:
            raise InputError(
                f"The baseline was measured with other {what}: {then}, and now {now}.",
                "Give the same ones, or write the baseline anew with --update.",
            )
