"""Two benchmarks of the same files as a table for a terminal: what changed, and what moved."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from van_deploy.bench.document import Agreement, BenchReport, Change
from van_deploy.report.bench_view import bench_tables, ms_text
from van_deploy.report.tables import Column, notes, rows_table, stack

__all__ = ["bench_and_changes", "change_table"]


def bench_and_changes(report: BenchReport) -> RenderableType:
    """Return a benchmark, and below it what changed since an older one."""
    agreed = report.agreement
    return stack(bench_tables(report), change_table(report.changes, agreed) if agreed else None)


def change_table(changes: Iterable[Change], agreed: Agreement) -> RenderableType:
    """Return one line a row that two benchmarks have in common, and in how many they agree."""
    columns = (
        "runner",
        Column("batch", "right"),
        Column("size", "right"),
        Column("before ms", "right"),
        Column("after ms", "right"),
        Column("times faster", "right"),
        Column("ratio change", "right"),
        Column("open", "right"),
        "file",
    )
    rows = (
        (
            change.contender,
            change.batch,
            change.image_size,
            ms_text(change.before_ms),
            ms_text(change.after_ms),
            f"{change.speedup:.3f}",
            _moved_text(change),
            None if change.uncertainty_percent is None else f"{change.uncertainty_percent:.1f} %",
            "same" if change.same_file else "another",
        )
        for change in changes
    )
    title = "Compared with the older benchmark (open: what both ratios' intervals leave open)"
    return stack(rows_table(columns, rows, title), _agreement_notes(agreed))


def _moved_text(change: Change) -> Text | None:
    if change.ratio_change_percent is None:
        return None
    return Text(f"{change.ratio_change_percent:+.1f} %", style="bold red" if change.moved else "")


def _agreement_notes(agreed: Agreement) -> RenderableType | None:
    if not agreed.ratios:
        return None
    limit = f"{agreed.within_percent:g} %"
    said = [
        f"{agreed.within} of {agreed.ratios} ratios agree within {limit}; the largest "
        f"change is {agreed.worst_percent:+.1f} %, {agreed.worst}"
    ]
    if agreed.open:
        said.append(
            f"{agreed.open} changed by more, but by no more than their intervals leave open: "
            "measure longer (--limit)"
        )
    said += [f"{name} moved by more than {limit} and its uncertainty" for name in agreed.moved]
    return notes(said, "OK" if agreed.within == agreed.ratios else "WARNING")
