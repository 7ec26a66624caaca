"""``van-deploy drift``: where an artefact leaves the network, by the name of the module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import DriftSettings

__all__ = ["drift"]


@with_options
def drift(
    bundle: BundlePath,
    settings: DriftSettings,
    top: Annotated[
        int,
        typer.Option(
            min=0, help="How many parts of each artefact to show; 0 for all, in their order."
        ),
    ] = 10,
    plot: Annotated[
        Path | None, typer.Option(help="Write the error each part adds as an SVG file.")
    ] = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Show what each stage, block or module of each ONNX artefact adds to the error.

    Example: van-deploy drift dist/van_b1 --level module --top 10
    """
    asked = opened(bundle, require_signature)
    with telling() as tell:
        report = asked.drift(settings, progress=tell)
    from van_deploy.report.files import write_drift_plot
    from van_deploy.report.sections_checks import drift_blocks

    if plot is not None:
        write_drift_plot(report, plot)
        remark(f"Wrote {plot}.")
    for text in asked.remarks:
        remark(f"note: {text}")
    emit(report, as_json, lambda found: drift_blocks(found, top))
