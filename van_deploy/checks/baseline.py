"""What was measured when somebody said it was good: a document to commit beside the recipe."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.samples import Samples
from van_deploy.checks.speed import SpeedRatio
from van_deploy.checks.verdicts import ArtefactVerdict, VerifyReport
from van_deploy.documents import json_from, text_from
from van_deploy.errors import InputError
from van_deploy.fields import Count, Text
from van_deploy.files import write_atomic
from van_deploy.metrics import Task
from van_deploy.schema import Schema, validated_json

__all__ = [
    "AccuracyFigures",
    "ArtefactFigures",
    "Baseline",
    "EvaluationSet",
    "SpeedFigures",
    "baseline_from",
    "read_baseline",
    "samples_digest",
    "write_baseline",
]

SCHEMA: Literal["van-deploy/baseline/2"] = "van-deploy/baseline/2"
MOST_DB = 300.0  # what "no error at all" is written as

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
    """Images with the right first class or decision; None for many labels."""
    top5: Count | None = None
    """Images with the right class among the first five; None with five classes or fewer."""
    f1: Annotated[float, Field(ge=0, le=1)] | None = None
    """Micro F1 of many labels."""


class SpeedFigures(Schema):
    """The original network's time over an artifact's."""

    ratio: Ratio
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


class Baseline(Schema):
    """Figures that were good once."""

    schema_: Literal["van-deploy/baseline/2"] = Field(SCHEMA, alias="schema")
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


def samples_digest(samples: Samples) -> str:
    """Return the SHA-256 of the network input."""
    return hashlib.sha256(samples.inputs.tobytes()).hexdigest()


def baseline_from(
    bundle: Bundle,
    samples: Samples,
    verify: VerifyReport,
    evaluate: EvaluateReport | None,
    speed: dict[str, SpeedRatio],
) -> Baseline:
    """Return the baseline that says what was measured is good."""
    evaluation = None
    if evaluate is not None:
        evaluation = EvaluationSet(
            sha256=evaluate.dataset_sha256, description=evaluate.images, images=evaluate.count
        )
    return Baseline(
        schema=SCHEMA,
        model=bundle.name,
        weights_sha256=bundle.manifest.weights.sha256,
        samples_sha256=samples_digest(samples),
        samples=samples.description,
        against=verify.against,
        evaluation=evaluation,
        artefacts={v.artefact: _figures(v, evaluate, speed) for v in verify.artefacts.values()},
    )


def _figures(
    verdict: ArtefactVerdict, evaluate: EvaluateReport | None, speed: dict[str, SpeedRatio]
) -> ArtefactFigures:
    measured = speed.get(verdict.artefact)
    return ArtefactFigures(
        runner=verdict.runner,
        numeric_class=verdict.numeric,
        sqnr_db=None if verdict.comparison is None else _db(verdict.comparison.sqnr_db),
        modules={row.name: _db(float(row.isolated_db or 0.0)) for row in verdict.modules},
        accuracy=_accuracy(verdict.artefact, evaluate),
        speed=None
        if measured is None
        else SpeedFigures(
            ratio=measured.ratio, low=measured.interval[0], high=measured.interval[1]
        ),
    )


def _accuracy(name: str, evaluate: EvaluateReport | None) -> AccuracyFigures | None:
    accuracy = None if evaluate is None else evaluate.accuracy.get(name)
    if evaluate is None or accuracy is None:
        return None
    if evaluate.task is Task.MULTI_LABEL:
        return AccuracyFigures(f1=accuracy.top1)
    top5 = None if accuracy.top5 is None else round(accuracy.top5 * accuracy.images)
    return AccuracyFigures(top1=round(accuracy.top1 * accuracy.images), top5=top5)


def _db(value: float) -> float:
    """Return a figure in dB that JSON can hold."""
    return max(-MOST_DB, min(MOST_DB, -MOST_DB if math.isnan(value) else round(value, 3)))


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline as JSON, one figure a line, so that a change shows in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = baseline.model_dump(mode="json", by_alias=True)
    write_atomic(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        InputError: it cannot be read, is of another version, or is none.
    """
    try:
        text = text_from(path)
        raw = json_from(text)
    except FileNotFoundError:
        raise InputError(
            f"There is no baseline at '{path}'.",
            "Make one with --update, look at it, and commit it.",
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}' is no baseline: {reason}.", _ANEW) from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, str) and schema != SCHEMA:
        raise InputError(f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.", _ANEW)
    return validated_json(
        Baseline, text, where=f"'{path}' is no baseline", error=InputError, remedy=_ANEW
    )


_ANEW = "Write it anew with --update."
