"""What was measured when somebody said it was good: a document to commit beside the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate import EvaluateReport
from van_deploy.checks.samples import Samples
from van_deploy.checks.verdicts import VerifyReport
from van_deploy.errors import InputError
from van_deploy.files import write_atomic
from van_deploy.schema import Count, Schema, Text, Versioned, read_versioned

MOST_DB = 300.0  # what "no error at all" is written as
ANEW = "Write it anew with --update."

Ratio = Annotated[float, Field(gt=0)]


class EvaluationSet(Schema):
    """The labelled images that accuracy was measured on."""

    sha256: Text
    """Of their names, contents and labels."""
    description: Text
    images: Count
    """How many could be read."""


class AccuracyFigures(Schema):
    """How much of the evaluation set an artifact gets right."""

    top1: Count | None = None
    """Images with the right top-1 class or decision; None for many labels."""
    top5: Count | None = None
    """Images with the right class among the first five; None with five classes or fewer."""
    f1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Micro F1 of many labels."""


class SpeedFigures(Schema):
    """The original network's time over an artifact's: above 1 the artifact is faster."""

    ratio: Ratio
    """The median of paired rounds."""
    low: Ratio
    """Lower end of the 95 % interval of that median."""
    high: Ratio
    """Its upper end."""


class ArtefactFigures(Schema):
    """What was measured of one artifact."""

    runner: Text
    numeric_class: Text
    sqnr_db: float | None = None
    """Of its logits; None where it was not run."""
    modules: dict[Text, float] = Field(default_factory=dict)
    """Isolated SQNR of each module, in dB."""
    accuracy: AccuracyFigures | None = None
    speed: SpeedFigures | None = None


class Baseline(Versioned):
    """Figures that were good once."""

    schema_: Literal["van-deploy/baseline/2"] = Field("van-deploy/baseline/2", alias="schema")
    model: Text
    weights_sha256: Text
    samples_sha256: Text
    """Of the images that the artifacts were verified on."""
    samples: Text
    """What they were."""
    against: Text
    """What artifacts and modules were compared with."""
    evaluation: EvaluationSet | None = None
    artefacts: dict[Text, ArtefactFigures]


def baseline_from(
    bundle: Bundle,
    samples: Samples,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: Mapping[str, SpeedFigures],
) -> Baseline:
    """Return the baseline that says what was measured is good."""
    evaluation, accuracy = None, {}
    if evaluate is not None:
        evaluation = EvaluationSet(
            sha256=evaluate.dataset_sha256, description=evaluate.images, images=evaluate.count
        )
        for name, found in evaluate.accuracy.items():
            top5 = None if found.top5 is None else round(found.top5 * found.images)
            accuracy[name] = AccuracyFigures(top1=round(found.top1 * found.images), top5=top5)
            if found.metric != "top-1":
                accuracy[name] = AccuracyFigures(f1=found.top1)
    figures = {
        name: ArtefactFigures(
            runner=verdict.runner,
            numeric_class=verdict.numeric,
            sqnr_db=None if verdict.comparison is None else _db(verdict.comparison.sqnr_db),
            modules={row.name: _db(row.level) for row in verdict.modules},
            accuracy=accuracy.get(name),
            speed=speed.get(name),
        )
        for name, verdict in verify.artefacts.items()
    }
    return Baseline(
        schema="van-deploy/baseline/2",
        model=bundle.name,
        weights_sha256=bundle.manifest.weights.sha256,
        samples_sha256=hashlib.sha256(samples.inputs.tobytes()).hexdigest(),
        samples=samples.description,
        against=verify.against,
        evaluation=evaluation,
        artefacts=figures,
    )


def _db(value: float) -> float:
    """Return a figure in dB that JSON can hold."""
    return max(-MOST_DB, min(MOST_DB, round(value, 3)))


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline as JSON, one figure a line, so that a change shows in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, baseline.text())


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        InputError: it cannot be read, is of another version, or is none.
    """
    if not path.exists():
        raise InputError(
            f"There is no baseline at '{path}'.",
            "Make one with --update, look at it, and commit it.",
        )
    return read_versioned(Baseline, path, "baseline", InputError, ANEW)
