"""What a bundle is held against: ``verify``, ``evaluate``, ``drift`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import CommandOutput
from van_deploy.cli.options import Opened, OptionValues
from van_deploy.config import CheckSettings, DriftSettings, EvaluationSettings, VerifySettings
from van_deploy.errors import GateFailed

if TYPE_CHECKING:
    from van_deploy.checks.evaluate import EvaluateReport
    from van_deploy.checks.regression import CheckReport
    from van_deploy.checks.verify import VerifyReport

FILES = "What is written"
MODULE = "See the rows above; `van-deploy drift` names the module."


def _failure(
    report: VerifyReport | EvaluateReport | CheckReport, done: str, remedy: str = MODULE
) -> GateFailed | None:
    from van_deploy.report.sections_checks import failure_text

    if report:
        return None
    return GateFailed(failure_text(report.named_findings(), report.allowed, done), remedy)


def verify(bundle: Opened, options: Annotated[OptionValues, VerifySettings]) -> CommandOutput:
    """Compare every artifact with PyTorch: logits, batch sizes, flips, and module by module.

    Example: van-deploy verify dist/van_b1 --images photos/
    """
    report, names = bundle.verify(**options), bundle.manifest.class_names
    from van_deploy.report.sections_checks import verify_blocks

    failure = _failure(report, "verified")
    return CommandOutput(report, lambda found: verify_blocks(found, names), bundle.remarks, failure)


def evaluate(bundle: Opened, options: Annotated[OptionValues, EvaluationSettings]) -> CommandOutput:
    """Measure top-1 and top-5 of PyTorch and every artifact, and what was lost between them.

    Example: van-deploy evaluate dist/van_b1 --images imagenet/val
    """
    report = bundle.evaluate(**options)
    from van_deploy.report.sections_checks import evaluate_blocks

    return CommandOutput(report, evaluate_blocks, bundle.remarks, _failure(report, "evaluated"))


def drift(
    bundle: Opened,
    options: Annotated[OptionValues, DriftSettings],
    top: Annotated[
        int,
        typer.Option(
            min=0, help="How many parts of each artifact to show; 0 for all, in their order."
        ),
    ] = 10,
) -> CommandOutput:
    """Show what each stage, block or module of each ONNX artifact adds to the error.

    Example: van-deploy drift dist/van_b1 --level module --top 10
    """
    report = bundle.drift(**options)
    from van_deploy.report.sections_checks import drift_blocks

    return CommandOutput(report, lambda found: drift_blocks(found, top), bundle.remarks)


def check(
    bundle: Opened,
    options: Annotated[OptionValues, CheckSettings],
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
) -> CommandOutput:
    """Check a bundle against its gates and a baseline; ends with 1 if anything is worse.

    Example: van-deploy check dist/van_b1 --baseline baseline.json --junit junit.xml
    """
    report = bundle.check(baseline, update=update, **options)
    from van_deploy.report.files import append_summary, write_junit
    from van_deploy.report.sections_checks import check_blocks

    if junit is not None:
        write_junit(report, junit)
    if summary is not None:
        append_summary(report, summary)
    wrote = [f"Wrote {baseline}; look at it and commit it."] if update and report else []
    failure = _failure(report, "checked", "See the rows above.")
    return CommandOutput(report, check_blocks, wrote, failure)
