"""The parts of a report about speed: latency, throughput, accuracy against it, and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from van_deploy.bench.document import BenchReport, BestUnder
from van_deploy.bench.lane import Row
from van_deploy.report.bench_view import machine_text, ms_text, ratio_text
from van_deploy.report.document import Block, Figure, Grid, Section, Text
from van_deploy.report.svg import Axis, Bar, Point, Series, bar_chart, line_chart, scatter
from van_deploy.report.tables import bytes_text, count_text

__all__ = ["fastest", "roofline_section", "speed_section", "tradeoff_section"]

MOST_LINES = 8  # as many as there are colours


def fastest(bench: BenchReport) -> Row | None:
    """Return the row of least latency at the smallest batch of the native image size."""
    rows = bench.measured
    if not rows:
        return None
    batch = min(row.batch for row in rows)
    return min((row for row in rows if row.batch == batch), key=lambda r: r.times.p50_ms)


def speed_section(bench: BenchReport | None) -> Section | None:
    """Return latency and throughput against batch, and every figure as a table."""
    if bench is None:
        return None
    settings, rows = bench.settings, bench.measured
    budget = settings.budget
    where = (
        f"{machine_text(bench.machine)}; {bench.threads} threads, "
        f"{settings.streams} stream(s); {bench.date[:10]}"
    )
    blocks: list[Block] = [
        Text(
            f"Measured on {where}. Each runner in a process of its own, one "
            f"awake at a time, in turns of {1e3 * budget.seconds / budget.rounds:.0f} ms or "
            "one call of the reference, whichever is longer. A ratio is the median "
            "of the rounds' own, each to the reference just before and after, over the rounds in "
            "which nothing else disturbed the processor, with its 95 % "
            f"interval; * marks one that did not settle within "
            f"{budget.tolerance_percent:g} %."
        )
    ]
    if bench.warnings:
        warned = tuple(("WARNING", warning) for warning in bench.warnings)
        blocks.append(Grid(("", "what to keep in mind"), warned))
    blocks += _plots(rows, bench.reference)
    reference = bench.reference or "reference"
    columns = (
        "runner",
        "size",
        "batch",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        f"times {reference}",
        "peak RAM",
        "CV %",
        "calls",
    )
    ordered = sorted(rows, key=lambda r: (r.image_size, r.batch, -r.rate))
    blocks.append(Grid(columns, tuple(map(_row, ordered)), frozenset(range(1, 11))))
    failed = tuple((row.contender, str(row.batch), row.error) for row in bench.rows if row.error)
    if failed:
        blocks.append(Grid(("runner", "batch", "why there are no figures"), failed, frozenset({1})))
    best = bench.best_under_p99
    if best:
        blocks.append(_best(best))
    return Section("Speed", tuple(blocks))


def tradeoff_section(checks: Mapping[str, Any], bench: BenchReport | None) -> Section | None:
    """Return throughput against accuracy, for the artefacts that have both."""
    accuracy = checks.get("evaluate", {}).get("accuracies", {})
    if not accuracy or bench is None:
        return None
    rows = bench.measured
    largest = max((row.batch for row in rows), default=0)
    points = []
    for index, name in enumerate(accuracy, start=1):
        own = [r for r in rows if r.batch == largest and _artefact(r.contender) == name]
        if own:
            best = max(own, key=lambda r: r.rate)
            low, high = (100 * v for v in accuracy[name]["top1_interval"])
            top1 = 100 * accuracy[name]["top1"]
            points.append(Point(best.contender, best.rate, top1, index, low, high))
    if not points:
        return None
    svg = scatter(points, Axis(f"images/s at batch {largest}"), Axis("top-1 (%)", zero=False), 960)
    words = "Each artefact in its fastest run time here; the whiskers are 95 % intervals."
    table = tuple((p.name, f"{p.x:,.1f}", f"{p.y:.2f}") for p in points)
    grid = Grid(("runner", "images/s", "top-1 %"), table, frozenset({1, 2}))
    return Section("Throughput against accuracy", (Figure(svg, words, wide=True), grid))


def roofline_section(bench: BenchReport | None) -> Section | None:
    """Return how near each result is to what the machine could do at best."""
    if bench is None or not bench.ceilings or not bench.roofline:
        return None
    ceilings, entries = bench.ceilings, bench.roofline
    largest = max(entry.batch for entry in entries)
    shown = [e for e in entries if e.batch == largest]
    shown.sort(key=lambda e: -float(e.percent_of_limit))
    bars = [
        Bar(
            e.contender,
            e.percent_of_limit,
            f"{e.percent_of_limit:.0f} %",
            1 if e.limit.bound == "compute" else 3,
        )
        for e in shown
    ]
    rates = "; ".join(
        f"{kind.upper()} {rate / 1e9:,.0f} G operations/s ({ceilings.how.get(kind, '')})"
        for kind, rate in ceilings.ops_per_s.items()
    )
    memory = f"memory {ceilings.bytes_per_s / 1e9:.1f} GB/s ({ceilings.how.get('memory', '')})"
    columns = (
        "runner",
        "size",
        "batch",
        "operations",
        "least ms",
        "limit",
        "reached %",
        "ms if nothing is fused",
    )
    rows = tuple(
        (
            e.contender,
            str(e.image_size),
            str(e.batch),
            count_text(e.work.operations),
            ms_text(e.limit.ms),
            e.limit.bound,
            f"{e.percent_of_limit:.0f}",
            ms_text(e.limit.traffic_ms),
        )
        for e in entries
    )
    words = (
        f"Batch {largest}: share of the least possible time on this machine, set by arithmetic "
        "(blue) or memory (green)."
    )
    return Section(
        "Roofline",
        (
            Text(f"Limits measured in the same run: {rates}; {memory}."),
            Figure(bar_chart(bars, Axis("of the limit (%)"), 960), words, wide=True),
            Grid(columns, rows, frozenset({1, 2, 3, 4, 6, 7})),
        ),
    )


def _plots(rows: Sequence[Row], reference: str | None) -> list[Block]:
    """Return latency and throughput against batch; bars where there is only one batch."""
    if not rows:
        return []
    native = rows[0].image_size
    rows = [row for row in rows if row.image_size == native]
    batches = sorted({row.batch for row in rows})
    names = _fastest_names(rows, batches[-1], reference)
    if len(batches) == 1:
        bars = [_bar(row) for name in names for row in rows if row.contender == name]
        caption = f"Latency at batch {batches[0]}: median, whisker to the 99th percentile."
        return [Figure(bar_chart(bars, Axis("latency (ms)"), 960), caption, wide=True)]
    latency = [Series(name, _line(rows, name, lambda row: row.times.p50_ms)) for name in names]
    images = [Series(name, _line(rows, name, lambda row: row.rate)) for name in names]
    x = Axis("batch", log=True, ticks=tuple(map(float, batches)))
    return [
        Figure(
            line_chart(latency, x, Axis("latency, median (ms)", log=True), 500),
            "Latency of one call against batch.",
        ),
        Figure(line_chart(images, x, Axis("images/s"), 500), "Throughput against batch."),
    ]


def _fastest_names(rows: Sequence[Row], batch: int, reference: str | None) -> list[str]:
    """Return the runners to draw, fastest first; the reference is always among them."""
    ranked = sorted((row for row in rows if row.batch == batch), key=lambda r: -r.rate)
    names = [row.contender for row in ranked]
    if len(names) > MOST_LINES and reference in names[MOST_LINES:]:
        return [*names[: MOST_LINES - 1], str(reference)]
    return names[:MOST_LINES]


def _line(
    rows: Sequence[Row], name: str, figure: Callable[[Row], float]
) -> list[tuple[float, float]]:
    own = sorted((row for row in rows if row.contender == name), key=lambda r: r.batch)
    return [(float(row.batch), figure(row)) for row in own]


def _bar(row: Row) -> Bar:
    latency = row.times
    text = f"{ms_text(latency.p50_ms)} ms"
    return Bar(row.contender, latency.p50_ms, text, 1, latency.p50_ms, latency.p99_ms)


def _row(row: Row) -> tuple[str, ...]:
    latency = row.times
    return (
        row.contender,
        str(row.image_size),
        str(row.batch),
        *(ms_text(ms) for ms in (latency.p50_ms, latency.p90_ms, latency.p99_ms)),
        f"{row.rate:,.1f}",
        (ratio_text(row.ratio) or "-") + ("*" if row.settled is False else ""),
        bytes_text(row.peak_rss_bytes or 0),
        f"{latency.cv_percent:.1f}",
        str(latency.calls),
    )


def _best(best: BestUnder) -> Grid:
    rows = tuple(
        (name, str(b.batch), ms_text(b.p99_ms), f"{b.images_per_s:,.1f}")
        if b
        else (name, "-", "-", "-")
        for name, b in best.best.items()
    )
    caption = f"Best batch with p99 below {best.limit_ms:g} ms"
    return Grid(("runner", "batch", "p99 ms", "images/s"), rows, frozenset({1, 2, 3}), caption)


def _artefact(contender: str) -> str:
    """Return which artefact a contender runs; PyTorch's own is called ``pytorch``."""
    return contender.partition("/")[2] or "pytorch"
