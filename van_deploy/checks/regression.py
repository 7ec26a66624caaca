"""Regression check of a bundle against its gates and a baseline.

A baseline has the values that were measured on an accepted bundle; it is committed next to the
recipe.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from van_deploy.bundle import Bundle
from van_deploy.checks import gates
from van_deploy.checks.evaluate import EvaluateReport
from van_deploy.checks.gates import Finding, Limit, Outcome, skipped_finding
from van_deploy.checks.golden import Samples
from van_deploy.checks.outputs import inputs_for, instruction_set, open_artifact
from van_deploy.checks.verify import VerifyReport
from van_deploy.config import RunnerSettings
from van_deploy.errors import InputError
from van_deploy.files import content_key
from van_deploy.intervals import median_interval
from van_deploy.schema import Count, Schema, Text, VersionedSchema

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan

UPDATE_REMEDY = "Write one with --update, review it, and commit it."
MUST_MATCH = {
    "model": "another model",
    "weights_sha256": "other weights",
    "samples_sha256": "other images to verify on",
    "reference_sha256": "other reference outputs or class names",
    "against": "another reference",
    "evaluation_sha256": "another evaluation set",
    "evaluation_images": "another number of readable images",
}
MAX_DB = 300.0  # written for an infinite SQNR
WARMUP_ROUNDS, ROUNDS = 2, (25, 200)  # minimum, and maximum while the interval is too wide


class Measurement(Schema):
    """Measured value of one artifact.

    ``SQNR`` in dB; ``top-1``, ``top-5`` and ``F1`` in percent; ``speed`` as the ratio of the
    original network's time to the artifact's, the median of paired rounds: above 1 is faster.

    Attributes:
        value: the value.
        interval: 95 % interval of a speed.
        runner: runner and numeric class of an SQNR.
        instruction_set: of the CPU, where the SQNR depends on it.
    """

    value: float
    interval: tuple[PositiveFloat, PositiveFloat] | None = None
    runner: Text = ""
    instruction_set: Text = ""


class Baseline(VersionedSchema):
    """Accepted values of a bundle.

    Attributes:
        model: name of the model.
        weights_sha256: digest of its weights.
        samples_sha256: digest of the images that the artifacts were verified on.
        reference_sha256: digest of the reference's logits on them, rounded to 3 decimals, and of
            the class names.
        against: reference of the verification.
        evaluation_sha256: digest of the labelled images' names, contents and labels; "" without
            evaluation.
        evaluation_images: number of readable images.
        artifacts: values by artifact and rule.
    """

    schema_: Literal["van-deploy/baseline/5"] = Field("van-deploy/baseline/5", alias="schema")
    model: Text
    weights_sha256: Text
    samples_sha256: Text
    reference_sha256: Text
    against: Text
    evaluation_sha256: Text = ""
    evaluation_images: Count = 0
    artifacts: dict[Text, dict[Text, Measurement]]


def baseline_from(
    bundle: Bundle,
    samples: Samples,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: Mapping[str, Measurement],
) -> Baseline:
    """Return a baseline with the measured values."""
    artifacts: dict[str, dict[str, Measurement]] = {}
    # In float64 another processor changes later decimals only.
    logits = (samples.logits.round(3) + 0.0).tolist()  # without negative zeros
    reference = {"logits": logits, "class names": bundle.manifest.class_names}
    for name, verdict in verify.artifacts.items():
        values = artifacts.setdefault(name, {})
        if verdict.comparison is not None:
            sqnr = max(-MAX_DB, min(MAX_DB, round(verdict.comparison.sqnr_db, 3)))
            values["SQNR"] = Measurement(
                value=sqnr,
                runner=f"{verdict.runner}, {verdict.numeric}",
                instruction_set=instruction_set(verdict.runner, verdict.numeric),
            )
        if evaluate is not None and (accuracy := evaluate.accuracy.get(name)) is not None:
            # Rounded, so that equal shares are equal numbers.
            metric = accuracy.metric.partition(" ")[0]
            values[metric] = Measurement(value=round(100 * accuracy.top1, 9))
            if accuracy.top5 is not None:
                values["top-5"] = Measurement(value=round(100 * accuracy.top5, 9))
        if name in speed:
            values["speed"] = speed[name]
    return Baseline(
        schema="van-deploy/baseline/5",
        model=bundle.name,
        weights_sha256=bundle.manifest.weights.sha256,
        samples_sha256=hashlib.sha256(samples.inputs.tobytes()).hexdigest(),
        reference_sha256=content_key(reference),
        against=verify.against,
        evaluation_sha256="" if evaluate is None else evaluate.dataset_sha256,
        evaluation_images=0 if evaluate is None else evaluate.count,
        artifacts=artifacts,
    )


# --- speed -----------------------------------------------------------------------------------


def speed_ratios(
    bundle: Bundle, loaded: LoadedVan, samples: Samples, settings: RunnerSettings
) -> dict[str, Measurement]:
    """Return the ratio of PyTorch's time to each artifact's, at the bundle's optimal batch.

    For the gate only, because only ratios within one run on one machine can be compared between
    runs; use ``bench`` for benchmarks. Each runner has one thread; artifacts that cannot run here
    are left out.
    """
    from van_deploy.runners.pytorch import TorchRunner, single_torch_thread

    rows, ratios = np.arange(bundle.manifest.batch.opt) % len(samples), {}
    with single_torch_thread():
        for name in bundle.artifacts:
            artifact = open_artifact(bundle, name, settings, 1, spin=False)
            if isinstance(artifact, Finding):
                continue
            with artifact as network, TorchRunner(loaded.model) as original:
                inputs = inputs_for(network, samples, rows)
                slow = partial(original.run, samples.inputs[rows])
                ratios[name] = paired_ratio(slow, partial(network.run, inputs))
    return ratios


def paired_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> Measurement:
    """Return the median ratio of the time of ``slow`` to that of ``fast``, over paired rounds.

    Each round times both calls, one directly after the other, so that load on the machine affects
    both. Their order alternates because of the caches. Rounds continue until the interval of the
    median is within :data:`~gates.SPEED_INTERVAL_WIDTH`, or the maximum number is reached.
    """
    ratios: list[float] = []
    low, high, middle = 0.0, 1.0, 0.0
    for number in range(-WARMUP_ROUNDS, ROUNDS[1]):
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
    """One row of the check.

    Attributes:
        name: name of the row, such as ``gate/verify/fp16`` or ``baseline/int8/top-1``.
        finding: result.
        baseline: value in the baseline, or None.
    """

    name: str
    finding: Finding
    baseline: float | None = None


@dataclass(frozen=True)
class CheckReport(gates.GateReport):
    """Result of a regression check.

    Attributes:
        model: name of the model.
        rows: all gates and all values of the baseline.
        new: artifacts that are not in the baseline.
        images: description of the images.
        allowed: the user's allow options.
        measured: a baseline with the values measured in this run.
        schema: schema of the document.
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
        """Number of rows by outcome."""
        outcomes = [row.finding.outcome for row in self.rows]
        return {outcome.value: outcomes.count(outcome) for outcome in Outcome}

    def named_findings(self) -> list[tuple[str, Finding]]:
        """Return the name and finding of each row."""
        return [(row.name, row.finding) for row in self.rows]


def compare_with_baseline(
    now: Baseline, then: Baseline | None, verify: VerifyReport, evaluate: EvaluateReport | None
) -> CheckReport:
    """Return all gates, and all values compared with the baseline.

    Args:
        now: values measured in this run.
        then: the baseline; None while a new one is written.
        verify: report of the verification.
        evaluate: report of the evaluation, if there were labelled images.

    Raises:
        InputError: the baseline has another model, other weights, or other images.
    """
    rows, new = [CheckRow(f"gate/{f.rule}", f) for f in verify.findings], tuple[str, ...]()
    for name, verdict in verify.artifacts.items():
        value = None if verdict.comparison is None else verdict.comparison.sqnr_db
        outcome, skip = (verdict.outcome, verdict.reason), verdict.findings[0].skip
        finding = Finding("SQNR", *outcome, value, verdict.limit, "dB", skip)
        rows.append(CheckRow(f"gate/verify/{name}", finding))
    if evaluate is not None:
        for name, loss in evaluate.losses.items():
            finding = replace(loss.findings[-1], outcome=loss.outcome, message=loss.reason)
            rows.append(CheckRow(f"gate/evaluate/{name}", finding))
        rows += [CheckRow(f"gate/evaluate/{name}", one) for name, one in evaluate.skipped.items()]
    if then is not None:
        evaluated = then.evaluation_sha256 and now.evaluation_sha256
        for name, difference in MUST_MATCH.items():
            before, after = (str(getattr(baseline, name)) for baseline in (then, now))
            if before != after and (evaluated or not name.startswith("evaluation")):
                part = slice(12 if name.endswith("sha256") else None)
                raise InputError(
                    f"The baseline was measured with {difference}: {before[part]}, this run has "
                    f"{after[part]}.",
                    "Use those of the baseline, or write a new baseline with --update.",
                )
        kinds = {name: finding.skip for name, finding in verify.named_findings() if finding.skip}
        for name, values in then.artifacts.items():
            if name not in now.artifacts:
                missing = "this artifact is in the baseline and not in the bundle"
                rows.append(CheckRow(f"baseline/{name}", gates.pass_or_fail("artifact", missing)))
                continue
            floor, kind = verify.artifacts[name].limit, kinds.get(name, "")
            for rule, old in values.items():
                current, images = now.artifacts[name].get(rule), now.evaluation_images
                finding = _compare_value(rule, old, current, images, floor, kind)
                rows.append(CheckRow(f"baseline/{name}/{rule}", finding, old.value))
        new = tuple(name for name in now.artifacts if name not in then.artifacts)
    return CheckReport(now.model, tuple(rows), new, verify.images, verify.allowed, now)


def _compare_value(
    rule: str,
    then: Measurement,
    now: Measurement | None,
    images: int,
    floor: Limit | None,
    kind: str,
) -> Finding:
    """Compare a value with the baseline.

    On a CPU with another instruction set the SQNR of correct artifacts differs by more than the
    margin of a baseline: there the artifact's own limit applies.

    Args:
        rule: name of the value.
        then: value in the baseline.
        now: value of this run; None if it was not measured.
        images: size of the evaluation set.
        floor: the artifact's own limit on the SQNR.
        kind: kind of skip, if the artifact was not run.
    """
    if rule == "SQNR" and (now is None or now.runner != then.runner):
        runner = "the artifact was not run" if now is None else f"run by {now.runner}"
        message = f"{runner}; the baseline was measured with {then.runner}"
        return skipped_finding(rule, message, kind or "runtimes")
    if now is None:
        missing = "speed" if rule == "speed" else "accuracy"
        message = f"in the baseline, but this run did not measure this artifact's {missing}"
        option = ": add --speed" if rule == "speed" else ""
        return skipped_finding(rule, message + option, kind or missing)
    least, drop = 1 - gates.SPEED_TOLERANCE, gates.RECORD_MARGIN_DB
    if rule == "speed":
        before, after = (one.interval or (one.value, one.value) for one in (then, now))
        low, high = (a / max(b, 1e-9) for a, b in zip(after, reversed(before), strict=True))
        limit = Limit(then.value * least, f"baseline minus {100 * gates.SPEED_TOLERANCE:g} %")
        message = f"{100 * low:.0f} to {100 * high:.0f} % of the baseline's ratio"
        outcome = Outcome.PASS if low >= least else Outcome.FAIL
        if low < least <= high:
            outcome, message = Outcome.INCONCLUSIVE, f"{message}: measure again on an idle machine"
        return Finding(rule, outcome, message, now.value, limit, "x")
    if rule == "SQNR":
        limit = Limit(then.value - drop, f"baseline minus {drop:g}")
        if floor is not None and now.instruction_set != then.instruction_set:
            limit = replace(floor, origin=f"{floor.origin}; the baseline is of another processor")
        return gates.check_minimum(rule, now.value, limit)
    slack = gates.chance_label_changes(images)
    origin = f"baseline minus {slack} of {images} images, which may change by chance"
    fewest = round(then.value - 100 * slack / max(images, 1), 9)
    return gates.check_minimum(rule, now.value, Limit(fewest, origin), "%")
