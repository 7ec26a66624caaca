"""A bundle judged as it was asked for: what it is compared with found, then the checks run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.config import (
    CheckSettings,
    DriftSettings,
    EvaluationSettings,
    GateSettings,
    VerifySettings,
)
from van_deploy.recipe import recipe_named
from van_deploy.runners.original import original_network
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.checks.drift import DriftReport
    from van_deploy.checks.evaluate import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.samples import Samples
    from van_deploy.checks.verdicts import VerifyReport
    from van_deploy.model.checkpoint import LoadedVan


def verify(bundle: Bundle, asked: VerifySettings, progress: Progress | None) -> VerifyReport:
    """Return what is found of each artifact (:func:`~van_deploy.checks.verify.verify_bundle`)."""
    from van_deploy.checks.verify import verify_bundle

    say, gates = progress or _silent, _gates(asked.recipe)
    loaded, samples = _given(bundle, asked, say)
    return verify_bundle(bundle, samples, asked, loaded=loaded, gates=gates, progress=say)


def evaluate(
    bundle: Bundle, asked: EvaluationSettings, progress: Progress | None
) -> EvaluateReport:
    """Return the accuracy, as :func:`~van_deploy.checks.evaluate.evaluate_bundle`."""
    from van_deploy.checks.evaluate import evaluate_bundle

    say, gates = progress or _silent, _gates(asked.recipe)
    loaded = _original(bundle, asked.weights, say)
    return evaluate_bundle(bundle, loaded, asked, gates=gates, progress=_counting(say))


def drift(bundle: Bundle, asked: DriftSettings, progress: Progress | None) -> DriftReport:
    """Return where the artifacts drift, as :func:`~van_deploy.checks.drift.drift_of_bundle`."""
    from van_deploy.checks.drift import drift_of_bundle

    say = progress or _silent
    loaded, samples = _given(bundle, asked, say)
    few = samples.first(asked.count)
    return drift_of_bundle(bundle, few, asked, loaded=loaded, progress=say)


def check(
    bundle: Bundle, baseline: Path, asked: CheckSettings, update: bool, progress: Progress | None
) -> CheckReport:
    """Return the bundle against its gates and a baseline, which is written with ``update``."""
    from van_deploy.checks.baseline import read_baseline, write_baseline
    from van_deploy.checks.evaluate import evaluate_bundle
    from van_deploy.checks.opened import common
    from van_deploy.checks.regression import compare_with_baseline
    from van_deploy.checks.speed import speed_ratios
    from van_deploy.checks.verify import verify_bundle

    say, gates = progress or _silent, _gates(asked.recipe)
    known = None if update else read_baseline(baseline)
    loaded, samples = _given(bundle, asked, say)
    same = VerifySettings(**common(asked))
    verified = verify_bundle(bundle, samples, same, loaded=loaded, gates=gates, progress=say)
    if loaded is None and (asked.evaluate is not None or asked.speed):
        loaded = _original(bundle, asked.weights, say)
    evaluated, ratios = None, {}
    if asked.evaluate is not None and loaded is not None:
        table = EvaluationSettings(
            **common(asked),
            images=asked.evaluate,
            labels=asked.labels,
            class_order=asked.class_order,
        )
        evaluated = evaluate_bundle(bundle, loaded, table, gates=gates, progress=_counting(say))
    if asked.speed and loaded is not None:
        say("Measuring ratios of speed")
        ratios = speed_ratios(bundle, loaded, samples, asked)
    report = compare_with_baseline(bundle, samples, known, verified, evaluated, ratios)
    if update and report:
        write_baseline(baseline, report.measured)
    return report


def _given(
    bundle: Bundle, asked: VerifySettings | DriftSettings | CheckSettings, say: Progress
) -> tuple[LoadedVan | None, Samples]:
    """Return the original network, where it is asked for, and what is judged on."""
    from van_deploy.checks.golden import GOLDEN_IMAGES
    from van_deploy.checks.reference import samples_for

    loaded = _original(bundle, asked.weights, say) if asked.against == "weights" else None
    return loaded, samples_for(bundle, loaded, asked.images, asked.count or GOLDEN_IMAGES)


def _original(bundle: Bundle, weights: Path | None, say: Progress) -> LoadedVan:
    """Return the network a bundle was made from.

    Raises:
        MissingDependency: PyTorch is not installed.
        BundleError: the weights have moved, have changed, or are not this bundle's.
    """
    say("Loading the original network")
    return original_network(bundle, weights)


def _gates(recipe: str) -> GateSettings | None:
    """Return the gates of the recipe called that, or None for the defaults."""
    return recipe_named(recipe).gates if recipe else None


def _counting(say: Progress) -> Callable[[int, int], None]:
    return lambda done, total: say(f"{done} of {total} images", done, total)


def _silent(text: str, done: int = 0, total: int | None = None, /) -> None:
    """Say nothing."""
