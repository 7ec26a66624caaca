"""``van-deploy bench``: how fast each artefact is in each runtime, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import BenchSettings

__all__ = ["bench"]


@with_options
def bench(
    bundle: BundlePath,
    settings: BenchSettings,
    paper: Annotated[
        str,
        typer.Option(
            "--paper-limits",
            help="Only print the limits on paper of a GPU: l4, a10, a100, h100 ...",
        ),
    ] = "",
    compare: Annotated[
        Path | None, typer.Option(help="An older benchmark's JSON to compare with.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the JSON here, too.")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save/--no-save", help="Keep the result in the bundle (bench.json).")
    ] = True,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Time every artefact in every runtime of a device, each in a process of its own.

    Example: van-deploy bench dist/van_b1 --batches 1,8,32
    """
    from van_deploy.bench.compare import compared
    from van_deploy.bench.document import read_report

    asked = opened(bundle, require_signature)
    if paper:
        from van_deploy.bench.roofline import paper_limits
        from van_deploy.report.sections_bench import limits_blocks

        limits = paper_limits(asked.opened(), paper, settings.batches)
        emit(limits, as_json, limits_blocks)
        return
    old = read_report(compare) if compare else None
    with telling("Looking for runners") as tell:
        report = asked.benchmark(settings, save=save, progress=tell)
    if output is not None:
        from van_deploy.bench.store import save_report

        save_report(report, None, output)
    if old is not None:
        report = compared(old, report)
    if as_json:
        for warning in report.warnings:
            remark(f"warning: {warning}")
    from van_deploy.report.sections_bench import bench_blocks

    emit(report, as_json, bench_blocks)
