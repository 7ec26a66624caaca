"""The main job: ``export``, ``quantize``, ``build`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import emit, remark, telling
from van_deploy.cli.shared import AsJson, BundlePath, Force, Output, RequireSignature, Set, opened
from van_deploy.config import BuildSettings, FleetSettings, QuantizeSettings, RunSettings
from van_deploy.config.named import EXPORT, RUN, Changes
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, GateFailed, UsageError


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant (van_b1), van_digits, a checkpoint (./mine.pth), a Hugging Face "
            "repository (owner/name), or a recipe (mine.toml)."
        ),
    ],
    changes: Annotated[Changes, EXPORT],
    output: Output = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to check on. By default sample photographs."),
    ] = None,
    assignments: Set = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a VAN to ONNX with a dynamic batch, checked against PyTorch at every batch size.

    Example: van-deploy export van_b1 --output dist/van_b1
    """
    with telling() as tell:
        from van_deploy import api
        from van_deploy.recipe import changes_from_text, recipe_for

        recipe = recipe_for(model, changes | changes_from_text(assignments or ()))
        made = api.export(
            recipe, output, images=images, offline=offline, force=force, progress=tell
        )
    for note in made.result.notes:
        remark(f"note: {note}")
    from van_deploy.report.sections_model import export_blocks

    emit(made.done, as_json, export_blocks)
    if not made:
        raise typer.Exit(1)


def quantize(
    bundle: BundlePath,
    settings: QuantizeSettings,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Add an FP16 or INT8 graph to a bundle, judged beside FP32.

    Ends with exit code 1 if the result does not hold its gate.

    Example: van-deploy quantize dist/van_b1 --images train/ --eval val/
    """
    with telling("Opening the bundle") as tell:
        result = opened(bundle, None).quantize(settings, force=force, progress=tell)
    word = "reused" if result.reused else "made anew"
    remark(f"{result.artefact}: {word}: {result.reason}")
    from van_deploy.report.sections_checks import quantized_blocks

    emit(result, as_json, quantized_blocks)
    if not result:
        raise typer.Exit(1)


def build(
    settings: BuildSettings,
    fleet: FleetSettings,
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle that `van-deploy export` made.")
    ] = None,
    force: Force = False,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Build engines from a bundle: TensorRT plans, or packages of PyTorch's Inductor.

    TensorRT for RTX needs no GPU for it, nor does a package for a CPU.

    Example: van-deploy build dist/van_b1 --precision fp16 --target sm_89
    """
    if fleet.matrix is not None:
        _refuse_beside_matrix(bundle, settings, require_signature)
        _build_matrix(fleet.matrix, fleet, force, as_json)
        return
    if bundle is None:
        raise UsageError("No bundle is given.", "Name one, or a fleet file with --matrix.")
    asked = opened(bundle, require_signature)
    with telling("Planning") as tell:
        report = asked.build(settings, force=force, progress=tell)
    from van_deploy.report.sections_engine import builds_blocks, warnings_text

    for outcome in report.outcomes:
        if outcome.outcome == "built" and outcome.sidecar and outcome.sidecar.warnings:
            remark(warnings_text(outcome.engine, outcome.sidecar.warnings))
    emit(report, as_json, builds_blocks)
    for text in asked.remarks:
        remark(text)


def _refuse_beside_matrix(
    bundle: Path | None, settings: BuildSettings, require_signature: Path | None
) -> None:
    if bundle is not None:
        raise UsageError(
            "Both a bundle and --matrix are given.", "Name the bundle in the matrix file."
        )
    if require_signature is not None:
        raise UsageError(
            "--require-signature is for one bundle, and --matrix names several.",
            "Check each of them first with `van-deploy verify-signature`.",
        )
    for name in sorted(settings.model_fields_set):
        raise UsageError(
            f"--matrix and an option of one build ({name}) are both given.",
            "Write it into the [options] of the matrix file.",
        )


def _build_matrix(path: Path, fleet: FleetSettings, force: bool, as_json: bool) -> None:
    """Build a fleet, print its table, and fail if a cell did."""
    from van_deploy.building import build_fleet
    from van_deploy.report.sections_engine import builds_blocks, cell_name

    with telling("Reading the matrix") as tell:
        report = build_fleet(
            path,
            on=fleet.on,
            address=fleet.ray_address,
            force=force,
            progress=tell,
            each=lambda count, total, outcome: remark(
                f"[{count}/{total}] {cell_name(plain(outcome.cell))}: {outcome.outcome}"
            ),
        )
    emit(report, as_json, builds_blocks)
    if report.errors:
        raise ConversionError(
            f"{len(report.errors)} of {len(report.outcomes)} engines failed.",
            f"Run the same command again to resume. The first failure: {report.errors[0]}",
        )


def run(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe (van_b1, van_digits, mine.toml), or anything with weights."),
    ],
    changes: Annotated[Changes, RUN],
    settings: RunSettings,
    output: Output = None,
    assignments: Set = None,
    as_json: AsJson = False,
) -> None:
    """Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.

    Example: van-deploy run export/mine.toml --output dist/mine
    """
    from van_deploy.recipe import changes_from_text, recipe_for

    wanted = recipe_for(recipe, changes | changes_from_text(assignments or ()))
    with telling() as tell:
        from van_deploy import api

        result = api.run_recipe(wanted, output, settings, progress=tell)
    for note in result.export.notes:
        remark(f"note: {note}")
    from van_deploy.report.sections_model import run_blocks

    emit(result, as_json, run_blocks)
    if not result:
        raise GateFailed(
            f"The bundle '{result.bundle.path}' was written and does not pass its gates.",
            "See the rows above; `van-deploy drift` names the module.",
        )
