"""Everything that is measured of a bundle at once, and held against a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.checks.baseline import Baseline, baseline_of
from van_deploy.checks.evaluate import Settings, evaluate_bundle
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.figures import (
    Figure,
    figures_from_evaluate,
    figures_from_speed,
    figures_from_verify,
)
from van_deploy.checks.opened import ON_CPU, Execution
from van_deploy.checks.regression import CheckReport, compare_with_baseline
from van_deploy.checks.speed import speed_ratios
from van_deploy.checks.verdicts import VerifyReport
from van_deploy.checks.verify import verify_bundle
from van_deploy.config import EvaluateSettings, GateSettings
from van_deploy.data import CheckImages, ImageSet, labelled_images
from van_deploy.model.checkpoint import LoadedVan

__all__ = ["Measured", "evaluate_folder", "images_asked", "measure_bundle"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Everything a check compares.

    Attributes:
        bundle: what was measured.
        pictures: what it was verified on.
        verify: the verdict on each artefact.
        evaluate: accuracy, if there were labelled images.
        figures: all of it as figures.
    """

    bundle: Bundle
    pictures: CheckImages
    verify: VerifyReport
    evaluate: EvaluateReport | None
    figures: tuple[Figure, ...]

    def check(self, baseline: Baseline | None, *, allow_skip: bool) -> CheckReport:
        """Return the gates and the figures against ``baseline``."""
        return compare_with_baseline(
            self.bundle,
            self.pictures,
            baseline,
            self.figures,
            self.verify,
            self.evaluate,
            allow_skip=allow_skip,
        )

    def baseline(self) -> Baseline:
        """Return the baseline that says this is good."""
        return baseline_of(self.bundle, self.pictures, self.figures)


def measure_bundle(
    bundle: Bundle,
    loaded: LoadedVan,
    pictures: CheckImages,
    *,
    labelled: EvaluateSettings | None = None,
    gates: GateSettings | None = None,
    execution: Execution = ON_CPU,
    speed: bool = False,
    progress: Progress | None = None,
) -> Measured:
    """Return everything a check compares, measured on this machine.

    Args:
        bundle: the bundle.
        loaded: its original network.
        pictures: to verify on.
        labelled: labelled images to evaluate on, or None.
        gates: limits that are not to be derived.
        execution: what runs the artefacts.
        speed: measure ratios of speed as well.
        progress: told what is measured.
    """
    say = progress or (lambda _: None)
    verify = verify_bundle(
        bundle, loaded, pictures, gates=gates, execution=execution, progress=progress
    )
    figures: list[Figure] = list(figures_from_verify(verify))
    evaluate = evaluate_folder(
        bundle,
        loaded,
        labelled or EvaluateSettings(),
        gates=gates,
        execution=execution,
        progress=say,
    )
    if evaluate is not None:
        figures += figures_from_evaluate(evaluate)
    if speed:
        say("Measuring ratios of speed")
        figures += figures_from_speed(speed_ratios(bundle, loaded, pictures, execution=execution))
    return Measured(bundle, pictures, verify, evaluate, tuple(figures))


def images_asked(images: Path, asked: EvaluateSettings, loaded: LoadedVan) -> ImageSet:
    """Return the labelled images to evaluate on."""
    labelled = labelled_images(
        images,
        loaded.config.num_classes,
        loaded.class_names,
        labels_file=asked.labels,
        synsets_file=asked.synsets,
        class_order=asked.class_order,
        find_labels=asked.label_files,
    )
    return labelled.first(asked.limit) if asked.limit else labelled


def evaluate_folder(
    bundle: Bundle,
    loaded: LoadedVan,
    asked: EvaluateSettings,
    *,
    gates: GateSettings | None = None,
    execution: Execution = ON_CPU,
    progress: Progress | None = None,
) -> EvaluateReport | None:
    """Return the accuracy on a folder of labelled images; None where none is named.

    Args:
        bundle: the bundle.
        loaded: its original network.
        asked: the folder, its labels, and how many images.
        gates: how much may be lost.
        execution: what runs the artefacts.
        progress: told how far it is.
    """
    if asked.images is None:
        return None
    say = progress or (lambda _: None)
    say("Evaluating")
    return evaluate_bundle(
        bundle,
        loaded,
        images_asked(asked.images, asked, loaded),
        Settings(execution=execution),
        gates=gates,
        progress=lambda done, total: say(f"{done} of {total} images"),
    )
