"""What of a bundle's reports is compared from one day to the next, with the room it has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.speed import SpeedRatio
from van_deploy.checks.verdicts import VerifyReport

__all__ = ["Figure", "figures_from_evaluate", "figures_from_speed", "figures_from_verify"]

SQNR_SLACK_DB: Mapping[str, float] = {"fp32": 6.0, "fp16": 2.0, "int8": 1.0}
"""Float32's own noise depends on the order in which a processor adds; rounding to
fewer bits hides that, and then the same file gives nearly the same figure anywhere."""

MODULE_SLACK_DB: Mapping[str, float] = {"fp32": 15.0, "fp16": 3.0, "int8": 2.0}
"""One module's figure moves more than the logits'; a scale twice too large costs 6 dB."""

SPEED_SLACK = 0.1
"""Of the ratio, and beside the spread that both runs measured in their own rounds."""

MOST_FINITE_DB = 300.0  # what "no error at all" is written as


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: such as ``verify/fp16/sqnr_db``.
        value: the figure.
        better: ``higher`` or ``lower``.
        slack: how much worse it may get, in its own unit.
        spread: how far single measurements of it were from the value, in the same unit.
    """

    name: str
    value: float
    better: str
    slack: float
    spread: float = 0.0

    def worse_by(self, now: float) -> float:
        """Return how much worse ``now`` is; negative where it is better."""
        return self.value - now if self.better == "higher" else now - self.value

    def room_for(self, now: Figure) -> float:
        """Return how much worse ``now`` may be: the slack, and what both runs may err."""
        return self.slack + self.spread + now.spread


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


def figures_from_speed(ratios: Mapping[str, SpeedRatio]) -> Iterator[Figure]:
    """Yield how many times faster than PyTorch each artefact is: times compare nowhere else."""
    for name, ratio in ratios.items():
        slack = SPEED_SLACK * ratio.ratio
        yield Figure(f"speed/{name}/ratio", ratio.ratio, "higher", slack, ratio.spread)


def _db(value: float) -> float:
    """Return a figure in dB that JSON can hold."""
    return min(max(value, -MOST_FINITE_DB), MOST_FINITE_DB) if not math.isnan(value) else value
