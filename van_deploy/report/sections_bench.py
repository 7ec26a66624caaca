"""A benchmark as blocks: latency, throughput, limits, and what changed since an older one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.config.sizes import format_size
from van_deploy.report.document import Block, Entry, Plot, ms_text, notices, properties, table
from van_deploy.report.plots import Mark, colours, rows_chart, xy_chart


def bench_blocks(report: Entry) -> list[Block]:
    """Return everything a person wants to see of a benchmark."""
    rows = measured(report)
    failed = [row for row in report["rows"] if row["error"]]
    profiles = [(name, line) for name, lines in report["profiles"].items() for line in lines]
    return [
        *properties(
            report,
            "model; CPU = machine.cpu.name; cores = machine.cpu.cores_allowed; "
            "CPU features = machine.cpu.features; GPU = machine.gpus.0.name; settings.device; "
            "date; threads a runner = settings.threads; settings.streams; versions; images; "
            "took s = seconds.wall .0f; timed s = seconds.timed .0f; ratios against = reference",
        ),
        *notices("WARNING", report["warnings"]),
        *(_plots(rows) if rows else ()),
        *table(
            sorted(rows, key=lambda r: (format_size(r["image_size"]), r["batch"], -r["rate"])),
            "runner = contender name; batch d; size name; p50 ms = latency.p50_ms ms; "
            "p90 ms = latency.p90_ms ms; p99 ms = latency.p99_ms ms; images/s = images_per_s ,.1f; "
            "faster (95 %) = ratio ratio; rounds number",
            "Ratios are paired by round; rounds: quiet ones of all, * where a ratio did not settle",
        ),
        *notices("FAIL", (f"{r['contender']} at batch {r['batch']}: {r['error']}" for r in failed)),
        *table(
            (row for row in report["rows"] if row["gpu"]),
            "runner = contender name; batch d; queued_ms ms; upload_ms ms; download_ms ms; "
            "SM MHz = gpu.sm_mhz .0f; W = gpu.power_w .0f; °C = gpu.temperature_c .0f; "
            "slowed by = throttled",
            "On the GPU",
        ),
        *table(
            (report["best_under_p99"] or {}).items(),
            "runner = 0 name; 1.batch d; p99 ms = 1.latency.p99_ms ms; "
            "images/s = 1.images_per_s ,.1f",
            f"Best batch with p99 below {report['settings']['p99_ms']} ms",
        ),
        *table(
            rows,
            "runner = contender name; batch d; size name; load s = load_s .2f; "
            "first call ms = first_call_ms ms; peak RAM = peak_rss_bytes bytes; "
            "calls = latency.calls d; CV % = latency.cv_percent .1f",
            "Loading, memory, and unsteadiness (CV: deviation over mean of all calls)",
        ),
        *_roofline(report),
        *table(
            profiles,
            "runner = 0 name; 1.kind; 1.ms ms; % = 1.percent .1f; 1.calls .0f",
            "Time by kind of layer at the largest batch",
        ),
        *notices("SKIPPED", (f"{name}: {reason}" for name, reason in report["skipped"].items())),
        *table(
            _sized(report["changes"]),
            "runner = contender name; batch d; size name; before_ms ms; after_ms ms; "
            "ratio change % = ratio_change_percent +.1f; open % = uncertainty_percent .1f; "
            "moved name; same_file name",
            "Compared with the older benchmark (open: what both ratios' intervals leave open; "
            "moved: by more than that and by more than 5 %)",
        ),
    ]


def measured(report: Entry) -> list[dict[str, Any]]:
    """Return the rows that were timed, each with its artifact, figures, and size if they differ."""
    return [
        {
            **row,
            "artifact": row["contender"].partition("/")[2] or "pytorch",
            "p50": float(row["latency"]["p50_ms"]),
            "rate": float(row["images_per_s"] or 0.0),
            "rounds": f"{row['quiet_rounds']} of {row['rounds']}{'*' * (row['settled'] is False)}",
        }
        for row in _sized([row for row in report["rows"] if row["latency"]])
    ]


def _sized(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return rows with the image size as ``size`` where there are several."""
    sizes = [format_size(row["image_size"]) for row in rows]
    several = len(set(sizes)) > 1
    return [{**r, "size": size if several else ""} for r, size in zip(rows, sizes, strict=True)]


def _roofline(report: Entry) -> list[Block]:
    ceilings = report["ceilings"] or {"ops_per_s": {}, "bytes_per_s": 0.0}
    known, memory = ceilings["ops_per_s"].items(), ceilings["bytes_per_s"] / 1e9
    rates = "".join(f"{kind} {rate / 1e9:,.0f} G operations/s, " for kind, rate in known)
    return _reached(report["roofline"], f"Roofline: measured {rates}memory {memory:.1f} GB/s")


def limits_blocks(limits: Entry) -> list[Block]:
    """Return the limits on paper of a device that is not at hand, one line a graph and batch."""
    rows = [{**one, "rate": 1e3 * one["batch"] / one["least_ms"]} for one in limits["limits"]]
    device, source = limits["device"].upper(), limits["ceilings"]["source"]
    return _reached(rows, f"Limits on paper of {device} ({source}); nothing here was measured")


def _reached(rows: Sequence[Entry], title: str) -> list[Block]:
    return table(
        _sized(rows),
        "runner = contender name; precision name; batch d; size name; operations count; "
        "least ms = least_ms ms; most images/s = rate ,.0f; limit = bound name; "
        "reached % = percent_of_limit .0f; ms without fusion = unfused_ms ms",
        title,
    )


def _plots(rows: Sequence[Entry]) -> list[Block]:
    """Return latency at the smallest batch, and latency against batch where there are several."""
    rows = [row for row in rows if row["image_size"] == rows[0]["image_size"]]
    batches = sorted({row["batch"] for row in rows})
    colour = colours(row["artifact"] for row in rows)
    marks = []
    for row in sorted(rows, key=lambda row: row["p50"]):
        if row["batch"] == batches[0]:
            own, p50, p99 = colour[row["artifact"]], row["p50"], row["latency"]["p99_ms"]
            marks.append(Mark(row["contender"], p50, 0.0, f"{ms_text(p50)} ms", own, (p50, p99)))
    caption = f"Latency at batch {batches[0]}: median, whisker to the 99th percentile."
    blocks: list[Block] = [Plot(rows_chart(marks, "latency (ms)"), caption)]
    lines = {}
    for artifact, fast in fastest_runners(rows).items():
        same = [row for row in rows if row["contender"] == fast["contender"]]
        points = [Mark("", row["batch"], row["p50"], colour=colour[artifact]) for row in same]
        lines[fast["contender"]] = sorted(points, key=lambda point: point.x)
    svg = xy_chart(lines, "batch", "latency, median (ms)")
    against = Plot(svg, "Latency of one call against batch: each artifact by its fastest runner.")
    return [*blocks, *[against] * (len(batches) > 1)]


def fastest_runners(rows: Sequence[Entry]) -> dict[str, Entry]:
    """Return each artifact's row of most images a second at the largest batch, fastest first."""
    batch, found = max((row["batch"] for row in rows), default=0), dict[str, Entry]()
    for row in sorted((row for row in rows if row["batch"] == batch), key=lambda r: -r["rate"]):
        found.setdefault(row["artifact"], row)
    return found


def tradeoff_plots(accuracies: Mapping[str, Entry], report: Entry) -> list[Block]:
    """Return throughput against accuracy, of the artifacts that have both."""
    best, colour, series = fastest_runners(measured(report)), colours(accuracies), {}
    both = [{**accuracies[name], **best[name]} for name in accuracies if name in best]
    for row in both:
        ends, own = [100 * end for end in row["top1_interval"]], colour[row["artifact"]]
        point = Mark("", row["rate"], 100 * row["top1"], colour=own, interval=ends)
        series[row["contender"]] = [point]
    batch = max((row["batch"] for row in both), default=0)
    svg = xy_chart(series, f"images/s at batch {batch}", "top-1 (%)")
    words = "each artifact by its fastest runner here; the whiskers are 95 % intervals"
    return [Plot(svg, f"Throughput against accuracy: {words}.")] * bool(both)
