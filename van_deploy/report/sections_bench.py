"""A benchmark as blocks: latency, throughput, limits, and what changed since an older one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.config.sizes import size_text
from van_deploy.report.document import Block, Entry, Facts, Plot, listed, ms_text, notices, table
from van_deploy.report.plots import Axis, Mark, Series, colours, rows_chart, xy_chart

STEADY_PERCENT = 2.5  # deviation over mean of all calls, above which it is marked


def bench_blocks(report: Entry) -> list[Block]:
    """Return everything a person wants to see of a benchmark."""
    rows = measured(report)
    failed = [row for row in report["rows"] if row["error"]]
    profiles = [
        {**line, "runner": name} for name, lines in report["profiles"].items() for line in lines
    ]
    return [
        _facts(report),
        *notices("WARNING", report["warnings"]),
        *_plots(rows),
        *table(
            sorted(rows, key=lambda r: (size_text(r["image_size"]), r["batch"], -r["rate"])),
            "runner = contender name; batch d; size name; p50 ms = latency.p50_ms ms; "
            "p90 ms = latency.p90_ms ms; p99 ms = latency.p99_ms ms; images/s = images_per_s ,.1f; "
            "faster (95 %) = ratio ratio; rounds number",
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
        *_loading(rows),
        *_roofline(report),
        *table(
            profiles,
            "runner name; kind; ms ms; % = percent .1f; calls .0f",
            "Time by kind of layer at the largest batch",
            folded=True,
        ),
        *notices("SKIPPED", (f"{name}: {reason}" for name, reason in report["skipped"].items())),
        *_changes(report),
    ]


def _facts(report: Entry) -> Facts:
    seconds, cpu = report["seconds"], report["machine"]["cpu"]
    special = listed(feature for feature in cpu["features"] if feature != "fma")
    gpus = "".join(f", {gpu['name']}" for gpu in report["machine"]["gpus"])
    compared = f"times faster than {report['reference']}, paired by round (95 % interval)"
    return Facts(
        {
            "model": report["model"],
            "machine": f"{cpu['name']}, {cpu['cores_allowed']} cores ({special}){gpus}",
            "device": report["settings"]["device"],
            "date": report["date"][:10],
            "threads": "{threads} a runner, {streams} stream(s)".format(**report["settings"]),
            "versions": report["versions"],
            "images": report["images"],
            "time": f"{seconds['wall']:.0f} s, of which {seconds['timed']:.0f} s timed",
            "faster": compared if report["reference"] else "nothing to compare with",
            "rounds": "that were quiet, of all; * a ratio that did not settle",
        }
    )


def measured(report: Entry) -> list[dict[str, Any]]:
    """Return the rows that were timed, each with its artifact, figures, and size if they differ."""
    return [
        {
            **row,
            "artefact": row["contender"].partition("/")[2] or "pytorch",
            "p50": float(row["latency"]["p50_ms"]),
            "rate": float(row["images_per_s"] or 0.0),
            "rounds": f"{row['quiet_rounds']} of {row['rounds']}{'*' * (row['settled'] is False)}",
        }
        for row in _sized([row for row in report["rows"] if row["latency"]])
    ]


def _sized(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return rows with the image size as ``size`` where there are several."""
    sizes = [size_text(row["image_size"]) for row in rows]
    several = len(set(sizes)) > 1
    return [{**r, "size": size if several else ""} for r, size in zip(rows, sizes, strict=True)]


def _loading(rows: Sequence[Entry]) -> list[Block]:
    lines = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        cv = max(row["latency"]["cv_percent"] for row in own)
        figures = {
            "bytes": max(row["peak_rss_bytes"] or 0 for row in own),
            "calls": sum(row["latency"]["calls"] for row in own),
            "cv": f"{cv:.1f}{'*' * (cv > STEADY_PERCENT)}",
        }
        lines.append({**own[0], **figures})
    return table(
        lines,
        "runner = contender name; load s = load_s .2f; first call ms = first_call_ms ms; "
        "peak RAM = bytes bytes; calls d; CV % = cv number",
        "Loading, memory, and the unsteadiest batch (CV: deviation over mean of all calls)",
    )


def _roofline(report: Entry) -> list[Block]:
    if not report["ceilings"]:
        return []
    known = report["ceilings"]["ops_per_s"].items()
    rates = [f"{kind} {rate / 1e9:,.0f} G operations/s" for kind, rate in known]
    rates.append(f"memory {report['ceilings']['bytes_per_s'] / 1e9:.1f} GB/s")
    return table(
        _sized(report["roofline"]),
        "runner = contender name; batch d; size name; operations count; least ms = least_ms ms; "
        "limit = bound name; reached % = percent_of_limit .0f; ms without fusion = unfused_ms ms",
        f"Roofline: measured {', '.join(rates)}",
    )


def limits_blocks(limits: Entry) -> list[Block]:
    """Return the limits on paper of a device that is not at hand, one line a graph and batch."""
    rows = [{**one, "rate": 1e3 * one["batch"] / one["least_ms"]} for one in limits["limits"]]
    device, source = limits["device"].upper(), limits["ceilings"]["source"]
    return table(
        rows,
        "graph = contender name; precision name; batch d; operations count; "
        "least ms = least_ms ms; most images/s = rate ,.0f; limit = bound name; "
        "ms without fusion = unfused_ms ms",
        f"Limits on paper of {device} ({source}); nothing here was measured",
    )


def _changes(report: Entry) -> list[Block]:
    """Return what changed since an older benchmark."""
    rows = [
        {
            **one,
            "file": "same" if one["same_file"] else "another",
            "moved": "!" * one["moved"],
            "faster": one["before_ms"] / one["after_ms"],
        }
        for one in _sized(report["changes"])
    ]
    return table(
        rows,
        "runner = contender name; batch d; size name; before_ms ms; after_ms ms; "
        "times faster = faster .3f; ratio change % = ratio_change_percent +.1f; moved name; "
        "open % = uncertainty_percent .1f; file name",
        "Compared with the older benchmark (open: what both ratios' intervals leave open; !: the "
        "ratio moved by more than that and by more than 5 %)",
    )


def _plots(rows: Sequence[Entry]) -> list[Block]:
    """Return latency at the smallest batch, and latency against batch where there are several."""
    rows = [row for row in rows if row["image_size"] == rows[0]["image_size"]]
    if not rows:
        return []
    batches = sorted({row["batch"] for row in rows})
    colour = colours(row["artefact"] for row in rows)
    marks = []
    for row in sorted(rows, key=lambda row: row["p50"]):
        if row["batch"] == batches[0]:
            own, p50, p99 = colour[row["artefact"]], row["p50"], row["latency"]["p99_ms"]
            marks.append(Mark(row["contender"], p50, 0.0, f"{ms_text(p50)} ms", own, p50, p99))
    caption = f"Latency at batch {batches[0]}: median, whisker to the 99th percentile."
    blocks: list[Block] = [Plot(rows_chart(marks, Axis("latency (ms)")), caption)]
    lines = []
    for artefact, fast in fastest_runners(rows).items():
        own_rows = [row for row in rows if row["contender"] == fast["contender"]]
        points = [Mark("", row["batch"], row["p50"]) for row in own_rows]
        points.sort(key=lambda point: point.x)
        lines.append(Series(fast["contender"], points, colour[artefact]))
    svg = xy_chart(lines, Axis("batch"), Axis("latency, median (ms)"))
    against = Plot(svg, "Latency of one call against batch: each artifact by its fastest runner.")
    return [*blocks, *[against] * (len(batches) > 1)]


def fastest_runners(rows: Sequence[Entry]) -> dict[str, Entry]:
    """Return each artifact's row of most images a second at the largest batch, fastest first."""
    batch, found = max((row["batch"] for row in rows), default=0), dict[str, Entry]()
    for row in sorted((row for row in rows if row["batch"] == batch), key=lambda r: -r["rate"]):
        found.setdefault(row["artefact"], row)
    return found


def tradeoff_blocks(accuracies: Mapping[str, Entry], report: Entry) -> list[Block]:
    """Return throughput against accuracy, of the artifacts that have both."""
    best, colour = fastest_runners(measured(report)), colours(accuracies)
    both = [{**accuracies[name], **best[name]} for name in accuracies if name in best]
    series = []
    for row in both:
        low, high = (100 * end for end in row["top1_interval"])
        point = Mark("", row["rate"], 100 * row["top1"], low=low, high=high)
        series.append(Series(row["contender"], [point], colour[row["artefact"]]))
    batch = max((row["batch"] for row in both), default=0)
    svg = xy_chart(series, Axis(f"images/s at batch {batch}"), Axis("top-1 (%)", zero=False))
    words = "Each artifact by its fastest runner here; the whiskers are 95 % intervals."
    return [
        *[Plot(svg, words)] * bool(both),
        *table(
            both,
            "runner = contender name; images/s = rate ,.1f; top-1 % = top1 percent; "
            "top-1, 95 % = top1_interval percents",
        ),
    ]
