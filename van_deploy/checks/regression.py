"""A bundle against its gates and a baseline: every row, and whether it got worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.checks.baseline import (
    AccuracyFigures,
    ArtefactFigures,
    Baseline,
    SpeedFigures,
    baseline_from,
)
from van_deploy.checks.evaluate import EvaluateReport
from van_deploy.checks.gates import Allowed, Finding, Limit, Outcome, Report, held, skipped
from van_deploy.checks.rules import at_least
from van_deploy.checks.samples import Samples
from van_deploy.checks.verdicts import VerifyReport
from van_deploy.errors import InputError

SCHEMA: Final = "van-deploy/check/2"
SHOWN = 4  # messages of one gate
DIGEST = 64  # characters


@dataclass(frozen=True)
class CheckRow:
    """One line of the check.

    Attributes:
        name: what it is about, such as ``gate/verify/fp16`` or ``baseline/int8/top-1``.
        finding: what was found.
        baseline: what it was, or None.
    """

    name: str
    finding: Finding
    baseline: float | None = None

    @property
    def outcome(self) -> Outcome:
        """What was found, in a word."""
        return self.finding.outcome


@dataclass(frozen=True)
class CheckReport(Report):
    """The verdict of a check.

    Attributes:
        model: what was checked.
        rows: every gate, and every figure of the baseline.
        new: artifacts that the baseline does not know.
        images: what was verified on.
        allowed: what the user lets pass.
        measured: the baseline that says what was measured now is good.
        schema: of the document.
    """

    JSON_PROPERTIES: ClassVar = ("counts",)

    model: str
    rows: tuple[CheckRow, ...]
    new: tuple[str, ...]
    images: str
    allowed: Allowed
    measured: Baseline = field(metadata={"json": False})
    schema: Literal["van-deploy/check/2"] = SCHEMA

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each outcome."""
        outcomes = [row.outcome for row in self.rows]
        return {outcome.value: outcomes.count(outcome) for outcome in Outcome}

    def named(self) -> list[tuple[str, Finding]]:
        """Return the name of each row, and what was found."""
        return [(row.name, row.finding) for row in self.rows]


def compare_with_baseline(
    bundle: Bundle,
    samples: Samples,
    baseline: Baseline | None,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: Mapping[str, SpeedFigures],
) -> CheckReport:
    """Return every gate, and every figure against the baseline.

    Args:
        bundle: what was measured.
        samples: what it was verified on.
        baseline: what was good; None while a new one is being written.
        verify: what verifying found.
        evaluate: what evaluating found, if there were labelled images.
        speed: by artifact; empty where it was not measured.

    Raises:
        InputError: the baseline is of another model, other weights, or other images.
    """
    measured = baseline_from(bundle, samples, verify, evaluate, speed)
    rows = list(_gate_rows(verify, evaluate))
    new: tuple[str, ...] = ()
    if baseline is not None:
        _require_same(baseline, measured)
        images = baseline.evaluation.images if baseline.evaluation else 0
        kinds = {name: finding.skip for name, finding in verify.named() if finding.skip}
        for name, old in baseline.artefacts.items():
            now, kind = measured.artefacts.get(name), kinds.get(name, "")
            rows += _baseline_rows(f"baseline/{name}", old, now, images, kind)
        new = tuple(name for name in measured.artefacts if name not in baseline.artefacts)
    return CheckReport(bundle.name, tuple(rows), new, samples.description, verify.allowed, measured)


def _gate_rows(verify: VerifyReport, evaluate: EvaluateReport | None) -> Iterator[CheckRow]:
    for finding in verify.findings:
        yield CheckRow(f"gate/{finding.rule}", finding)
    for name, verdict in verify.artefacts.items():
        value = None if verdict.comparison is None else verdict.comparison.sqnr_db
        whole = Finding("SQNR", verdict.outcome, "", value, verdict.limit, "dB")
        yield CheckRow(f"gate/verify/{name}", _summary(whole, verdict.findings))
    if evaluate is None:
        return
    for name, loss in evaluate.losses.items():
        whole = replace(loss.findings[-1], outcome=loss.outcome)  # the loss itself
        yield CheckRow(f"gate/evaluate/{name}", _summary(whole, loss.findings))
    for entry in evaluate.skipped:
        yield CheckRow(f"gate/evaluate/{entry.artefact}", skipped("runs", entry.reason, entry.kind))


def _summary(whole: Finding, findings: Sequence[Finding]) -> Finding:
    """Return several findings as one, with the messages of those that decide."""
    found = [f for f in findings if f.outcome is whole.outcome]
    if whole.outcome is Outcome.SKIPPED:
        return found[0]
    shown = [f.message for f in found[:SHOWN] if f.message]
    more = [f"and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
    passed = whole.outcome is Outcome.PASS
    return replace(whole, message="" if passed else "; ".join([*shown, *more]))


def _require_same(baseline: Baseline, now: Baseline) -> None:
    pairs = [
        ("another model", baseline.model, now.model),
        ("other weights", baseline.weights_sha256, now.weights_sha256),
        ("other images to verify on", baseline.samples_sha256, now.samples_sha256),
        ("another reference", baseline.against, now.against),
    ]
    old, new = baseline.evaluation, now.evaluation
    if old and new:
        number = "another number of images that can be read"
        pairs.append(("another evaluation set", old.sha256, new.sha256))
        pairs.append((number, str(old.images), str(new.images)))
    for what, then, here in pairs:
        if then != here:
            short = [text[:12] if len(text) == DIGEST else text for text in (then, here)]
            raise InputError(
                f"The baseline was measured with {what}: {short[0]}, and now {short[1]}.",
                "Give the same ones, or write the baseline anew with --update.",
            )


def _baseline_rows(
    row: str, old: ArtefactFigures, now: ArtefactFigures | None, images: int, kind: str
) -> Iterator[CheckRow]:
    """Yield every figure of an artifact against the baseline's.

    Args:
        row: begins the names of the rows.
        old: the baseline's figures.
        now: those of this run; None where the bundle lacks the artifact.
        images: of the evaluation set.
        kind: of skip, where the artifact was not run.
    """
    if now is None:
        message = "the baseline has this artifact and the bundle lacks it"
        yield CheckRow(row, held("artifact", message))
        return
    here, there = (f"{f.runner}, {f.numeric_class}" for f in (now, old))
    if old.sqnr_db is not None:
        drops: dict[str, float] = {}
        if now.sqnr_db is None or here != there:
            why = "it was not run here" if now.sqnr_db is None else f"run by {here}"
            found = skipped("SQNR", f"{why}; the baseline is of {there}", kind or "runtimes")
        else:
            origin = f"baseline minus {gates.BELOW_RECORD_DB:g}"
            found = at_least(
                "SQNR", now.sqnr_db, Limit(old.sqnr_db - gates.BELOW_RECORD_DB, origin)
            )
            drops = {m: db - now.modules[m] for m, db in old.modules.items() if m in now.modules}
        yield CheckRow(f"{row}/SQNR", found, old.sqnr_db)
        for worst in sorted(drops, key=drops.__getitem__)[-1:]:
            slack = gates.CLASSES[old.numeric_class].slack_db
            limit = Limit(old.modules[worst] - slack, f"baseline minus {slack:g}")
            found = at_least("modules", now.modules[worst], limit, where=f"{worst}: ")
            yield CheckRow(f"{row}/modules", found, old.modules[worst])
    if old.accuracy is not None:
        yield from _accuracy_rows(row, old.accuracy, now.accuracy, images, kind or "accuracy")
    if old.speed is not None:
        yield CheckRow(
            f"{row}/speed", _speed(old.speed, now.speed, kind or "speed"), old.speed.ratio
        )


def _accuracy_rows(
    row: str, old: AccuracyFigures, now: AccuracyFigures | None, images: int, kind: str
) -> Iterator[CheckRow]:
    slack = gates.chance_changes(images)
    origin = f"baseline minus {slack} of {images} images, which chance may change"
    for figure, label in (("top1", "top-1"), ("top5", "top-5"), ("f1", "F1")):
        whole = 1 if figure == "f1" else images
        then, here = getattr(old, figure), getattr(now, figure, None)
        if then is None:
            continue
        why = "the baseline has it, and this run measured no accuracy of this artifact"
        found = skipped(label, why, kind)
        if here is not None:
            limit = Limit(100 * ((then - slack * whole / images) / whole), origin)
            found = at_least(label, 100 * (here / whole), limit, "%")
        yield CheckRow(f"{row}/{label}", found, 100 * (then / whole))


def _speed(old: SpeedFigures, now: SpeedFigures | None, kind: str) -> Finding:
    """Return whether the median ratio fell by more than the slack, as its interval tells."""
    if now is None:
        why = "the baseline has it, and this run did not measure it: add --speed"
        return skipped("speed", why, kind)
    least, low, high = 1 - gates.SPEED_SLACK, now.low / old.high, now.high / old.low
    limit = Limit(old.ratio * least, f"baseline minus {100 * gates.SPEED_SLACK:g} %")
    said = f"{100 * low:.0f} to {100 * high:.0f} % of the baseline's ratio"
    outcome = Outcome.PASS if low >= least else Outcome.FAIL
    if low < least <= high:
        outcome, said = Outcome.INCONCLUSIVE, f"{said}: a quieter machine would decide"
    return Finding("speed", outcome, said, now.ratio, limit, "x")
