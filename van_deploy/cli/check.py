"""``van-deploy check``: the gates and a committed baseline, for CI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, progress, remark
from van_deploy.cli.opening import (
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

    from van_deploy.checks.regression import CheckReport

__all__ = ["check"]

FILES = "What is written"
WHAT = "What is measured"


def check(
    bundle: BundlePath,
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
    allow_skip: Annotated[
        bool,
        typer.Option("--allow-skip", help="Pass although this machine could not check everything."),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to compare on. By default sample photographs.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="How many images; by default 32, or the largest batch.", rich_help_panel=WHAT
        ),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Folder of labelled images to evaluate on.", rich_help_panel=WHAT),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Labels file for --evaluate.", rich_help_panel=WHAT),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Also compare speed, as ratios only.", rich_help_panel=WHAT),
    ] = False,
    runner: RunnerName = "ort-cpu",
    trust_engine: TrustEngine = False,
    recipe: RecipeName = "",
    weights: WeightsPath = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle against its gates and a baseline; ends with 1 if anything is worse.

    Example: van-deploy check dist/van_b1 --baseline baseline.json --junit junit.xml
    """
    from van_deploy.errors import GateFailed
    from van_deploy.recipe import EvaluateSettings

    gates = gates_of(recipe)
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        from van_deploy.checks.baseline import read_baseline, write_baseline
        from van_deploy.checks.measure import measure_bundle

        known = None if update else read_baseline(baseline)
        found, loaded = opened(bundle, weights, require_signature)
        bar.update(task, description="Preparing images")
        measured = measure_bundle(
            found,
            loaded,
            pictures_for(found, loaded, images, count),
            labelled=EvaluateSettings(evaluate, labels),
            gates=gates,
            execution=execution_by(runner, trust_engine),
            speed=speed,
            progress=lambda text: bar.update(task, description=text),
        )
        report = measured.check(known, allow_skip=allow_skip or update)
    _write(report, junit, summary)
    emit(_plain(report), as_json, lambda _: _table(report))
    if not report:
        raise GateFailed(_failed(report), "See the rows above.")
    if update:
        write_baseline(baseline, measured.baseline())
        remark(f"Wrote {baseline}; look at it and commit it.")


def _write(report: CheckReport, junit: Path | None, summary: Path | None) -> None:
    from van_deploy.files import write_atomic
    from van_deploy.report.junit import junit_from_check
    from van_deploy.report.summary import summary_from_check

    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(junit, junit_from_check(report))
    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        with summary.open("a", encoding="utf-8") as file:  # GitHub's own file is appended to
            file.write(summary_from_check(report))


def _plain(report: CheckReport) -> Any:
    from van_deploy.checks.record import jsonable

    return jsonable(report.as_dict())


def _table(report: CheckReport) -> RenderableType:
    from van_deploy.report.gates_view import check_tables

    return check_tables(report)


def _failed(report: CheckReport) -> str:
    failed, skipped = report.having("failed"), report.having("skipped")
    if failed:
        noun = "row" if len(failed) == 1 else "rows"
        shown = ", ".join(row.name for row in failed[:5])
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        return f"{len(failed)} {noun} failed: {shown}{more}."
    if skipped:
        noun = "row" if len(skipped) == 1 else "rows"
        return (
            f"{len(skipped)} {noun} could not be checked on this machine "
            f"({skipped[0].name}: {skipped[0].message}); --allow-skip would let that pass."
        )
    return "Nothing was checked."
