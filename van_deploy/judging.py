"""A bundle judged as it was asked for: what it is compared with found, then the checks run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy import config
from van_deploy.bundle import Bundle
from van_deploy.checks import regression
from van_deploy.checks.drift import DriftReport, drift_of_bundle
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import GOLDEN_IMAGES, Samples, samples_for
from van_deploy.checks.judging import common
from van_deploy.checks.verify import NO_RECIPE, VerifyReport, verify_bundle
from van_deploy.files import write_atomic
from van_deploy.recipe import recipe_named
from van_deploy.runners.network import original_network
from van_deploy.stopwatch import Progress

if TYPE_CHECKING:
    from van_deploy.model.checkpoint import LoadedVan


def verify(bundle: Bundle, asked: config.VerifySettings, say: Progress) -> VerifyReport:
    """Return what is found of each artifact (:func:`~van_deploy.checks.verify.verify_bundle`)."""
    gates = _gates(asked.recipe)
    loaded, samples = _given(bundle, asked, say)
    return verify_bundle(bundle, samples, asked, loaded, gates, say)


def evaluate(bundle: Bundle, asked: config.EvaluationSettings, say: Progress) -> EvaluateReport:
    """Return the accuracy, as :func:`~van_deploy.checks.evaluate.evaluate_bundle`."""
    gates = _gates(asked.recipe)
    return evaluate_bundle(bundle, _original(bundle, asked.weights, say), asked, gates, say)


def drift(bundle: Bundle, asked: config.DriftSettings, say: Progress) -> DriftReport:
    """Return where the artifacts drift, as :func:`~van_deploy.checks.drift.drift_of_bundle`."""
    loaded, samples = _given(bundle, asked, say)
    return drift_of_bundle(bundle, samples.first(asked.count), asked, loaded, say)


def check(
    bundle: Bundle, baseline: Path, asked: config.CheckSettings, update: bool, say: Progress
) -> regression.CheckReport:
    """Return the bundle against its gates and a baseline, which is written with ``update``."""
    gates = _gates(asked.recipe)
    known = None if update else regression.read_baseline(baseline)
    loaded, samples = _given(bundle, asked, say)
    same = config.VerifySettings(**common(asked))
    verified = verify_bundle(bundle, samples, same, loaded, gates, say)
    if asked.evaluate is not None or asked.speed:
        loaded = loaded or _original(bundle, asked.weights, say)
    evaluated, ratios = None, {}
    if asked.evaluate is not None and loaded is not None:
        table = {"images": asked.evaluate, "labels": asked.labels, **common(asked)}
        settings = config.EvaluationSettings(**table, class_order=asked.class_order)
        evaluated = evaluate_bundle(bundle, loaded, settings, gates, say)
    if asked.speed and loaded is not None:
        say("Measuring ratios of speed")
        ratios = regression.speed_ratios(bundle, loaded, samples, asked)
    measured = regression.baseline_from(bundle, samples, verified, evaluated, ratios)
    report = regression.compare_with_baseline(measured, known, verified, evaluated)
    if update and report:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(baseline, report.measured.text())  # one figure a line: a change is one line
    return report


def _given(
    bundle: Bundle,
    asked: config.VerifySettings | config.DriftSettings | config.CheckSettings,
    say: Progress,
) -> tuple[LoadedVan | None, Samples]:
    """Return the original network, where it is asked for, and what is judged on."""
    loaded = _original(bundle, asked.weights, say) if asked.against == "weights" else None
    return loaded, samples_for(bundle, loaded, asked.images, asked.count or GOLDEN_IMAGES)


def _original(bundle: Bundle, weights: Path | None, say: Progress) -> LoadedVan:
    say("Loading the original network")
    return original_network(bundle, weights)


def _gates(recipe: str) -> config.GateSettings:
    """Return the gates of the recipe called that, or the defaults."""
    return recipe_named(recipe).gates if recipe else NO_RECIPE
