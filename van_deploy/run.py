"""A whole recipe, from weights to gates: the stages in order, on one screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate import EvaluateReport, evaluate_bundle
from van_deploy.checks.golden import samples_for
from van_deploy.checks.judging import common
from van_deploy.checks.verify import VerifyReport, record_check, verify_bundle
from van_deploy.config import (
    EngineSettings,
    EvaluationSettings,
    Recipe,
    RunSettings,
    VerifySettings,
)
from van_deploy.manifest import Manifest
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.pipeline import ExportResult, embed_in_bundle, export_bundle
from van_deploy.stopwatch import Progress, Stopwatch, silent

if TYPE_CHECKING:
    from van_deploy.engine.fleet import Cell
    from van_deploy.precision.pipeline import QuantizeResult


@dataclass(frozen=True)
class ExportReport:
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

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


@dataclass(frozen=True)
class Made:
    """One artefact that was made after exporting.

    Attributes:
        artefact: its name.
        reason: why it was made anew or reused.
        passed: whether it holds the gate of its own stage.
    """

    artefact: str
    reason: str
    passed: bool


@dataclass(frozen=True)
class RunResult:
    """What a run made and what its gates said.

    Attributes:
        bundle: as written.
        export: what exporting did.
        made: the artefacts made after it: precisions, then engines.
        verify: the verdict on each artefact.
        evaluate: accuracy, if there were labelled images.
    """

    bundle: Bundle
    export: ExportResult
    made: tuple[Made, ...]
    verify: VerifyReport
    evaluate: EvaluateReport | None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        accurate = self.evaluate is None or self.evaluate.passed
        return self.verify.passed and accurate and all(made.passed for made in self.made)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


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
        recipe: what to make, and the gates.
        loaded: the network, from :func:`van_deploy.pipeline.load_for`.
        output: the bundle's folder.
        settings: how.
        progress: told what is done.

    Raises:
        UsageError: nothing builds the engines asked for.
        GateFailed: exporting found that the graph is not the network.
        BundleError: ``output`` cannot hold the bundle.
        ImageError: a precision needs images to calibrate on and there are none.
        MissingDependency: what builds the engines is not installed.
        ConversionError: an engine cannot be built.
    """
    settings, say = settings or RunSettings(), progress or silent
    engines = _planned(recipe, output)  # a mistake is said before any work
    exported, precisions = export_recipe(
        loaded, recipe, output, images=settings.images, force=settings.force, progress=progress
    )
    made = [Made(result.artefact, result.reason, result.passed) for result in precisions]
    made += _built(engines, recipe.engines, settings.force, say)
    bundle = Bundle.open(output)
    say("Verifying")
    verify = verify_bundle(
        bundle,
        samples_for(bundle, loaded, None),
        VerifySettings(**common(settings)),
        loaded=loaded,
        gates=recipe.gates,
        progress=say,
    )
    record_check(bundle, "verify", verify)
    evaluate = None
    if recipe.evaluate.images is not None:
        say("Evaluating")
        evaluate = evaluate_bundle(
            bundle,
            loaded,
            EvaluationSettings(**{**dict(recipe.evaluate), **common(settings)}),
            gates=recipe.gates,
            progress=say,
        )
        record_check(bundle, "evaluate", evaluate)
    return RunResult(Bundle.open(output), exported, tuple(made), verify, evaluate)


def export_recipe(
    loaded: LoadedVan,
    recipe: Recipe,
    output: Path,
    *,
    images: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[ExportResult, tuple[QuantizeResult, ...]]:
    """Return what exporting did, and the other precisions that the recipe makes.

    Args:
        loaded: the network, from :func:`van_deploy.pipeline.load_for`.
        recipe: what to make; engines and gates are not done here.
        output: the bundle's folder.
        images: folder to check on, and to calibrate on where the recipe names no images.
        force: make everything anew.
        progress: told what is done.

    Raises:
        VanDeployError: as :func:`run_recipe`.
    """
    from van_deploy.precision.pipeline import quantize_bundle

    clock = Stopwatch(progress)
    exported = export_bundle(loaded, recipe, output, images=images, force=force, progress=progress)
    made = []
    for name in recipe.precision.make:
        settings = recipe.precision.of(name)
        if images is not None and settings.sources == (None, None):
            settings = settings.changed(images=images)
        clock.say(f"Making '{name}'")
        made.append(quantize_bundle(output, settings, force=force, progress=progress))
    if recipe.export.embeds:
        clock.begin("Embedding preprocessing, and proving it")
        embedded = embed_in_bundle(output, loaded, recipe, images)
        clock.begin("")
        seconds = {**exported.seconds, **clock.seconds}
        exported = replace(exported, bundle=Bundle.open(output), embedded=embedded, seconds=seconds)
    return exported, tuple(made)


def _planned(recipe: Recipe, output: Path) -> list[Cell]:
    """Return the engines a recipe asks for; what this machine cannot build is refused."""
    if not recipe.engines.precisions:
        return []
    from van_deploy.engine.fleet import planned_engines

    return planned_engines(output, recipe.engines, recipe.batch, recipe.export.dynamic_size)


def _built(cells: list[Cell], table: EngineSettings, force: bool, say: Progress) -> Iterator[Made]:
    """Build each engine asked for."""
    if not cells:
        return
    from van_deploy.engine.bundled import build_cells

    def building(text: str, *_: object) -> None:
        say(text)

    for outcome in build_cells(
        cells, timing_cache=table.timing_cache, force=force, progress=building
    ):
        same = outcome.outcome == "reused"
        reason = "the file, options and versions are those it was built from" if same else "built"
        yield Made(outcome.engine, reason, passed=True)
