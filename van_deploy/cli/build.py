"""``van-deploy build``: engines from a bundle's ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import Force, RequireSignature, opened
from van_deploy.config import BuildSettings, FleetSettings
from van_deploy.errors import ConversionError, UsageError

__all__ = ["build"]


@with_options
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
    if settings.model_fields_set:
        name = sorted(settings.model_fields_set)[0]
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
                f"[{count}/{total}] {cell_name(outcome.cell)}: {outcome.outcome}"
            ),
        )
    emit(report, as_json, builds_blocks)
    if report.errors:
        raise ConversionError(
            f"{len(report.errors)} of {len(report.outcomes)} engines failed.",
            f"Run the same command again to resume. The first failure: {report.errors[0]}",
        )
