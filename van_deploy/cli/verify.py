"""``van-deploy verify``: every artefact against the PyTorch network it came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import AsJson, emit, progress, remark
from van_deploy.cli.opening import (
    ArtefactNames,
    BundlePath,
    RecipeName,
    RequireSignature,
    RunnerName,
    TrustEngine,
    WeightsPath,
    execution_by,
    gates_of,
    opened,
    pictures_for,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.checks.verdicts import VerifyReport

__all__ = ["verify"]


def verify(
    bundle: BundlePath,
    runner: RunnerName = "ort-cpu",
    trust_engine: TrustEngine = False,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to compare on. By default sample photographs."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="How many images; by default 32, or the largest batch."),
    ] = None,
    artefact: ArtefactNames = None,
    modules: Annotated[
        bool,
        typer.Option("--modules/--no-modules", help="Also judge each module by itself."),
    ] = True,
    recipe: RecipeName = "",
    weights: WeightsPath = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Compare every artefact with PyTorch: logits, batch sizes, flips, and module by module.

    Example: van-deploy verify dist/van_b1 --images photos/
    """
    from van_deploy.errors import GateFailed

    gates = gates_of(recipe)
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        from van_deploy.checks.record import jsonable, record_check
        from van_deploy.checks.verify import verify_bundle

        found, loaded = opened(bundle, weights, require_signature)
        bar.update(task, description="Preparing images")
        report = verify_bundle(
            found,
            loaded,
            pictures_for(found, loaded, images, count),
            gates=gates,
            artefacts=artefact or (),
            execution=execution_by(runner, trust_engine),
            modules=modules,
            progress=lambda text: bar.update(task, description=text),
        )
        kept = ""
        if require_signature is None:  # what was signed stays as it was signed
            kept = record_check(found, "verify", report.as_dict())
    if kept:
        remark(f"note: {kept}")
    emit(jsonable(report.as_dict()), as_json, lambda _: _table(report, loaded.class_names))
    if not report:
        raise GateFailed(
            _failed(report), "See the rows above; `van-deploy drift` names the module."
        )


def _table(report: VerifyReport, names: tuple[str, ...] | None) -> RenderableType:
    from van_deploy.report.gates_view import verify_tables

    return verify_tables(report, names)


def _failed(report: VerifyReport) -> str:
    if not report.failed:
        return "No artefact could be run on this machine, so nothing was verified."
    names = ", ".join(f"'{verdict.artefact}'" for verdict in report.failed)
    return f"{len(report.failed)} of {len(report.artefacts)} artefacts failed: {names}."
