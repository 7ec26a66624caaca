"""A bundle against its gates and a baseline: every row, and whether it got worse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal

from van_deploy.bundle import Bundle
from van_deploy.checks.baseline import (
    ArtefactFigures,
    Baseline,
    baseline_from,
)
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.gates import (
    BELOW_RECORD_DB,
    MODULE_SLACK_DB,
    SPEED_SLACK,
    Allowed,
    Finding,
    Limit,
    Outcome,
    chance_changes,
    failed,
    skipped,
)
from van_deploy.checks.rules import at_least
from van_deploy.checks.samples import Samples
from van_deploy.checks.speed import SpeedRatio
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.errors import InputError

__all__ = ["CheckReport", "CheckRow", "compare_with_baseline"]

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
class CheckReport:
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
        return {outcome.value: len(self.having(outcome)) for outcome in Outcome}

    def having(self, outcome: Outcome) -> list[CheckRow]:
        """Return the rows with that outcome."""
        return [row for row in self.rows if row.outcome is outcome]

    def named(self) -> list[tuple[str, Finding]]:
        """Return the name of each row, and what was found."""
        return [(row.name, row.finding) for row in self.rows]

    @property
    def passed(self) -> bool:
        """Whether something passed, and nothing stands in the way."""
        return self.allowed.passes(row.finding for row in self.rows)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def compare_with_baseline(
    bundle: Bundle,
    samples: Samples,
    baseline: Baseline | None,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: Mapping[str, SpeedRatio],
    allowed: Allowed,
) -> CheckReport:
    """Return every gate, and every figure against the baseline.

    Args:
        bundle: what was measured.
        samples: what it was verified on.
        baseline: what was good; None while a new one is being written.
        verify: what verifying found.
        evaluate: what evaluating found, if there were labelled images.
        speed: by artifact; empty where it was not measured.
        allowed: what the user lets pass.

    Raises:
        InputError: the baseline is of another model, other weights, or other images.
    """
    measured = baseline_from(bundle, samples, verify, evaluate, dict(speed))
    rows = list(_gate_rows(verify, evaluate))
    new: tuple[str, ...] = ()
    if baseline is not None:
        _require_same(baseline, measured)
        rows += _baseline_rows(baseline, measured, _skip_kinds(verify))
        new = tuple(name for name in measured.artefacts if name not in baseline.artefacts)
    return CheckReport(bundle.name, tuple(rows), new, samples.description, allowed, measured)


# --- gates -----------------------------------------------------------------------------------


def _gate_rows(verify: VerifyReport, evaluate: EvaluateReport | None) -> Iterator[CheckRow]:
    for finding in verify.findings:
        yield CheckRow(f"gate/{finding.rule}", finding)
    for verdict in verify.artefacts.values():
        yield CheckRow(f"gate/verify/{verdict.artefact}", _verify_finding(verdict))
    if evaluate is None:
        return
    for name, loss in evaluate.losses.items():
        last = loss.findings[-1]  # the loss itself
        found = [f for f in loss.findings if f.outcome is loss.outcome]
        message = "; ".join(finding.message for finding in found[:SHOWN] if finding.message)
        outcome = Finding(last.rule, loss.outcome, message, last.value, last.limit, last.unit)
        yield CheckRow(f"gate/evaluate/{name}", outcome)
    for entry in evaluate.skipped:
        yield CheckRow(f"gate/evaluate/{entry.artefact}", skipped("runs", entry.reason, entry.kind))


def _verify_finding(verdict: ArtefactVerdict) -> Finding:
    found = [f for f in verdict.findings if f.outcome is verdict.outcome]
    if verdict.outcome is Outcome.SKIPPED:
        return found[0]
    value = None if verdict.comparison is None else verdict.comparison.sqnr_db
    shown = [finding.message for finding in found[:SHOWN]]
    if len(found) > SHOWN:
        shown.append(f"and {len(found) - SHOWN} more")
    message = "; ".join(shown) if verdict.outcome is not Outcome.PASS else ""
    return Finding("SQNR", verdict.outcome, message, value, verdict.limit, "dB")


# --- baseline --------------------------------------------------------------------------------


def _require_same(baseline: Baseline, now: Baseline) -> None:
    pairs = [
        ("another model", baseline.model, now.model),
        ("other weights", baseline.weights_sha256, now.weights_sha256),
        ("other images to verify on", baseline.samples_sha256, now.samples_sha256),
        ("another reference", baseline.against, now.against),
    ]
    if baseline.evaluation and now.evaluation:
        pairs += [
            ("another evaluation set", baseline.evaluation.sha256, now.evaluation.sha256),
            (
                "another number of images that can be read",
                str(baseline.evaluation.images),
                str(now.evaluation.images),
            ),
        ]
    for what, then, here in pairs:
        if then != here:
            short = [text[:12] if len(text) == DIGEST else text for text in (then, here)]
            raise InputError(
                f"The baseline was measured with {what}: {short[0]}, and now {short[1]}.",
                "Give the same ones, or write the baseline anew with --update.",
            )


def _skip_kinds(verify: VerifyReport) -> dict[str, str]:
    """Return the kind of skip of each artifact that was not run."""
    skips = [(v.artefact, f) for v in verify.artefacts.values() for f in v.findings if f.skip]
    return {name: finding.skip for name, finding in skips}


def _baseline_rows(
    baseline: Baseline, measured: Baseline, kinds: Mapping[str, str]
) -> Iterator[CheckRow]:
    for name, old in baseline.artefacts.items():
        now = measured.artefacts.get(name)
        if now is None:
            message = "the baseline has this artifact and the bundle lacks it"
            yield CheckRow(f"baseline/{name}", failed("artifact", message))
            continue
        yield from _sqnr_rows(name, old, now, kinds.get(name, ""))
        if old.accuracy is not None:
            images = baseline.evaluation.images if baseline.evaluation else 0
            yield from _accuracy_rows(name, old, now, images, kinds.get(name, "accuracy"))
        if old.speed is not None:
            speed = _speed(old, now, kinds.get(name, "speed"))
            yield CheckRow(f"baseline/{name}/speed", speed, old.speed.ratio)


def _sqnr_rows(
    name: str, old: ArtefactFigures, now: ArtefactFigures, kind: str
) -> Iterator[CheckRow]:
    if old.sqnr_db is None:
        return
    row = f"baseline/{name}/SQNR"
    here, there = (f"{f.runner}, {f.numeric_class}" for f in (now, old))
    if now.sqnr_db is None or here != there:
        why = "it was not run here" if now.sqnr_db is None else f"run by {here}"
        message = f"{why}; the baseline is of {there}"
        yield CheckRow(row, skipped("SQNR", message, kind or "runtimes"), old.sqnr_db)
        return
    limit = Limit(old.sqnr_db - BELOW_RECORD_DB, f"baseline minus {BELOW_RECORD_DB:g}")
    yield CheckRow(row, at_least("SQNR", now.sqnr_db, limit), old.sqnr_db)
    slack = MODULE_SLACK_DB[old.numeric_class]
    drops = {m: then - now.modules[m] for m, then in old.modules.items() if m in now.modules}
    if drops:
        worst = max(drops, key=lambda module: drops[module])
        limit = Limit(old.modules[worst] - slack, f"baseline minus {slack:g}")
        found = at_least("modules", now.modules[worst], limit, where=f"{worst}: ")
        yield CheckRow(f"baseline/{name}/modules", found, old.modules[worst])


def _accuracy_rows(
    name: str, old: ArtefactFigures, now: ArtefactFigures, images: int, kind: str
) -> Iterator[CheckRow]:
    then, here = old.accuracy, now.accuracy
    slack = chance_changes(images)
    for figure, label in (("top1", "top-1"), ("top5", "top-5"), ("f1", "F1")):
        before = getattr(then, figure)
        if before is None:
            continue
        share = before if figure == "f1" else before / images
        row = f"baseline/{name}/{label}"
        after = getattr(here, figure) if here is not None else None
        if after is None:
            why = "the baseline has it, and this run measured no accuracy of this artifact"
            yield CheckRow(row, skipped(label, why, kind), 100 * share)
            continue
        value = after if figure == "f1" else after / images
        origin = f"baseline minus {slack} of {images} images, which chance may change"
        limit = Limit(100 * (share - slack / images), origin)
        yield CheckRow(row, at_least(label, 100 * value, limit, "%"), 100 * share)


def _speed(old: ArtefactFigures, now: ArtefactFigures, kind: str) -> Finding:
    """Return whether the median ratio fell by more than the slack, as its interval tells."""
    then, here = old.speed, now.speed
    if then is None or here is None:
        why = "the baseline has it, and this run did not measure it: add --speed"
        return skipped("speed", why, kind)
    least, low, high = 1 - SPEED_SLACK, here.low / then.high, here.high / then.low
    origin = f"baseline minus {100 * SPEED_SLACK:g} %"
    limit = Limit(then.ratio * least, origin)
    said = f"{100 * low:.0f} to {100 * high:.0f} % of the baseline's ratio"
    outcome = Outcome.INCONCLUSIVE
    if low >= least:
        outcome = Outcome.PASS
    elif high < least:
        outcome = Outcome.FAIL
    else:
        said += ": a quieter machine would decide"
    return Finding("speed", outcome, said, here.ratio, limit, "x")
