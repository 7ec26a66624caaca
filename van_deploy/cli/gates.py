"""Gates: ``verify``, ``evaluate``, ``drift`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import Output
from van_deploy.cli.options import OpenBundle, OptionValues
from van_deploy.config import CheckSettings, DriftSettings, EvaluationSettings, VerifySettings
from van_deploy.errors import GateFailed
from van_deploy.report import sections_checks as sections

if TYPE_CHECKING:
    from van_deploy.checks.gates import GateReport


def _failure(report: GateReport, done: str) -> GateFailed | None:
    if report:
        return None
    findings = report.named_findings()
    is_wrong = done != "checked" and any(f.outcome.value == "fail" for _, f in findings)
    remedy = "See the rows above" + "; `van-deploy drift` finds the module" * is_wrong + "."
    return GateFailed(sections.failure_text(report, done), remedy)


def verify(bundle: OpenBundle, options: Annotated[OptionValues, VerifySettings]) -> Output:
    """Compare every artifact with PyTorch: logits, batch sizes, label flips, and each module.

    Example: van-deploy verify dist/van_b1 --against weights --images val/
    """
    report, names = bundle.verify(**options), bundle.manifest.class_names
    failure = _failure(report, "verified")
    return Output(
        report, lambda document: sections.verify_blocks(document, names), bundle.remarks, failure
    )


def evaluate(bundle: OpenBundle, options: Annotated[OptionValues, EvaluationSettings]) -> Output:
    """Measure top-1 and top-5 of PyTorch and every artifact, and the loss of accuracy.

    Example: van-deploy evaluate dist/van_b1 --images val/
    """
    report = bundle.evaluate(**options)
    return Output(report, sections.evaluate_blocks, bundle.remarks, _failure(report, "evaluated"))


def drift(
    bundle: OpenBundle,
    options: Annotated[OptionValues, DriftSettings],
    top: Annotated[
        int, typer.Option(min=0, help="Parts to show per artifact; 0 for all, in network order.")
    ] = 10,
) -> Output:
    """Show the error of each stage, block or module of each ONNX artifact.

    Example: van-deploy drift dist/van_b1 --level module --top 10
    """
    report = bundle.drift(**options)
    return Output(report, lambda document: sections.drift_blocks(document, top), bundle.remarks)


def check(
    bundle: OpenBundle,
    options: Annotated[OptionValues, CheckSettings],
    baseline: Annotated[Path, typer.Option(help="The committed baseline.json.")],
    update: Annotated[
        bool, typer.Option("--update", help="Write the measured values to the baseline.")
    ] = False,
    junit: Annotated[
        Path | None, typer.Option(help="Write JUnit XML.", rich_help_panel="Files")
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            help="Append a summary in GitHub's Markdown, such as to $GITHUB_STEP_SUMMARY.",
            rich_help_panel="Files",
        ),
    ] = None,
) -> Output:
    """Check a bundle against its gates and a baseline; exit code 1 if a value is worse.

    Example: van-deploy check dist/van_b1 --baseline baseline.json --update
    """
    report = bundle.check(baseline, update=update, **options)
    from van_deploy.report.files import append_summary, write_junit

    if junit is not None:
        write_junit(report, junit)
    if summary is not None:
        append_summary(report, summary)
    notes = [f"Wrote {baseline}; review and commit it."] if update and report else []
    return Output(report, sections.check_blocks, notes, _failure(report, "checked"))
