"""``van-deploy check``: the gates and a committed baseline, for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import CheckSettings
from van_deploy.errors import GateFailed

__all__ = ["check"]

FILES = "What is written"


@with_options
def check(
    bundle: BundlePath,
    settings: CheckSettings,
    baseline: Annotated[Path, typer.Option(help="The committed baseline.json.")],
    update: Annotated[
        bool, typer.Option("--update", help="Write the baseline from what is measured now.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML.", rich_help_panel=FILES)
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            help="Append a summary in GitHub's Markdown, as to $GITHUB_STEP_SUMMARY.",
            rich_help_panel=FILES,
        ),
    ] = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle against its gates and a baseline; ends with 1 if anything is worse.

    Example: van-deploy check dist/van_b1 --baseline baseline.json --junit junit.xml
    """
    with telling() as tell:
        report = opened(bundle, require_signature).check(
            baseline, settings, update=update, progress=tell
        )
    from van_deploy.report.files import append_summary, write_junit
    from van_deploy.report.sections_checks import check_blocks, failure_text

    if junit is not None:
        write_junit(report, junit)
    if summary is not None:
        append_summary(report, summary)
    emit(report, as_json, check_blocks)
    if not report:
        raise GateFailed(
            failure_text(report.named(), report.allowed, "checked"), "See the rows above."
        )
    if update:
        remark(f"Wrote {baseline}; look at it and commit it.")
