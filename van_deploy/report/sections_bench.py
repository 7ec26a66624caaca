"""Blocks of a benchmark: latency, throughput, roofline, and changes since an older benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.config.sizes import format_size
from van_deploy.report.document import Block, Entry, Plot, ms_text, notices, properties, table
from van_deploy.report.plots import Mark, colours, rows_chart, xy_chart


def bench_blocks(report: Entry) -> list[Block]:
    """Return the result of a benchmark."""
    rows, best = timed_rows(report), (report["best_under_p99"] or {}).items()
    limit = f"{report['settings']['p99_ms']} ms"
    failed = [row for row in report["rows"] if row["error"]]
    profiles = [(name, line) for name, lines in report["profiles"].items() for line in lines]
    sizes = report["settings"]["image_sizes"]
    profiled_size = f", {format_size(sizes[-1])} pixels" if sizes else ""
    return [
        *properties(
            report,
            "model; CPU = machine.cpu.name; cores = machine.cpu.cores_allowed; "
            "CPU features = machine.cpu.features; GPU = machine.gpus.0.name; settings.device; "
            "date; threads per runner = settings.threads; settings.streams; versions; images; "
            "duration s = seconds.wall .0f; timed s = seconds.timed .1f; reference",
        ),
        *notices("WARNING", report["warnings"]),
        *(_plots(rows) if rows else ()),
        *table(
            sorted(rows, key=lambda r: (format_size(r["image_size"]), r["batch"], -r["rate"])),
            "runner = contender name; batch d; size name; p50 ms = latency.p50_ms ms; "
            "p90 ms = latency.p90_ms ms; p99 ms = latency.p99_ms ms; images/s = images_per_s ,.1f; "
            "faster (95 %) = ratio ratio; rounds number",
            "Ratios are paired by round; rounds: undisturbed of all, * if a ratio did not converge",
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
            [(name, row) for name, row in best if row],
            "runner = 0 name; 1.batch d; p99 ms = 1.latency.p99_ms ms; "
            "images/s = 1.images_per_s ,.1f",
            f"Best batch with p99 below {limit}",
        ),
        *notices("NO", (f"{name}: no p99 below {limit}" for name, row in best if row is None)),
        *table(
            rows,
            "runner = contender name; batch d; size name; load s = load_s .2f; "
            "first call ms = first_call_ms ms; peak RAM = peak_rss_bytes bytes; "
            "calls = latency.calls d; CV % = latency.cv_percent .1f",
            "Loading, memory, and variation (CV: standard deviation over mean of all calls)",
        ),
        *_roofline(report),
        *table(
            profiles,
            "runner = 0 name; 1.kind; 1.ms ms; % = 1.percent .1f; 1.calls .0f",
            f"Time by type of layer at each runner's largest batch{profiled_size}",
        ),
        *notices("SKIPPED", (f"{name}: {reason}" for name, reason in report["skipped"].items())),
        *table(
            _with_size(report["changes"]),
            "runner = contender name; batch d; size name; before_ms ms; after_ms ms; "
            "ratio change % = ratio_change_percent +.1f; uncertainty % = uncertainty_percent .1f; "
            "changed name; same_file name",
            "Compared with the older benchmark (uncertainty: of both ratios' intervals; "
            "changed: by more than that and by more than 5 %)",
        ),
    ]


def timed_rows(report: Entry) -> list[dict[str, Any]]:
    """Return the timed rows, each with its artifact, latency, rate, and size if several."""
    return [
        {
            **row,
            "artifact": row["contender"].partition("/")[2] or "pytorch",
            "p50": float(row["latency"]["p50_ms"]),
            "rate": float(row["images_per_s"] or 0.0),
            "rounds": f"{row['quiet_rounds']} of {row['rounds']}{'*' * (row['settled'] is False)}"
            * bool(row["rounds"]),
        }
        for row in _with_size([row for row in report["rows"] if row["latency"]])
    ]


def _with_size(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return rows with the image size as ``size`` if there are several sizes."""
    sizes = [format_size(row["image_size"]) for row in rows]
    several = len(set(sizes)) > 1
    return [{**r, "size": size if several else ""} for r, size in zip(rows, sizes, strict=True)]


def _roofline(report: Entry) -> list[Block]:
    ceilings = report["ceilings"] or {"ops_per_s": {}, "bytes_per_s": 0.0}
    known, memory = ceilings["ops_per_s"].items(), ceilings["bytes_per_s"] / 1e9
    rates = "".join(f"{kind} {rate / 1e9:,.0f} G operations/s, " for kind, rate in known)
    return _limits_table(report["roofline"], f"Roofline: measured {rates}memory {memory:.1f} GB/s")


def limits_blocks(limits: Entry) -> list[Block]:
    """Return the theoretical limits of a device, one row per graph and batch size."""
    rows = [{**one, "rate": 1e3 * one["batch"] / one["least_ms"]} for one in limits["limits"]]
    device, source = limits["device"].upper(), limits["ceilings"]["source"]
    return _limits_table(rows, f"Theoretical limits of {device} ({source}), not measured")


def _limits_table(rows: Sequence[Entry], title: str) -> list[Block]:
    return table(
        _with_size(rows),
        "runner = contender name; precision name; batch d; size name; operations count; "
        "minimum ms = least_ms ms; maximum images/s = rate ,.0f; limit = bound name; "
        "% of limit = percent_of_limit .0f; unfused memory ms = unfused_ms ms",
        title,
    )


def _plots(rows: Sequence[Entry]) -> list[Block]:
    """Return latency at the smallest batch, and latency against batch if there are several."""
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
    for artifact, fast in _fastest_runners(rows).items():
        same = [row for row in rows if row["contender"] == fast["contender"]]
        points = [Mark("", row["batch"], row["p50"], colour=colour[artifact]) for row in same]
        lines[fast["contender"]] = sorted(points, key=lambda point: point.x)
    svg = xy_chart(lines, "batch", "latency, median (ms)")
    caption = "Latency of one call against batch: each artifact with its fastest runner."
    return [*blocks, *[Plot(svg, caption)] * (len(batches) > 1)]


def _fastest_runners(rows: Sequence[Entry]) -> dict[str, Entry]:
    """Return each artifact's row with the highest rate at the largest batch, fastest first."""
    batch, fastest = max((row["batch"] for row in rows), default=0), dict[str, Entry]()
    for row in sorted((row for row in rows if row["batch"] == batch), key=lambda r: -r["rate"]):
        fastest.setdefault(row["artifact"], row)
    return fastest


def tradeoff_plots(accuracies: Mapping[str, Entry], report: Entry) -> list[Block]:
    """Return a plot of throughput against accuracy, for artifacts with both."""
    best, colour, series = _fastest_runners(timed_rows(report)), colours(accuracies), {}
    both = [{**accuracies[name], **best[name]} for name in accuracies if name in best]
    for row in both:
        ends, own = [100 * end for end in row["top1_interval"]], colour[row["artifact"]]
        point = Mark("", row["rate"], 100 * row["top1"], colour=own, interval=ends)
        series[row["contender"]] = [point]
    batch = max((row["batch"] for row in both), default=0)
    svg = xy_chart(series, f"images/s at batch {batch}", "top-1 (%)")
    caption = "each artifact with its fastest runner; the whiskers are 95 % intervals"
    return [Plot(svg, f"Throughput against accuracy: {caption}.")] * bool(both)
