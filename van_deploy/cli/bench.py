"""``van-deploy bench``: how fast each artefact is in each run time, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, plain, progress, remark
from van_deploy.cli.opening import RequireSignature, open_bundle

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.bench.settings import Settings
    from van_deploy.bundle import Bundle

__all__ = ["bench", "integers"]

WHAT = "What to run"
HOW = "How long"


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle, such as dist/van_b1.")],
    batches: Annotated[
        str, typer.Option(help="Batch sizes, such as 1,8,32.", rich_help_panel=WHAT)
    ] = "1,8",
    runners: Annotated[
        str,
        typer.Option(
            help="Only these, such as 'pytorch,ort-cpu,openvino/int8-cpu'; * is any text.",
            rich_help_panel=WHAT,
        ),
    ] = "",
    reference: Annotated[
        str, typer.Option(help="What ratios are against.", rich_help_panel=WHAT)
    ] = "pytorch",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of each runner; all cores by default.", rich_help_panel=WHAT),
    ] = None,
    streams: Annotated[
        int, typer.Option(help="Calls in flight at the same time.", rich_help_panel=WHAT)
    ] = 1,
    image_size: Annotated[
        str,
        typer.Option(help="Other sides of the input, such as 192,224.", rich_help_panel=WHAT),
    ] = "",
    p99_ms: Annotated[
        float | None,
        typer.Option(
            help="Find each runner's best batch with p99 below this.", rich_help_panel=WHAT
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Only print the limits on paper of a GPU: l4, a10, a100, h100 ...",
            rich_help_panel=WHAT,
        ),
    ] = "",
    seconds: Annotated[
        float,
        typer.Option(help="Timed at least, a runner and batch.", rich_help_panel=HOW),
    ] = 3.0,
    calls: Annotated[int, typer.Option(help="Calls at least.", rich_help_panel=HOW)] = 100,
    limit: Annotated[
        float,
        typer.Option(help="Seconds at most, settled or not.", rich_help_panel=HOW),
    ] = 10.0,
    rounds: Annotated[
        int, typer.Option(help="Rounds --seconds are spread over.", rich_help_panel=HOW)
    ] = 30,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Go on until a ratio's 95 % interval is within this many percent.",
            rich_help_panel=HOW,
        ),
    ] = 2.0,
    warmup: Annotated[
        float, typer.Option(help="Unmeasured seconds before the first round.", rich_help_panel=HOW)
    ] = 1.0,
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
    """Time every artefact in every run time that is here, each in a process of its own.

    Example: van-deploy bench dist/van_b1 --batches 1,8,32
    """
    from van_deploy.bench.budget import Budget
    from van_deploy.bench.settings import Settings

    opened = open_bundle(bundle, require_signature)
    settings = Settings(
        batches=integers("--batches", batches),
        threads=threads,
        streams=streams,
        image_sizes=integers("--image-size", image_size) if image_size else (),
        runners=tuple(name.strip() for name in runners.split(",") if name.strip()),
        reference=reference,
        p99_ms=p99_ms,
        budget=Budget(seconds, calls, max(limit, seconds), rounds, warmup, tolerance),
    )
    if device:
        _print_limits(opened, device, settings, as_json)
    else:
        _measure(opened, settings, compare, output, save, as_json)


def integers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers in ``1,8,32``.

    Raises:
        UsageError: they are not.
    """
    from van_deploy.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} '{text}' is not a list of whole numbers.",
            f"Write them with commas: {option} 1,8,32.",
        ) from None


def _measure(
    bundle: Bundle,
    settings: Settings,
    compare: Path | None,
    output: Path | None,
    save: bool,
    as_json: bool,
) -> None:
    from van_deploy.bench.benchmark import benchmark_bundle
    from van_deploy.bench.compare import agreement, compare_reports, read_report
    from van_deploy.bench.store import save_report
    from van_deploy.report.bench_changes import change_table
    from van_deploy.report.bench_view import bench_tables
    from van_deploy.report.tables import stack

    old = read_report(compare) if compare else None
    with progress() as bar:
        task = bar.add_task("Looking for runners", total=None)
        report = benchmark_bundle(
            bundle, settings, progress=lambda text: bar.update(task, description=text)
        )
    result = plain(report.as_dict())
    if not isinstance(result, dict):
        raise TypeError("a report is a mapping")
    save_report(result, bundle if save else None, output)
    changes = compare_reports(old, result) if old else []
    if changes:
        result["changes"] = plain(changes)
        result["agreement"] = agreement(changes)
    if as_json:
        for warning in result["warnings"]:
            remark(f"warning: {warning}")

    def table(values: dict[str, Any]) -> RenderableType:
        return stack(
            bench_tables(values), change_table(changes, agreement(changes)) if changes else None
        )

    emit(result, as_json, table)


def _print_limits(bundle: Bundle, device: str, settings: Settings, as_json: bool) -> None:
    from van_deploy.bench.limits import paper_limits
    from van_deploy.report.bench_view import limits_table

    result = paper_limits(bundle, device, settings.batches)
    emit(result, as_json, lambda r: limits_table(device, r["source"], r["limits"]))
