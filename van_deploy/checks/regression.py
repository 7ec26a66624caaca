"""A bundle against its gates and a baseline: every row, and whether it got worse.

A baseline is what was measured when somebody said it was good: a document to commit beside
the recipe.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat

from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.checks.evaluate import EvaluateReport
from van_deploy.checks.gates import Finding, Limit, Outcome, skipped_finding
from van_deploy.checks.golden import Samples
from van_deploy.checks.outputs import inputs_for, open_artifact
from van_deploy.checks.verify import VerifyReport
from van_deploy.config import RunnerSettings
from van_deploy.errors import InputError
from van_deploy.intervals import median_interval
from van_deploy.schema import Count, Schema, Text, VersionedSchema, read_document

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

ANEW = "Write one with --update, look at it, and commit it."
SAME = {
    "model": "another model",
    "weights_sha256": "other weights",
    "samples_sha256": "other images to verify on",
    "against": "another reference",
    "evaluation_sha256": "another evaluation set",
    "evaluation_images": "another number of images that can be read",
}
MOST_DB = 300.0  # what "no error at all" is written as
WARM_UPS = 2
ROUNDS = (25, 200)  # at least, and at most where the interval stays wide


class Measurement(Schema):
    """What was measured of one artifact.

    ``SQNR`` in dB, ``top-1``, ``top-5`` and ``F1`` in percent, ``speed`` as the original
    network's time over the artifact's, the median of paired rounds: above 1 it is faster.
    """

    value: float
    interval: tuple[PositiveFloat, PositiveFloat] | None = None
    """Of a speed, 95 %."""
    by: Text = ""
    """Runner and numeric class, which an SQNR depends on."""


class Baseline(VersionedSchema):
    """Figures that were good once."""

    schema_: Literal["van-deploy/baseline/4"] = Field("van-deploy/baseline/4", alias="schema")
    model: Text
    weights_sha256: Text
    samples_sha256: Text
    """Of the images that the artifacts were verified on."""
    against: Text
    """What artifacts were compared with."""
    evaluation_sha256: Text = ""
    """Of the labelled images' names, contents and labels; "" where there were none."""
    evaluation_images: Count = 0
    """How many of them could be read."""
    artifacts: dict[Text, dict[Text, Measurement]]


def baseline_from(
    bundle: Bundle,
    samples: Samples,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: Mapping[str, Measurement],
) -> Baseline:
    """Return the baseline that says what was measured is good."""
    figures: dict[str, dict[str, Measurement]] = {}
    for name, verdict in verify.artifacts.items():
        found = figures.setdefault(name, {})
        if verdict.comparison is not None:
            level = max(-MOST_DB, min(MOST_DB, round(verdict.comparison.sqnr_db, 3)))
            found["SQNR"] = Measurement(value=level, by=f"{verdict.runner}, {verdict.numeric}")
        if evaluate is not None and (accuracy := evaluate.accuracy.get(name)) is not None:
            # Rounded, so that a share is the same number however it was come by.
            metric = accuracy.metric.partition(" ")[0]
            found[metric] = Measurement(value=round(100 * accuracy.top1, 9))
            if accuracy.top5 is not None:
                found["top-5"] = Measurement(value=round(100 * accuracy.top5, 9))
        if name in speed:
            found["speed"] = speed[name]
    return Baseline(
        schema="van-deploy/baseline/4",
        model=bundle.name,
        weights_sha256=bundle.manifest.weights.sha256,
        samples_sha256=hashlib.sha256(samples.inputs.tobytes()).hexdigest(),
        against=verify.against,
        evaluation_sha256="" if evaluate is None else evaluate.dataset_sha256,
        evaluation_images=0 if evaluate is None else evaluate.count,
        artifacts=figures,
    )


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        InputError: it cannot be read, is of another version, or is none.
    """
    return read_document(Baseline, path, "baseline", InputError, ANEW)


# --- speed -----------------------------------------------------------------------------------


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, samples: Samples, asked: RunnerSettings
) -> dict[str, Measurement]:
    """Return PyTorch's time over each artifact's, at the bundle's optimal batch.

    For the gate only: a ratio within one run on one machine is all that can be compared between
    runs; ``bench`` measures properly. One thread each. What does not run here is left out.
    """
    from van_deploy.runners.pytorch import TorchRunner, single_torch_thread

    few, ratios = samples.first(bundle.manifest.batch.opt), {}
    with single_torch_thread():
        for name in bundle.artifacts:
            opened = open_artifact(bundle, name, asked, 1, spin=False)
            if isinstance(opened, Finding):
                continue
            with opened as network, TorchRunner(loaded.model) as original:
                given = inputs_for(network, few, slice(None))
                slow = partial(original.run, few.inputs)
                ratios[name] = paired_ratio(slow, partial(network.run, given))
    return ratios


def paired_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> Measurement:
    """Return how many times longer ``slow`` takes than ``fast``, over paired rounds.

    Each round times both, one right after the other, so that what slows the machine slows both.
    Who begins alternates, so that neither always runs in what the other left in the caches.
    Rounds continue until the median's interval is within :data:`~gates.SPEED_INTERVAL_WIDTH`, or
    the maximum number is reached.
    """
    ratios: list[float] = []
    low, high, middle = 0.0, 1.0, 0.0
    for number in range(-WARM_UPS, ROUNDS[1]):
        if number >= ROUNDS[0] and high - low <= 2 * gates.SPEED_INTERVAL_WIDTH * middle:
            break
        seconds = {}
        for call in (slow, fast) if number % 2 else (fast, slow):
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        if number >= 0:
            ratios.append(seconds[slow] / seconds[fast])
            (low, high), middle = median_interval(ratios), statistics.median(ratios)
    return Measurement(value=middle, interval=(low, high))


# --- the check -------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class CheckReport(gates.GateReport):
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
    allowed: gates.AllowOptions
    measured: Baseline = field(metadata={"json": False})
    schema: Literal["van-deploy/check/2"] = "van-deploy/check/2"

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each outcome."""
        outcomes = [row.finding.outcome for row in self.rows]
        return {outcome.value: outcomes.count(outcome) for outcome in Outcome}

    def named_findings(self) -> list[tuple[str, Finding]]:
        """Return the name of each row, and what was found."""
        return [(row.name, row.finding) for row in self.rows]


def compare_with_baseline(
    now: Baseline, then: Baseline | None, verify: VerifyReport, evaluate: EvaluateReport | None
) -> CheckReport:
    """Return every gate, and every figure against the baseline.

    Args:
        now: what was measured.
        then: what was good; None while a new one is being written.
        verify: what verifying found.
        evaluate: what evaluating found, if there were labelled images.

    Raises:
        InputError: the baseline is of another model, other weights, or other images.
    """
    rows, new = [CheckRow(f"gate/{f.rule}", f) for f in verify.findings], tuple[str, ...]()
    for name, verdict in verify.artifacts.items():
        value = None if verdict.comparison is None else verdict.comparison.sqnr_db
        said, skip = (verdict.outcome, verdict.reason), verdict.findings[0].skip
        whole = Finding("SQNR", *said, value, verdict.limit, "dB", skip)
        rows.append(CheckRow(f"gate/verify/{name}", whole))
    if evaluate is not None:
        for name, loss in evaluate.losses.items():
            itself = loss.findings[-1]
            whole = replace(itself, outcome=loss.outcome, message=loss.reason)
            rows.append(CheckRow(f"gate/evaluate/{name}", whole))
        not_run = evaluate.skipped.items()
        rows += [CheckRow(f"gate/evaluate/{name}", finding) for name, finding in not_run]
    if then is not None:
        evaluated = then.evaluation_sha256 and now.evaluation_sha256
        for name, what in SAME.items():
            before, here = (str(getattr(baseline, name)) for baseline in (then, now))
            if before != here and (evaluated or not name.startswith("evaluation")):
                shown = slice(12 if name.endswith("sha256") else None)
                raise InputError(
                    f"The baseline was measured with {what}: {before[shown]}, and now "
                    f"{here[shown]}.",
                    "Give the same ones, or write the baseline anew with --update.",
                )
        kinds = {name: finding.skip for name, finding in verify.named_findings() if finding.skip}
        for name, figures in then.artifacts.items():
            if name not in now.artifacts:
                lacks = "the baseline has this artifact and the bundle lacks it"
                rows.append(CheckRow(f"baseline/{name}", gates.pass_or_fail("artifact", lacks)))
                continue
            for rule, old in figures.items():
                new_one, images = now.artifacts[name].get(rule), then.evaluation_images
                found = _against(rule, old, new_one, images, kinds.get(name, ""))
                rows.append(CheckRow(f"baseline/{name}/{rule}", found, old.value))
        new = tuple(name for name in now.artifacts if name not in then.artifacts)
    return CheckReport(now.model, tuple(rows), new, verify.images, verify.allowed, now)


def _against(
    rule: str, then: Measurement, now: Measurement | None, images: int, kind: str
) -> Finding:
    """Return whether a figure is as good as the baseline's.

    Args:
        rule: what it is.
        then: the baseline's.
        now: of this run; None where it was not measured.
        images: of the evaluation set.
        kind: of skip, where the artifact was not run.
    """
    if rule == "SQNR" and (now is None or now.by != then.by):
        why = "it was not run here" if now is None else f"run by {now.by}"
        return skipped_finding(rule, f"{why}; the baseline is of {then.by}", kind or "runtimes")
    if now is None:
        own = "speed" if rule == "speed" else "accuracy"
        why = f"the baseline has it, and this run measured no {own} of this artifact"
        return skipped_finding(rule, f"{why}: add --speed" if rule == "speed" else why, kind or own)
    least, drop = 1 - gates.SPEED_TOLERANCE, gates.RECORD_MARGIN_DB
    if then.interval and now.interval:
        low, high = now.interval[0] / then.interval[1], now.interval[1] / then.interval[0]
        limit = Limit(then.value * least, f"baseline minus {100 * gates.SPEED_TOLERANCE:g} %")
        said = f"{100 * low:.0f} to {100 * high:.0f} % of the baseline's ratio"
        outcome = Outcome.PASS if low >= least else Outcome.FAIL
        if low < least <= high:
            outcome, said = Outcome.INCONCLUSIVE, f"{said}: a quieter machine would decide"
        return Finding(rule, outcome, said, now.value, limit, "x")
    if rule == "SQNR":
        return gates.check_minimum(
            rule, now.value, Limit(then.value - drop, f"baseline minus {drop:g}")
        )
    slack = gates.chance_label_changes(images)
    origin = f"baseline minus {slack} of {images} images, which chance may change"
    fewest = round(then.value - 100 * slack / max(images, 1), 9)
    return gates.check_minimum(rule, now.value, Limit(fewest, origin), "%")
