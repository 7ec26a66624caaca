"""A bundle judged as it was asked for: its network and the images found, then the checks run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
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
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.recipe import recipe_named
from van_deploy.results import Progress

if TYPE_CHECKING:
    from van_deploy.checks.drift import DriftReport
    from van_deploy.checks.evaluate_report import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.verdicts import VerifyReport
    from van_deploy.data import CheckImages

__all__ = ["check", "drift", "evaluate", "verify"]

LEAST_IMAGES = 32


def verify(bundle: Bundle, asked: VerifySettings, progress: Progress | None) -> VerifyReport:
    """Return the verdict on every artefact, as :func:`~van_deploy.checks.verify.verify_bundle`."""
    from van_deploy.checks.verify import verify_bundle

    gates, loaded = _gates(asked.recipe), _original(bundle, asked.weights, progress)
    return verify_bundle(
        bundle,
        loaded,
        _images(bundle, loaded, asked),
        gates=gates,
        artefacts=asked.artefacts,
        execution=_execution(asked),
        modules=asked.modules,
        progress=progress,
    )


def evaluate(
    bundle: Bundle, asked: EvaluationSettings, progress: Progress | None
) -> EvaluateReport:
    """Return the accuracy, as :func:`~van_deploy.checks.evaluate.evaluate_bundle`."""
    from van_deploy.checks.evaluate import Settings, evaluate_bundle
    from van_deploy.checks.measure import images_asked

    def counted(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{done} of {total} images", done, total)

    gates, loaded = _gates(asked.recipe), _original(bundle, asked.weights, progress)
    labelled = images_asked(asked.images, asked, loaded)
    settings = Settings(
        artefacts=asked.artefacts,
        execution=_execution(asked),
        batch=asked.batch,
        workers=asked.workers,
        resume=asked.resume,
        journal=asked.journal,
        on_ray=asked.on == "ray",
        ray_address=asked.ray_address or None,
        weights=str(asked.weights) if asked.weights else None,
    )
    return evaluate_bundle(bundle, loaded, labelled, settings, gates=gates, progress=counted)


def drift(bundle: Bundle, asked: DriftSettings, progress: Progress | None) -> DriftReport:
    """Return where the artefacts drift, as :func:`~van_deploy.checks.drift.drift_of_bundle`."""
    from van_deploy.checks.drift import drift_of_bundle
    from van_deploy.data import check_images

    loaded = _original(bundle, asked.weights, progress)
    images = check_images(loaded.name, loaded.preprocessing, asked.count, asked.images)
    return drift_of_bundle(
        bundle,
        loaded,
        images.inputs,
        level=asked.level,
        described=images.description,
        artefacts=asked.artefacts or None,
        progress=progress,
    )


def check(
    bundle: Bundle, baseline: Path, asked: CheckSettings, update: bool, progress: Progress | None
) -> CheckReport:
    """Return the bundle against its gates and a baseline, which is written with ``update``."""
    from van_deploy.checks.baseline import read_baseline, write_baseline
    from van_deploy.checks.measure import measure_bundle

    gates, known = _gates(asked.recipe), None if update else read_baseline(baseline)
    loaded = _original(bundle, asked.weights, progress)
    measured = measure_bundle(
        bundle,
        loaded,
        _images(bundle, loaded, asked),
        labelled=EvaluateSettings(
            images=asked.evaluate, labels=asked.labels, class_order=asked.class_order
        ),
        gates=gates,
        execution=_execution(asked),
        speed=asked.speed,
        progress=progress,
    )
    report = measured.check(known, allow_skip=asked.allow_skip or update)
    if update and report:
        write_baseline(baseline, measured.baseline())
    return report


def _gates(recipe: str) -> GateSettings | None:
    """Return the gates of the recipe called that, or None for the defaults."""
    return recipe_named(recipe).gates if recipe else None


def _execution(asked: RunnerSettings) -> Execution:
    return Execution(asked.runner, asked.trust_engine)


def _original(bundle: Bundle, weights: Path | None, progress: Progress | None) -> LoadedVan:
    from van_deploy.bundle.original import original_network

    loaded = original_network(bundle, weights)
    if progress is not None:
        progress("Preparing images")
    return loaded


def _images(
    bundle: Bundle, loaded: LoadedVan, asked: VerifySettings | CheckSettings
) -> CheckImages:
    """Return images to judge on: at least one of the bundle's largest batches of them.

    Raises:
        UsageError: fewer were asked for than the largest batch has.
    """
    from van_deploy.data import check_images

    largest = bundle.manifest.batch.max
    if asked.count is not None and asked.count < largest:
        raise UsageError(
            f"{asked.count} images are fewer than the bundle's largest batch, {largest}.",
            f"Ask for {largest} or more.",
        )
    count = asked.count or max(LEAST_IMAGES, largest)
    return check_images(loaded.name, loaded.preprocessing, count, asked.images)
