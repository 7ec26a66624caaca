"""Main commands: ``export``, ``quantize``, ``build`` and ``run``."""

from pathlib import Path
from typing import Annotated

import typer

from van_deploy import config
from van_deploy.cli import options as cli
from van_deploy.cli.console import Output, print_note
from van_deploy.config.named_options import EXPORT, RUN, Changes
from van_deploy.documents import plain
from van_deploy.errors import ConversionError, GateFailed, UsageError
from van_deploy.stopwatch import Progress


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant (van_b1), van_digits, a checkpoint (./mine.pth), a Hugging Face "
            "repository (owner/name), or a recipe (mine.toml)."
        ),
    ],
    changes: Annotated[Changes, EXPORT],
    options: Annotated[cli.OptionValues, config.ExportRunSettings],
    progress: Progress,
    output: cli.OutputFolder = None,
) -> Output:
    """Export a VAN to ONNX with a dynamic batch, checked against PyTorch at every batch size.

    Example: van-deploy export van_b1 --output dist/van_b1
    """
    from van_deploy import api
    from van_deploy.recipe import resolve_recipe
    from van_deploy.report.sections_model import export_blocks

    bundle = api.export(resolve_recipe(model, changes), output, progress=progress, **options)
    notes = [f"note: {note}" for note in bundle.result.notes]
    return Output(bundle.done, export_blocks, notes, None if bundle else typer.Exit(1))


def quantize(
    bundle: cli.OpenBundle,
    options: Annotated[cli.OptionValues, config.QuantizeSettings],
    force: cli.Force = False,
) -> Output:
    """Add an FP16, BF16 or INT8 graph to a bundle, compared with FP32.

    Exit code 1 if the result does not pass its gate.

    Example: van-deploy quantize dist/van_b1 --images train/ --eval val/
    """
    result = bundle.quantize(force=force, **options)
    from van_deploy.report.sections_checks import quantize_blocks

    remark = f"{result.artifact}: {'reused' if result.reused else 'built'}: {result.reason}"
    return Output(result, quantize_blocks, [remark], None if result else typer.Exit(1))


def build(
    options: Annotated[cli.OptionValues, config.BuildSettings],
    fleet: Annotated[cli.OptionValues, config.FleetSettings],
    progress: Progress,
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle that `van-deploy export` made.")
    ] = None,
    force: cli.Force = False,
    require_signature: cli.RequireSignature = None,
) -> Output:
    """Build engines from a bundle: TensorRT plans, or packages of PyTorch's Inductor.

    TensorRT for RTX, and packages for a CPU, do not need a GPU.

    Example: van-deploy build dist/van_b1 --precision fp16 --target sm_89
    """
    if fleet.table.matrix is not None:
        others = {"a bundle": bundle, "--require-signature": require_signature}
        conflicts = [*(name for name, value in others.items() if value), *options.flags]
        if conflicts:
            raise UsageError(
                f"--matrix conflicts with {', '.join(conflicts)}.",
                "The matrix file has its own bundles and [options]; verify signatures first with "
                "`van-deploy verify-signature`.",
            )
        return _build_matrix(fleet.table.matrix, fleet.table, force, progress)
    if bundle is None:
        raise UsageError("A bundle is required.", "Give one, or a fleet file with --matrix.")
    target = cli.load_bundle(bundle, require_signature, progress)
    report = target.build(force=force, **options)
    from van_deploy.report.sections_model import build_blocks

    warnings = [
        f"{outcome.engine}: warnings: {sum(outcome.sidecar.warnings.values())}, see its .log"
        for outcome in report.outcomes
        if outcome.outcome == "built" and outcome.sidecar and outcome.sidecar.warnings
    ]
    return Output(report, build_blocks, [*report.remarks, *warnings, *target.remarks])


def _build_matrix(
    path: Path, fleet: config.FleetSettings, force: bool, progress: Progress
) -> Output:
    """Build a fleet; fails if an engine failed."""
    from van_deploy.building import build_fleet
    from van_deploy.report.sections_model import build_blocks, cell_name

    report = build_fleet(
        path,
        fleet,
        force=force,
        progress=progress,
        on_outcome=lambda count, total, outcome: print_note(
            f"[{count}/{total}] {cell_name(plain(outcome.cell))}: {outcome.outcome}"
        ),
    )
    failure = None
    if report.errors:
        failure = ConversionError(
            f"{len(report.errors)} of {len(report.outcomes)} engines failed.",
            f"Run the same command again to resume. The first failure: {report.errors[0]}",
        )
    return Output(report, build_blocks, failure=failure)


def run(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe (van_b1, van_digits, mine.toml), or a model as in `export`."),
    ],
    changes: Annotated[Changes, RUN],
    options: Annotated[cli.OptionValues, config.RunSettings],
    progress: Progress,
    output: cli.OutputFolder = None,
) -> Output:
    """Run a recipe: export, quantise, build engines, verify and evaluate.

    Example: van-deploy run mine.toml --output dist/mine
    """
    from van_deploy import api
    from van_deploy.recipe import resolve_recipe
    from van_deploy.report.sections_model import run_blocks

    result = api.run_recipe(resolve_recipe(recipe, changes), output, progress=progress, **options)
    failure = GateFailed(
        f"The bundle '{result.bundle.path}' was written and does not pass its gates.",
        "See the rows above; `van-deploy drift` finds the module.",
    )
    notes = [f"note: {note}" for note in result.export.notes]
    return Output(result, run_blocks, notes, None if result else failure)
