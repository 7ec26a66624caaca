"""The stages in order: from a recipe to a bundle that its gates have judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from van_deploy.bundle import Bundle, Manifest
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import (
    samples_for,
)
from van_deploy.checks.outputs import batch_sizes, shared_settings
from van_deploy.checks.verify import VerifyReport, record_check, verify_bundle
from van_deploy.config import EvaluationSettings, Recipe, RunSettings, VerifySettings
from van_deploy.data.samples import verification_images
from van_deploy.documents import Verdict
from van_deploy.engine.bundled import REUSED, build_cells, planned_engines
from van_deploy.errors import UsageError
from van_deploy.exporting import ExportResult, export_bundle
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.precision.pipeline import QuantizeResult, quantize_bundle
from van_deploy.serve.embedded import embed_artifacts
from van_deploy.stopwatch import Progress, Stopwatch, no_progress

EMBED_PROOF_IMAGES = 8  # the graph again, with known nodes before it: few images will do


@dataclass(frozen=True)
class ExportReport(Verdict):
    """What an export made, in every precision that was asked for.

    Attributes:
        export: of the FP32 graph.
        precisions: the others.
        manifest: of the bundle.
    """

    export: ExportResult
    precisions: tuple[QuantizeResult, ...]
    manifest: Manifest

    @property
    def passed(self) -> bool:
        """Whether every precision holds its gate; an FP32 graph that does not is never written."""
        return all(self.precisions)


@dataclass(frozen=True)
class ArtifactResult:
    """One artifact that was made after exporting.

    Attributes:
        artifact: its name.
        reason: why it was made anew or reused.
        passed: whether it holds the gate of its own stage.
    """

    artifact: str
    reason: str
    passed: bool


@dataclass(frozen=True)
class RunResult(Verdict):
    """What a run made and what its gates said.

    Attributes:
        bundle: as written.
        export: what exporting did.
        made: the artifacts made after it: precisions, then engines.
        verify: the verdict on each artifact.
        evaluate: accuracy, if there were labelled images.
    """

    bundle: Bundle
    export: ExportResult
    made: tuple[ArtifactResult, ...]
    verify: VerifyReport
    evaluate: EvaluateReport | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        accurate = self.evaluate is None or self.evaluate.passed
        return self.verify.passed and accurate and all(made.passed for made in self.made)


def export_recipe(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    how: RunSettings,
    progress: Progress = no_progress,
) -> ExportReport:
    """Return what exporting did, and the other precisions that the recipe makes.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: what to make; engines and gates are not done here.
        output: the bundle's folder.
        how: whether to make everything anew, and images to check on, and to calibrate on where
            the recipe names none.
        progress: told what is done.

    Raises:
        VanDeployError: as :func:`run_recipe`.
    """
    clock, images, force = Stopwatch(progress), how.images, how.force
    exported = export_bundle(loaded, recipe, output, images=images, force=force, progress=progress)
    made = []
    for name in recipe.precision.make:
        settings = recipe.precision.of(name)
        if images is not None and settings.sources == (None, None):
            settings = settings.with_changes(images=images)
        progress(f"Making '{name}'")
        made.append(quantize_bundle(output, settings, force=force, progress=progress))
    if recipe.export.embeds:
        clock.begin("Embedding preprocessing, and proving it")
        fixed, most = recipe.batch.fixed, EMBED_PROOF_IMAGES
        batches = [size for size in batch_sizes(recipe.batch) if size <= most or fixed]
        pixels = verification_images(loaded.name, loaded.preprocessing, max(batches), images).pixels
        if pixels is None:
            raise UsageError(
                f"A graph with preprocessing inside is proved on uint8 images; '{images}' holds "
                "normalised network input.",
                "Give uint8 images, or leave --images out.",
            )
        images_of_sizes = [pixels[:size] for size in batches]
        embedded = embed_artifacts(Bundle.open(output), recipe.export, images_of_sizes)
        clock.begin("")
        seconds = {**exported.seconds, **clock.seconds}
        exported = replace(exported, embedded=tuple(embedded), seconds=seconds)
    bundle = Bundle.open(output)
    return ExportReport(replace(exported, bundle=bundle), tuple(made), bundle.manifest)


def run_recipe(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    how: RunSettings,
    progress: Progress = no_progress,
) -> RunResult:
    """Return the bundle a recipe asks for, and the verdict of its gates.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: what to make, and the gates.
        output: the bundle's folder.
        how: what is skipped, runs it, and so on.
        progress: told what is done.

    Raises:
        UsageError: nothing builds the engines asked for.
        GateFailed: exporting found that the graph is not the network.
        BundleError: ``output`` cannot hold the bundle.
        ImageError: a precision needs images to calibrate on and there are none.
        MissingDependency: what builds the engines is not installed.
        ConversionError: an engine cannot be built.
    """
    engines, cells = recipe.engines, []
    if engines.precisions:  # a mistake is said before any work
        cells = planned_engines(output, engines, recipe.batch, recipe.export.dynamic_size)
    exported = export_recipe(loaded, recipe, output, how, progress)
    made = [ArtifactResult(one.artifact, one.reason, one.passed) for one in exported.precisions]
    cache = engines.timing_cache
    built = build_cells(cells, timing_cache=cache, force=how.force, progress=progress)
    for outcome in built if cells else ():
        same = outcome.outcome == REUSED
        reason = "the file, options and versions are those it was built from" if same else "built"
        made.append(ArtifactResult(outcome.engine, reason, passed=True))
    bundle = Bundle.open(output)
    progress("Verifying")
    samples, asked = samples_for(bundle, loaded, None), VerifySettings(**shared_settings(how))
    verify = verify_bundle(bundle, samples, asked, loaded, recipe.gates, progress)
    record_check(bundle, "verify", verify)
    evaluate = None
    if recipe.evaluate.images is not None:
        progress("Evaluating")
        settings = EvaluationSettings(**{**dict(recipe.evaluate), **shared_settings(how)})
        evaluate = evaluate_bundle(bundle, loaded, settings, recipe.gates, progress)
        record_check(bundle, "evaluate", evaluate)
    return RunResult(Bundle.open(output), exported.export, tuple(made), verify, evaluate)
