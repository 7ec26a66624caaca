"""A benchmark as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from van_deploy.bench.document import BenchReport
from van_deploy.bench.lane import Loading, Row
from van_deploy.bench.machine import Machine
from van_deploy.bench.roofline import PaperLimits
from van_deploy.bench.timing import CV_LIMIT_PERCENT, Ratio
from van_deploy.report.tables import (
    Column,
    bytes_text,
    count_text,
    facts_table,
    notes,
    rows_table,
    stack,
)

__all__ = ["bench_tables", "limits_table", "machine_text", "ms_text", "ratio_text"]


def bench_tables(report: BenchReport) -> RenderableType:
    """Return everything a person wants to see of a benchmark."""
    warnings = notes(report.warnings) if report.warnings else None
    return stack(
        facts_table(_facts(report)),
        _latency_table(report),
        _best_table(report),
        _loading_table(report),
        _roofline_table(report),
        _skipped_table(report),
        warnings,
    )


def machine_text(machine: Machine) -> str:
    """Return the machine on one line."""
    cpu = machine.cpu
    gpus = "".join(f", {gpu.name}" for gpu in machine.gpus)
    special = [f for f in cpu.features if f not in {"fma"}]
    return f"{cpu.name}, {cpu.cores_allowed} cores ({' '.join(special)}){gpus}"


def ratio_text(ratio: Ratio | None) -> str | None:
    """Return a ratio with its 95 % interval.

    >>> ratio_text(Ratio(median=4.132, low=4.0, high=4.31, least=3.9, most=4.4, rounds=30))
    '4.13 (4.00-4.31)'
    """
    if ratio is None:
        return None
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def limits_table(limits: PaperLimits) -> RenderableType:
    """Return the limits on paper of a device that is not at hand, one line a graph and batch."""
    columns = (
        "graph",
        "precision",
        Column("batch", "right"),
        Column("operations", "right"),
        Column("least ms", "right"),
        Column("most images/s", "right"),
        "limit",
        Column("ms without fusion", "right"),
    )
    rows = (
        (
            limit.graph,
            limit.precision,
            limit.batch,
            count_text(limit.operations),
            ms_text(limit.limit.ms),
            f"{1e3 * limit.batch / limit.limit.ms:,.0f}",
            limit.limit.bound,
            ms_text(limit.limit.traffic_ms),
        )
        for limit in limits.limits
    )
    title = (
        f"Limits on paper of {limits.device.upper()} ({limits.source}); nothing here was measured"
    )
    return rows_table(columns, rows, title)


def _facts(report: BenchReport) -> dict[str, object]:
    settings, seconds = report.settings, report.seconds
    return {
        "model": report.model,
        "machine": machine_text(report.machine),
        "threads": f"{report.threads} a runner, {settings.streams} stream(s)",
        "versions": ", ".join(f"{k} {v}" for k, v in report.versions.items()),
        "images": report.images,
        "time": f"{seconds.wall:.0f} s, of which {seconds.timed:.0f} s timed",
        "faster": f"times faster than {report.reference}, paired by round (95 % interval)"
        if report.reference
        else "nothing to compare with",
        "rounds": "that were quiet, of all; * a ratio that did not settle",
    }


def _latency_table(report: BenchReport) -> RenderableType:
    several = len({row.image_size for row in report.rows}) > 1
    columns: list[Column | str] = [
        "runner",
        *([Column("size", "right")] if several else []),
        Column("batch", "right"),
        Column("p50 ms", "right"),
        Column("p90 ms", "right"),
        Column("p99 ms", "right"),
        Column("images/s", "right"),
        Column("faster (95 %)", "right"),
        Column("rounds", "right"),
    ]
    rows = [_latency_row(row, several) for row in _ordered(report.rows)]
    failed = [
        f"{row.contender} at batch {row.batch}: {row.error}" for row in report.rows if row.error
    ]
    return stack(rows_table(columns, rows), notes(failed, "FAIL") if failed else None)


def _ordered(rows: Sequence[Row]) -> list[Row]:
    """Return rows by image size and batch, the fastest first."""
    return sorted(rows, key=lambda r: (r.image_size, r.batch, -(r.images_per_s or 0.0)))


def _latency_row(row: Row, several: bool) -> list[object]:
    latency = row.latency
    size = [row.image_size] if several else []
    if latency is None:
        return [row.contender, *size, row.batch, *[None] * 6]
    return [
        row.contender,
        *size,
        row.batch,
        *(ms_text(ms) for ms in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
        f"{row.images_per_s:,.1f}",
        ratio_text(row.ratio),
        _rounds(row),
    ]


def _rounds(row: Row) -> Text:
    """Return how many rounds were quiet, of all; marked where the ratio did not settle."""
    loose = row.settled is False
    text = f"{sum(row.round_quiet)} of {len(row.round_ms)}{'*' if loose else ''}"
    return Text(text, style="yellow" if loose else "")


def _best_table(report: BenchReport) -> RenderableType | None:
    under = report.best_under_p99
    if under is None:
        return None
    rows = (
        (name, best.batch, ms_text(best.p99_ms), f"{best.images_per_s:,.1f}")
        if best
        else (name, None, None, None)
        for name, best in under.best.items()
    )
    columns = (
        "runner",
        Column("batch", "right"),
        Column("p99 ms", "right"),
        Column("images/s", "right"),
    )
    return rows_table(columns, rows, f"Best batch with p99 below {under.limit_ms:g} ms")


def _loading_table(report: BenchReport) -> RenderableType | None:
    if not report.loading:
        return None
    columns = (
        "runner",
        Column("import s", "right"),
        Column("load s", "right"),
        Column("first call ms", "right"),
        Column("peak RAM", "right"),
        Column("calls", "right"),
        Column("CV %", "right"),
    )
    rows = (_loading_row(name, took, report.rows) for name, took in report.loading.items())
    title = "Loading, memory, and the unsteadiest batch (CV: deviation over mean of all calls)"
    return rows_table(columns, rows, title)


def _loading_row(name: str, took: Loading, rows: Sequence[Row]) -> list[object]:
    own = [row for row in rows if row.contender == name and row.latency]
    figures = [f"{took.import_s:.2f}", f"{took.load_s:.2f}"]
    if not own:
        return [name, *figures, None, None, None, None]
    worst = max(row.times.cv_percent for row in own)
    return [
        name,
        *figures,
        ms_text(own[0].first_call_ms or 0.0),
        bytes_text(max(row.peak_rss_bytes or 0 for row in own)),
        sum(row.times.calls for row in own),
        Text(f"{worst:.1f}", style="yellow" if worst > CV_LIMIT_PERCENT else ""),
    ]


def _roofline_table(report: BenchReport) -> RenderableType | None:
    ceilings = report.ceilings
    if not ceilings or not report.roofline:
        return None
    rates = ", ".join(
        f"{kind} {rate / 1e9:,.0f} G operations/s" for kind, rate in ceilings.ops_per_s.items()
    )
    several = len({entry.image_size for entry in report.roofline}) > 1
    columns: tuple[Column | str, ...] = (
        "runner",
        *([Column("size", "right")] if several else []),
        Column("batch", "right"),
        Column("operations", "right"),
        Column("least ms", "right"),
        "limit",
        Column("reached", "right"),
        Column("ms without fusion", "right"),
    )
    rows = (
        (
            entry.contender,
            *([entry.image_size] if several else []),
            entry.batch,
            count_text(entry.work.operations),
            ms_text(entry.limit.ms),
            entry.limit.bound,
            f"{entry.percent_of_limit:.0f} %",
            ms_text(entry.limit.traffic_ms),
        )
        for entry in report.roofline
    )
    title = f"Roofline: measured {rates}, memory {ceilings.bytes_per_s / 1e9:.1f} GB/s"
    return rows_table(columns, rows, title)


def _skipped_table(report: BenchReport) -> RenderableType | None:
    if not report.skipped:
        return None
    return notes((f"{s.name}: {s.reason}" for s in report.skipped), "SKIPPED")


def ms_text(value: float) -> str:
    """Return milliseconds with three figures, as people read them.

    >>> ms_text(0.4213), ms_text(12.345), ms_text(4321.0)
    ('0.421', '12.3', '4,321')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"
