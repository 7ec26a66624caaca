"""Runs the stages of a recipe: export, quantise, build, verify and evaluate."""

from dataclasses import dataclass, replace
from pathlib import Path

from van_deploy.bundle import Bundle, Manifest
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import samples_for
from van_deploy.checks.outputs import batch_sizes, shared_settings
from van_deploy.checks.verify import VerifyReport, record_check, verify_bundle
from van_deploy.config import EvaluationSettings, Recipe, RunSettings, VerifySettings
from van_deploy.data.samples import verification_images
from van_deploy.documents import Verdict
from van_deploy.engine.fleet import REUSED, build_cells, engine_cells
from van_deploy.errors import UsageError
from van_deploy.exporting import ExportResult, export_bundle
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.model.preprocess import Pixels
from van_deploy.precision.images import choose_images
from van_deploy.precision.pipeline import QuantizeResult, quantize_bundle
from van_deploy.recipe import ImageSelection
from van_deploy.serve.embedded import embed_artifacts
from van_deploy.stopwatch import Progress, Stopwatch

EMBED_PROOF_IMAGES = 8  # the graph is checked already, and the added nodes are known


@dataclass(frozen=True)
class ExportReport(Verdict):
    """Result of an export in all requested precisions.

    Attributes:
        export: of the FP32 graph.
        precisions: results of the other precisions.
        manifest: of the bundle.
    """

    export: ExportResult
    precisions: tuple[QuantizeResult, ...]
    manifest: Manifest

    @property
    def passed(self) -> bool:
        """Whether every precision passes its gate; an FP32 graph that fails is never written."""
        return all(self.precisions)


@dataclass(frozen=True)
class ArtifactResult:
    """Result of one artifact that was made after the export.

    Attributes:
        artifact: its name.
        reason: why it was built or reused.
        passed: whether it passes the gate of its own stage.
    """

    artifact: str
    reason: str
    passed: bool


@dataclass(frozen=True)
class RunResult(Verdict):
    """Result of a run.

    Attributes:
        bundle: the bundle on disk.
        export: result of the FP32 export.
        artifacts: the other artifacts: precisions, then engines.
        verify: the verdict on each artifact.
        evaluate: accuracy, if the recipe has labelled images.
    """

    bundle: Bundle
    export: ExportResult
    artifacts: tuple[ArtifactResult, ...]
    verify: VerifyReport
    evaluate: EvaluateReport | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        is_accurate = self.evaluate is None or self.evaluate.passed
        return self.verify.passed and is_accurate and all(one.passed for one in self.artifacts)


def export_recipe(
    loaded: LoadedVan, recipe: Recipe, output: Path, settings: RunSettings, progress: Progress
) -> ExportReport:
    """Export a recipe's network in all its precisions; without engines and gates.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: the recipe.
        output: the bundle's folder.
        settings: whether to rebuild everything; images to check on, and to calibrate on if the
            recipe has none.
        progress: receives the current step.

    Raises:
        VanDeployError: as :func:`run_recipe`.
    """
    clock, images, force = Stopwatch(progress), settings.images, settings.force
    requested = []
    for name in recipe.precision.make:
        quantize = recipe.precision.of(name)
        if images is not None and quantize.sources == (None, None):
            quantize = quantize.with_changes(images=images)
        requested.append(quantize)
        has_images = quantize.noise or quantize.sources != (None, None)
        if name == "int8" and not has_images and loaded.name != EMBEDDED_NAME:
            choose_images(ImageSelection())  # raises the error, before anything is written
    batches = _embedding_batches(loaded, recipe, images) if recipe.export.embeds else []
    exported = export_bundle(loaded, recipe, output, images=images, force=force, progress=progress)
    precisions = []
    for quantize in requested:
        progress(f"Making '{quantize.precision}'")
        made = quantize_bundle(output, quantize, rules=recipe.gates, force=force, progress=progress)
        precisions.append(made)
    if batches:
        clock.begin("Embedding and checking preprocessing")
        embedded = embed_artifacts(Bundle.open(output), recipe.export, batches)
        clock.begin("")
        seconds = {**exported.seconds, **clock.seconds}
        exported = replace(exported, embedded=tuple(embedded), seconds=seconds)
    bundle = Bundle.open(output)
    return ExportReport(replace(exported, bundle=bundle), tuple(precisions), bundle.manifest)


def _embedding_batches(loaded: LoadedVan, recipe: Recipe, images: Path | None) -> list[Pixels]:
    """Return the images ``(N, S, S, C)`` uint8 to check embedded graphs on, a batch of each size.

    Raises:
        UsageError: the images are normalised network input.
    """
    sizes = batch_sizes(recipe.batch)
    if recipe.batch.fixed is None:
        sizes = tuple(size for size in sizes if size <= EMBED_PROOF_IMAGES)
    pixels = verification_images(loaded.name, loaded.preprocessing, max(sizes), images).pixels
    if pixels is None:
        raise UsageError(
            f"A graph with preprocessing inside needs uint8 images to check it; '{images}' has "
            "normalised network input.",
            "Give uint8 images, or remove --images.",
        )
    return [pixels[:size] for size in sizes]


def run_recipe(
    loaded: LoadedVan, recipe: Recipe, output: Path, settings: RunSettings, progress: Progress
) -> RunResult:
    """Make the bundle of a recipe, and apply its gates.

    Args:
        loaded: the network, from :func:`load_model`.
        recipe: the artifacts to make, and the gates.
        output: the bundle's folder.
        settings: how to run it.
        progress: receives the current step.

    Raises:
        UsageError: no backend supports the requested engines.
        GateFailed: the exported graph differs from the network.
        BundleError: ``output`` contains something else.
        ImageError: a precision needs images to calibrate on and there are none.
        MissingDependency: a package that builds the engines is not installed.
        ConversionError: an engine cannot be built.
    """
    engines, cells = recipe.engines, []
    if engines.precisions:  # reports mistakes before the export starts
        cells = engine_cells(output, engines, recipe.batch, recipe.export.dynamic_size)
    report = export_recipe(loaded, recipe, output, settings, progress)
    artifacts = [ArtifactResult(one.artifact, one.reason, one.passed) for one in report.precisions]
    if cells:
        cache, force = engines.timing_cache, settings.force
        for one in build_cells(cells, timing_cache=cache, force=force, progress=progress):
            reason = "nothing changed" if one.outcome == REUSED else "built"
            artifacts.append(ArtifactResult(one.engine, reason, passed=True))
    bundle = Bundle.open(output)
    progress("Verifying")
    samples, shared = samples_for(bundle, loaded, None), shared_settings(settings)
    checks = VerifySettings(**shared)
    verify = verify_bundle(bundle, samples, checks, loaded, recipe.gates, progress)
    record_check(bundle, "verify", verify)
    evaluate = None
    if recipe.evaluate.images is not None:
        progress("Evaluating")
        evaluation = EvaluationSettings(**{**dict(recipe.evaluate), **shared})
        evaluate = evaluate_bundle(bundle, loaded, evaluation, recipe.gates, progress)
        record_check(bundle, "evaluate", evaluate)
    return RunResult(Bundle.open(output), report.export, tuple(artifacts), verify, evaluate)
