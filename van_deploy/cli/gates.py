"""What a bundle is held against: ``verify``, ``evaluate``, ``drift`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import emit, remark, telling
from van_deploy.cli.shared import AsJson, BundlePath, RequireSignature, opened
from van_deploy.config import CheckSettings, DriftSettings, EvaluationSettings, VerifySettings
from van_deploy.errors import GateFailed

if TYPE_CHECKING:
    from van_deploy.checks.evaluate import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.verify import VerifyReport

FILES = "What is written"
MODULE = "See the rows above; `van-deploy drift` names the module."


def _require_passed(
    report: VerifyReport | EvaluateReport | CheckReport, done: str, remedy: str = MODULE
) -> None:
    from van_deploy.report.sections_checks import failure_text

    if not report:
        raise GateFailed(failure_text(report.named(), report.allowed, done), remedy)


def verify(
    bundle: BundlePath,
    settings: VerifySettings,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Compare every artefact with PyTorch: logits, batch sizes, flips, and module by module.

    Example: van-deploy verify dist/van_b1 --images photos/
    """
    asked = opened(bundle, require_signature)
    with telling() as tell:
        report = asked.verify(settings, progress=tell)
    from van_deploy.report.sections_checks import verify_blocks

    for text in asked.remarks:
        remark(f"note: {text}")
    names = asked.manifest.class_names
    emit(report, as_json, lambda found: verify_blocks(found, names))
    _require_passed(report, "verified")


def evaluate(
    bundle: BundlePath,
    settings: EvaluationSettings,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 of PyTorch and every artefact, and what was lost between them.

    Example: van-deploy evaluate dist/van_b1 --images imagenet/val
    """
    asked = opened(bundle, require_signature)
    with telling() as tell:
        report = asked.evaluate(None, settings, progress=tell)
    from van_deploy.report.sections_checks import evaluate_blocks

    for text in asked.remarks:
        remark(f"note: {text}")
    emit(report, as_json, evaluate_blocks)
    _require_passed(report, "evaluated")


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
    from van_deploy.report.sections_checks import check_blocks

    if junit is not None:
        write_junit(report, junit)
    if summary is not None:
        append_summary(report, summary)
    emit(report, as_json, check_blocks)
    _require_passed(report, "checked", "See the rows above.")
    if update:
        remark(f"Wrote {baseline}; look at it and commit it.")
