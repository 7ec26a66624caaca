"""A whole recipe, from weights to gates: the stages in order, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.checks.baseline import Baseline, baseline_of
from van_deploy.checks.evaluate import EvaluateReport, Settings, evaluate_bundle
from van_deploy.checks.figures import (
    Figure,
    figures_from_evaluate,
    figures_from_speed,
    figures_from_verify,
)
from van_deploy.checks.labels import labelled_images
from van_deploy.checks.opened import ON_CPU, Execution
from van_deploy.checks.pictures import Pictures, pictures_to_check
from van_deploy.checks.record import record_check
from van_deploy.checks.regression import CheckReport, compare_with_baseline
from van_deploy.checks.speed import speed_ratios
from van_deploy.checks.verdicts import VerifyReport
from van_deploy.checks.verify import verify_bundle
from van_deploy.errors import UsageError
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.pipeline import ExportResult, export_bundle
from van_deploy.recipe import GateSettings, Recipe

__all__ = ["Measured", "RunResult", "RunSettings", "measure_bundle", "run_recipe"]

LEAST_IMAGES = 32
QUANTIZED = ("fp16", "int8")

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
    pictures: Pictures
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
    pictures: Pictures,
    *,
    labelled: Path | None = None,
    labels_file: Path | None = None,
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
        labelled: folder of labelled images to evaluate on, or None.
        labels_file: their labels, where the folder does not tell.
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
    evaluate = None
    if labelled is not None:
        say("Evaluating")
        evaluate = _evaluate(bundle, loaded, labelled, labels_file, gates, execution, say)
        figures += figures_from_evaluate(evaluate)
    if speed:
        say("Measuring ratios of speed")
        figures += figures_from_speed(speed_ratios(bundle, loaded, pictures, execution=execution))
    return Measured(bundle, pictures, verify, evaluate, tuple(figures))


@dataclass(frozen=True)
class RunSettings:
    """What a run does beside exporting and verifying.

    Attributes:
        precisions: ``fp16``, ``int8``: artefacts to make besides ``fp32``.
        images: folder to check on; None for sample pictures.
        calibration: folder to calibrate on, where a precision needs it.
        labelled: folder of labelled images to evaluate on; None leaves that out.
        labels_file: their labels, where the folder does not tell.
        execution: what runs the artefacts in the gates.
        force: make everything anew.
    """

    precisions: tuple[str, ...] = ()
    images: Path | None = None
    calibration: Path | None = None
    labelled: Path | None = None
    labels_file: Path | None = None
    execution: Execution = ON_CPU
    force: bool = False

    def __post_init__(self) -> None:
        """Refuse precisions that there are not."""
        strangers = [name for name in self.precisions if name not in QUANTIZED]
        if strangers:
            raise UsageError(
                f"There is no precision '{strangers[0]}' to make.",
                f"Known: {', '.join(QUANTIZED)}.",
            )


@dataclass(frozen=True)
class RunResult:
    """What a run made and what its gates said.

    Attributes:
        bundle: as written.
        export: what exporting did.
        made: the artefacts made after it, with the reason if they were there already.
        verify: the verdict on each artefact.
        evaluate: accuracy, if there were labelled images.
    """

    bundle: Bundle
    export: ExportResult
    made: tuple[tuple[str, str], ...]
    verify: VerifyReport
    evaluate: EvaluateReport | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return self.verify.passed and (self.evaluate is None or self.evaluate.passed)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return {
            "bundle": str(self.bundle.path),
            "passed": self.passed,
            "export": {"reused": self.export.reused, "reason": self.export.reason},
            "made": [{"artefact": name, "reason": reason} for name, reason in self.made],
            "verify": self.verify.as_dict(),
            "evaluate": self.evaluate.as_dict() if self.evaluate else None,
        }


def run_recipe(
    recipe: Recipe,
    loaded: LoadedVan,
    output: Path,
    settings: RunSettings | None = None,
    *,
    progress: Progress | None = None,
) -> RunResult:
    """Return the bundle a recipe asks for, and the verdict of its gates.

    Args:
        recipe: how to deploy, and the gates.
        loaded: the network, from :func:`van_deploy.pipeline.load_for`.
        output: the bundle's folder.
        settings: what to make and to judge on.
        progress: told what is done.

    Raises:
        GateFailed: exporting found that the graph is not the network.
        BundleError: ``output`` cannot hold the bundle.
        ImageError: a precision needs images to calibrate on and there are none.
    """
    settings, say = settings or RunSettings(), progress or (lambda _: None)
    exported = export_bundle(
        loaded, recipe, output, images=settings.images, force=settings.force, progress=progress
    )
    made = tuple(_quantize(output, settings, say))
    bundle = Bundle.open(output)
    count = max(LEAST_IMAGES, recipe.batch.max)
    say("Preparing images")
    pictures = pictures_to_check(loaded.name, loaded.preprocessing, count, settings.images)
    verify = verify_bundle(
        bundle,
        loaded,
        pictures,
        gates=recipe.gates,
        execution=settings.execution,
        progress=progress,
    )
    record_check(bundle, "verify", verify.as_dict())
    evaluate = None
    if settings.labelled is not None:
        say("Evaluating")
        evaluate = _evaluate(
            bundle,
            loaded,
            settings.labelled,
            settings.labels_file,
            recipe.gates,
            settings.execution,
            say,
        )
        record_check(bundle, "evaluate", evaluate.as_dict())
    return RunResult(Bundle.open(output), exported, made, verify, evaluate)


def _quantize(output: Path, settings: RunSettings, say: Progress) -> Sequence[tuple[str, str]]:
    """Make each precision asked for; return its name and why it was made or reused."""
    made = []
    for precision in settings.precisions:
        from van_deploy.precision.settings import QuantizeSettings
        from van_deploy.precision.stage import quantize_bundle

        say(f"Making '{precision}'")
        result = quantize_bundle(
            output,
            QuantizeSettings(precision=precision),
            images=settings.calibration,
            force=settings.force,
            progress=say,
        )
        made.append((result.artefact, result.reason))
    return made


def _evaluate(
    bundle: Bundle,
    loaded: LoadedVan,
    folder: Path,
    labels_file: Path | None,
    gates: GateSettings | None,
    execution: Execution,
    say: Progress,
) -> EvaluateReport:
    labelled = labelled_images(
        folder, loaded.config.num_classes, loaded.class_names, labels_file=labels_file
    )
    return evaluate_bundle(
        bundle,
        loaded,
        labelled,
        Settings(execution=execution),
        gates=gates,
        progress=lambda done, total: say(f"{done} of {total} images"),
    )
