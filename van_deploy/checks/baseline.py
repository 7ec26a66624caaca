"""What was measured when somebody said it was good, and what is worse now.

A baseline is a list of figures with a name, a direction and a slack. It is
committed beside the recipe; the check measures the same figures on the same
images and names every row that got worse by more than its slack.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle, write_atomic
from van_deploy.checks.evaluate import EvaluateReport
from van_deploy.checks.pictures import Pictures
from van_deploy.checks.verify import ArtefactVerdict, VerifyReport
from van_deploy.errors import InputError

__all__ = [
    "SCHEMA",
    "Baseline",
    "CheckReport",
    "CheckRow",
    "Figure",
    "baseline_of",
    "compare_with_baseline",
    "figures_from_evaluate",
    "figures_from_speed",
    "figures_from_verify",
    "images_digest",
    "read_baseline",
    "write_baseline",
]

SCHEMA = "van-deploy/baseline/1"

SQNR_SLACK_DB: Mapping[str, float] = {"fp32": 6.0, "fp16": 2.0, "int8": 1.0}
"""Float32's own noise depends on the order in which a processor adds; rounding to
fewer bits hides that, and then the same file gives nearly the same figure anywhere."""

MODULE_SLACK_DB: Mapping[str, float] = {"fp32": 15.0, "fp16": 3.0, "int8": 2.0}
"""One module's figure moves more than the logits'; a scale twice too large costs 6 dB."""

SPEED_SLACK = 0.4  # of the ratio: a CI machine has neighbours
MOST_FINITE_DB = 300.0  # what "no error at all" is written as

PASSED, FAILED, SKIPPED, NEW = "passed", "failed", "skipped", "new"


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: such as ``verify/fp16/sqnr_db``.
        value: the figure.
        better: ``higher`` or ``lower``.
        slack: how much worse it may get, in its own unit.
    """

    name: str
    value: float
    better: str
    slack: float

    def worse_by(self, now: float) -> float:
        """Return how much worse ``now`` is; negative where it is better."""
        return self.value - now if self.better == "higher" else now - self.value


@dataclass(frozen=True)
class Baseline:
    """Figures that were good once.

    Attributes:
        model: whose they are.
        weights_sha256: of the weights.
        images_sha256: of the pixels that were verified on.
        images: what they were.
        figures: by name.
    """

    model: str
    weights_sha256: str
    images_sha256: str
    images: str
    figures: Mapping[str, Figure]


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
            "schema": "van-deploy/check/1",
            "model": self.model,
            "passed": self.passed,
            "allow_skip": self.allow_skip,
            "images": self.images,
            "counts": {o: len(self.having(o)) for o in (PASSED, FAILED, SKIPPED, NEW)},
            "rows": [asdict(row) for row in self.rows],
        }


def figures_from_verify(report: VerifyReport) -> Iterator[Figure]:
    """Yield what of a verification is compared: logits, flips and every module listed."""
    for verdict in report.artefacts:
        if verdict.comparison is None:
            continue
        name, figures = f"verify/{verdict.artefact}", verdict.comparison
        yield Figure(
            f"{name}/sqnr_db", _db(figures.sqnr_db), "higher", SQNR_SLACK_DB[verdict.precision]
        )
        one_image = 1 / figures.images
        yield Figure(f"{name}/top1_agreement", figures.top1_agreement, "higher", one_image)
        yield Figure(f"{name}/top5_agreement", figures.top5_agreement, "higher", one_image)
        faults = sum(flip.fault for flip in verdict.flips)
        yield Figure(f"{name}/flips", float(faults), "lower", 0.0)
        slack = MODULE_SLACK_DB[verdict.precision]
        for row in verdict.modules:
            if row.added_db is not None:
                added = _db(row.added_db)
                yield Figure(
                    f"drift/{verdict.artefact}/{row.name}/added_db", added, "higher", slack
                )


def figures_from_evaluate(report: EvaluateReport) -> Iterator[Figure]:
    """Yield top-1 and top-5 of every network, in points, and each artefact's drop."""
    for name, accuracy in report.accuracies.items():
        allowed = report.drifts[name].top1_drop_allowed if name in report.drifts else 0.1
        yield Figure(f"evaluate/{name}/top1", 100 * accuracy.top1, "higher", allowed)
        yield Figure(f"evaluate/{name}/top5", 100 * accuracy.top5, "higher", allowed)


def figures_from_speed(ratios: Mapping[str, float]) -> Iterator[Figure]:
    """Yield how many times faster than PyTorch each artefact is: times compare nowhere else."""
    for name, ratio in ratios.items():
        yield Figure(f"speed/{name}/ratio", ratio, "higher", SPEED_SLACK * ratio)


def baseline_of(bundle: Bundle, pictures: Pictures, figures: Sequence[Figure]) -> Baseline:
    """Return the baseline that says ``figures`` are good."""
    return Baseline(
        model=bundle.name,
        weights_sha256=bundle.manifest["weights"]["sha256"],
        images_sha256=images_digest(pictures),
        images=pictures.described,
        figures={figure.name: figure for figure in figures},
    )


def images_digest(pictures: Pictures) -> str:
    """Return the SHA-256 of the pixels."""
    return hashlib.sha256(pictures.pixels.tobytes()).hexdigest()


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write a baseline as JSON, one figure a line, so that a change shows in a diff."""
    about = {key: value for key, value in vars(baseline).items() if key != "figures"}
    head = json.dumps({"schema": SCHEMA, **about}, indent=2)[:-2]
    lines = [
        f"    {json.dumps(name)}: "
        + json.dumps({"value": f.value, "better": f.better, "slack": f.slack})
        for name, f in sorted(baseline.figures.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(lines)
    write_atomic(path, f'{head},\n  "figures": {{\n{body}\n  }}\n}}\n')


def read_baseline(path: Path) -> Baseline:
    """Return the baseline in a file.

    Raises:
        InputError: it cannot be read or is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["schema"] != SCHEMA:
            raise InputError(
                f"'{path}' has schema '{values['schema']}'; this version reads '{SCHEMA}'.",
                "Write it anew with --update.",
            )
        figures = {
            name: Figure(name, float(f["value"]), str(f["better"]), float(f["slack"]))
            for name, f in values["figures"].items()
        }
        return Baseline(
            model=str(values["model"]),
            weights_sha256=str(values["weights_sha256"]),
            images_sha256=str(values["images_sha256"]),
            images=str(values["images"]),
            figures=figures,
        )
    except FileNotFoundError:
        raise InputError(
            f"There is no baseline at '{path}'.",
            "Make one with --update, look at it, and commit it.",
        ) from None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is no baseline: {type(error).__name__}: {error}.",
            "Write it anew with --update.",
        ) from error


def compare_with_baseline(
    bundle: Bundle,
    pictures: Pictures,
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
    return CheckReport(bundle.name, tuple(rows), allow_skip, pictures.described)


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
        failed = not worse <= old.slack  # NaN fails
        message = f"worse by {worse:.4g}, {old.slack:.4g} allowed" if failed else ""
        yield CheckRow(name, FAILED if failed else PASSED, now[name].value, old.value, message)
    for name, figure in now.items():
        if name not in known:
            yield CheckRow(name, NEW, figure.value, None, "not in the baseline")


def _require_same(bundle: Bundle, pictures: Pictures, baseline: Baseline) -> None:
    weights = bundle.manifest["weights"]["sha256"]
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


def _db(value: float) -> float:
    """Return a figure in dB that JSON can hold."""
    return min(max(value, -MOST_FINITE_DB), MOST_FINITE_DB) if not math.isnan(value) else value
