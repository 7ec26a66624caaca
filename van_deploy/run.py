"""A whole recipe, from weights to gates: the stages in order, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from van_deploy.bundle import Bundle
from van_deploy.checks.evaluate_report import EvaluateReport
from van_deploy.checks.measure import evaluate_folder
from van_deploy.checks.opened import ON_CPU, Execution
from van_deploy.checks.record import record_check
from van_deploy.checks.verdicts import VerifyReport
from van_deploy.checks.verify import verify_bundle
from van_deploy.data import check_images
from van_deploy.errors import RecipeError, UsageError
from van_deploy.model.checkpoint import LoadedVan
from van_deploy.pipeline import ExportResult, embed_in_bundle, export_bundle
from van_deploy.recipe import BatchRange, EngineSettings, PrecisionSettings, Recipe

if TYPE_CHECKING:
    from van_deploy.engine.backend import Backend
    from van_deploy.engine.options import BuildOptions
    from van_deploy.precision.settings import QuantizeSettings

__all__ = [
    "Made",
    "RunResult",
    "RunSettings",
    "build_options",
    "quantize_settings",
    "run_recipe",
]

LEAST_IMAGES = 32

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RunSettings:
    """How a run is done; *what* is done stands in the recipe.

    Attributes:
        images: folder to check on; None for sample pictures.
        execution: what runs the artefacts in the gates.
        force: make everything anew.
    """

    images: Path | None = None
    execution: Execution = ON_CPU
    force: bool = False


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

    def as_dict(self) -> dict[str, Any]:
        """Return the result, ready for JSON."""
        return {
            "bundle": str(self.bundle.path),
            "passed": self.passed,
            "export": {"reused": self.export.reused, "reason": self.export.reason},
            "made": [asdict(made) for made in self.made],
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
        recipe: what to make, and the gates.
        loaded: the network, from :func:`van_deploy.pipeline.load_for`.
        output: the bundle's folder.
        settings: how.
        progress: told what is done.

    Raises:
        RecipeError: a value of ``[precision]`` or ``[engines]`` makes no sense.
        GateFailed: exporting found that the graph is not the network.
        BundleError: ``output`` cannot hold the bundle.
        ImageError: a precision needs images to calibrate on and there are none.
        MissingDependency: what builds the engines is not installed.
        ConversionError: an engine cannot be built.
    """
    settings, say = settings or RunSettings(), progress or (lambda _: None)
    wanted = [quantize_settings(recipe.precision, name) for name in recipe.precision.make]
    engines = list(_planned(recipe))  # a mistake is said before any work
    exported = export_bundle(
        loaded, recipe, output, images=settings.images, force=settings.force, progress=progress
    )
    made = list(_quantized(output, recipe.precision, wanted, settings.force, say))
    if made and recipe.export.embeds:
        say("Embedding preprocessing, and proving it")
        embedded = embed_in_bundle(output, loaded, recipe, settings.images)
        exported = replace(exported, embedded=embedded)
    made += _built(output, recipe.engines, engines, settings.force, say)
    bundle = Bundle.open(output)
    say("Preparing images")
    count = max(LEAST_IMAGES, recipe.batch.max)
    verify = verify_bundle(
        bundle,
        loaded,
        check_images(loaded.name, loaded.preprocessing, count, settings.images),
        gates=recipe.gates,
        execution=settings.execution,
        progress=progress,
    )
    record_check(bundle, "verify", verify.as_dict())
    evaluate = evaluate_folder(
        bundle,
        loaded,
        recipe.evaluate,
        gates=recipe.gates,
        execution=settings.execution,
        progress=progress,
    )
    if evaluate is not None:
        record_check(bundle, "evaluate", evaluate.as_dict())
    return RunResult(Bundle.open(output), exported, tuple(made), verify, evaluate)


def quantize_settings(table: PrecisionSettings, precision: str) -> QuantizeSettings:
    """Return what a recipe asks of one of its precisions.

    Raises:
        RecipeError: it contradicts itself.
    """
    from van_deploy.precision.equalize import EqualizeSettings
    from van_deploy.precision.refine_settings import RefineSettings
    from van_deploy.precision.settings import QuantizeSettings

    int8 = precision == "int8"
    try:
        return QuantizeSettings(
            precision=precision,
            target=table.target if int8 else "tensorrt",
            method=table.method,
            scope=table.scope if int8 else (),
            rest=table.rest if int8 else "",
            keep=table.keep,
            equalize=EqualizeSettings() if table.equalize else None,
            refine=RefineSettings() if table.refine else None,
            max_drop=table.max_drop if int8 else None,
        )
    except UsageError as error:
        raise RecipeError(f"[precision]: {error.message}", error.remedy) from None


def build_options(table: EngineSettings, batch: BatchRange) -> BuildOptions:
    """Return what a recipe asks of its engines, without their targets.

    Raises:
        RecipeError: a value makes no sense.
    """
    from van_deploy.engine.options import (
        BuildOptions,
        HardwareCompatibility,
        Profiling,
        parse_size,
        parse_targets,
    )

    try:
        if table.targets:
            parse_targets(",".join(table.targets))
        return BuildOptions(
            profiles=tuple(BatchRange.parse(text) for text in table.batch) or (batch,),
            hardware_compatibility=_member(HardwareCompatibility, table.hardware_compatibility),
            version_compatible=table.version_compatible,
            workspace_bytes=parse_size(table.workspace) if table.workspace else None,
            optimization_level=table.optimization_level,
            tf32=table.tf32,
            strip_weights=table.strip_weights,
            refit=table.refit,
            profiling=_member(Profiling, table.profiling),
        )
    except UsageError as error:
        raise RecipeError(f"[engines]: {error.message}", error.remedy) from None


def _member(kind: Any, name: str) -> Any:
    known = [member.value for member in kind]
    if name not in known:
        raise UsageError(f"There is no '{name}'.", f"Known: {', '.join(known)}.")
    return kind(name)


def _quantized(
    output: Path,
    table: PrecisionSettings,
    wanted: list[QuantizeSettings],
    force: bool,
    say: Progress,
) -> Iterator[Made]:
    """Make each precision asked for."""
    from van_deploy.precision.stage import quantize_bundle

    for settings in wanted:
        say(f"Making '{settings.precision}'")
        result = quantize_bundle(
            output,
            settings,
            images=table.images,
            calibration=table.calibration or None,
            evaluate=table.evaluate,
            force=force,
            progress=say,
        )
        yield Made(result.artefact, result.reason, result.passed)


@dataclass(frozen=True)
class _Planned:
    """One engine to build: the artefact, what builds it, and what is asked."""

    precision: str
    backend: Backend
    options: BuildOptions


def _planned(recipe: Recipe) -> Iterator[_Planned]:
    """Yield each engine the recipe asks for; what this machine cannot build is refused.

    Raises:
        RecipeError: nothing builds what is asked.
        MissingDependency: what builds it is not installed, or wants a GPU.
    """
    table = recipe.engines
    options = build_options(table, recipe.batch)
    if not table.precisions:
        return
    from van_deploy.engine.backend import choose_backend
    from van_deploy.engine.host import host_here
    from van_deploy.engine.options import parse_targets
    from van_deploy.engine.refusals import refuse_impossible

    host = host_here()
    try:
        for targets in parse_targets(",".join(table.targets)) if table.targets else ((),):
            backend = choose_backend(table.backend, targets, host.target)
            here = (host.target,) if host.target and backend.builds_for_absent_gpus else ()
            asked = replace(options, targets=targets or here)
            refuse_impossible(backend, asked, host, table.timing_cache)
            yield from (_Planned(name, backend, asked) for name in table.precisions)
    except UsageError as error:
        raise RecipeError(f"[engines]: {error.message}", error.remedy) from None


def _built(
    output: Path, table: EngineSettings, planned: list[_Planned], force: bool, say: Progress
) -> Iterator[Made]:
    """Build each engine asked for."""
    from van_deploy.engine.bundled import build_in_bundle, request_for
    from van_deploy.engine.host import host_here

    host = host_here()
    for plan in planned:
        request = request_for(Bundle.open(output), plan.precision, plan.backend, plan.options, host)
        say(f"Building '{request.name}'")
        built = build_in_bundle(
            request,
            plan.backend,
            plan.options,
            host=host,
            timing_cache=table.timing_cache,
            force=force,
        )
        reason = "the file, options and versions are those it was built from"
        yield Made(built.name, reason if built.reused else "built", passed=True)
