"""A bundle judged as it was asked for: what it is compared with found, then the checks run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.gates import Allowed
from van_deploy.checks.opened import Execution
from van_deploy.config import (
    CheckSettings,
    DriftSettings,
    EvaluateSettings,
    EvaluationSettings,
    GateSettings,
    RunnerSettings,
    VerifySettings,
)
from van_deploy.recipe import recipe_named
from van_deploy.results import Progress
from van_deploy.runners.network import original_of

if TYPE_CHECKING:
    from van_deploy.checks.drift import DriftReport
    from van_deploy.checks.evaluate_report import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.samples import Samples
    from van_deploy.checks.verdicts import VerifyReport
    from van_deploy.model.checkpoint import LoadedVan

__all__ = ["check", "drift", "evaluate", "verify"]


def verify(bundle: Bundle, asked: VerifySettings, progress: Progress | None) -> VerifyReport:
    """Return what is found of each artefact (:func:`~van_deploy.checks.verify.verify_bundle`)."""
    from van_deploy.checks.verify import verify_bundle

    loaded = _original(bundle, asked.weights, progress) if asked.against == "weights" else None
    return verify_bundle(
        bundle,
        _samples(bundle, loaded, asked),
        loaded=loaded,
        gates=_gates(asked.recipe),
        artefacts=asked.artefacts,
        execution=_execution(asked),
        modules=asked.modules,
        allowed=_allowed(asked),
        progress=progress,
    )


def evaluate(
    bundle: Bundle, asked: EvaluationSettings, progress: Progress | None
) -> EvaluateReport:
    """Return the accuracy, as :func:`~van_deploy.checks.evaluate.evaluate_bundle`."""
    from van_deploy.checks.evaluate import Settings, evaluate_images

    loaded = _original(bundle, asked.weights, progress)
    settings = Settings(
        artefacts=asked.artefacts,
        execution=_execution(asked),
        batch=asked.batch,
        workers=asked.workers,
        on_ray=asked.on == "ray",
        ray_address=asked.ray_address or None,
        weights=str(asked.weights) if asked.weights else None,
        allowed=_allowed(asked),
    )
    gates = _gates(asked.recipe)

    def counted(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{done} of {total} images", done, total)

    return evaluate_images(bundle, loaded, asked.images, asked, settings, gates, counted)


def drift(bundle: Bundle, asked: DriftSettings, progress: Progress | None) -> DriftReport:
    """Return where the artefacts drift, as :func:`~van_deploy.checks.drift.drift_of_bundle`."""
    from van_deploy.checks.drift import drift_of_bundle
    from van_deploy.checks.reference import samples_for

    loaded = _original(bundle, asked.weights, progress) if asked.against == "weights" else None
    return drift_of_bundle(
        bundle,
        samples_for(bundle, loaded, asked.images, asked.count).first(asked.count),
        loaded=loaded,
        level=asked.level,
        artefacts=asked.artefacts,
        progress=progress,
    )


def check(
    bundle: Bundle, baseline: Path, asked: CheckSettings, update: bool, progress: Progress | None
) -> CheckReport:
    """Return the bundle against its gates and a baseline, which is written with ``update``."""
    from van_deploy.checks.baseline import read_baseline, write_baseline
    from van_deploy.checks.evaluate import Settings, evaluate_images
    from van_deploy.checks.regression import compare_with_baseline
    from van_deploy.checks.speed import speed_ratios
    from van_deploy.checks.verify import verify_bundle

    def counted(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{done} of {total} images", done, total)

    gates, known = _gates(asked.recipe), None if update else read_baseline(baseline)
    needed = asked.against == "weights" or asked.evaluate is not None or asked.speed
    loaded = _original(bundle, asked.weights, progress) if needed else None
    original = loaded if asked.against == "weights" else None
    samples, execution = _samples(bundle, original, asked), _execution(asked)
    verified = verify_bundle(
        bundle, samples, loaded=original, gates=gates, execution=execution, progress=progress
    )
    evaluated = None
    if asked.evaluate is not None and loaded is not None:
        table = EvaluateSettings(
            images=asked.evaluate, labels=asked.labels, class_order=asked.class_order
        )
        settings = Settings(execution=execution)
        evaluated = evaluate_images(bundle, loaded, asked.evaluate, table, settings, gates, counted)
    ratios = {}
    if asked.speed and loaded is not None:
        if progress is not None:
            progress("Measuring ratios of speed")
        ratios = speed_ratios(bundle, loaded, samples, execution=execution)
    report = compare_with_baseline(
        bundle, samples, known, verified, evaluated, ratios, _allowed(asked)
    )
    if update and report:
        write_baseline(baseline, report.measured)
    return report


def _allowed(asked: VerifySettings | EvaluationSettings | CheckSettings) -> Allowed:
    """Return what the user lets pass that was not shown."""
    return Allowed(asked.allow_skip, asked.allow_inconclusive)


def _samples(
    bundle: Bundle, loaded: LoadedVan | None, asked: VerifySettings | CheckSettings
) -> Samples:
    from van_deploy.checks.golden import GOLDEN_IMAGES
    from van_deploy.checks.reference import samples_for

    return samples_for(bundle, loaded, asked.images, asked.count or GOLDEN_IMAGES)


def _gates(recipe: str) -> GateSettings | None:
    """Return the gates of the recipe called that, or None for the defaults."""
    return recipe_named(recipe).gates if recipe else None


def _execution(asked: RunnerSettings) -> Execution:
    return Execution(asked.runner, asked.trust_engine, device=asked.device)


def _original(bundle: Bundle, weights: Path | None, progress: Progress | None) -> LoadedVan:
    """Return the network a bundle was made from.

    Raises:
        MissingDependency: PyTorch is not installed.
        BundleError: the weights have moved, have changed, or are not this bundle's.
    """
    if progress is not None:
        progress("Loading the original network")
    return original_of(bundle, weights)
