"""A benchmark as blocks: latency, throughput, limits, and what changed since an older one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.config.sizes import size_text
from van_deploy.report.document import Block, Entry, Facts, Plot, notices, table
from van_deploy.report.figures import listed, ms_text
from van_deploy.report.plots import Axis, Mark, Series, colours, rows_chart, xy_chart

STEADY_PERCENT = 2.5  # deviation over mean of all calls, above which it is marked


def bench_blocks(report: Entry) -> list[Block]:
    """Return everything a person wants to see of a benchmark."""
    rows = _measured(report)
    failed = [row for row in report["rows"] if row["error"]]
    under, limit_ms = report["best_under_p99"] or {}, report["settings"]["p99_ms"] or 0.0
    profiles = [
        {**line, "runner": name} for name, lines in report["profiles"].items() for line in lines
    ]
    return [
        _facts(report),
        *notices("WARNING", report["warnings"]),
        *_plots(rows),
        *table(
            sorted(
                rows, key=lambda row: (size_text(row["image_size"]), row["batch"], -row["rate"])
            ),
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
            under.items(),
            "runner = 0 name; 1.batch d; p99 ms = 1.latency.p99_ms ms; "
            "images/s = 1.images_per_s ,.1f",
            f"Best batch with p99 below {limit_ms:g} ms",
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
            "versions": ", ".join(f"{n} {version}" for n, version in report["versions"].items()),
            "images": report["images"],
            "time": f"{seconds['wall']:.0f} s, of which {seconds['timed']:.0f} s timed",
            "faster": compared if report["reference"] else "nothing to compare with",
            "rounds": "that were quiet, of all; * a ratio that did not settle",
        }
    )


def _measured(report: Entry) -> list[dict[str, Any]]:
    """Return the rows that were timed, each with its artifact, figures, and size if they differ."""
    return [
        {
            **row,
            "artefact": _artefact(row["contender"]),
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


def _artefact(contender: str) -> str:
    """Return which artifact a contender runs; PyTorch's own is called ``pytorch``."""
    return contender.partition("/")[2] or "pytorch"


def fastest(report: Entry) -> Entry | None:
    """Return the row of least latency at the smallest batch."""
    return min(_measured(report), key=lambda row: (row["batch"], row["p50"]), default=None)


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
    ceilings, entries = report["ceilings"], report["roofline"]
    if not ceilings or not entries:
        return []
    rates = [f"{k} {rate / 1e9:,.0f} G operations/s" for k, rate in ceilings["ops_per_s"].items()]
    rates.append(f"memory {ceilings['bytes_per_s'] / 1e9:.1f} GB/s")
    largest = max(entry["batch"] for entry in entries)
    colour = colours(map(_artefact, report["contenders"]))
    marks = []
    for entry in sorted(entries, key=lambda e: -float(e["percent_of_limit"])):
        if entry["batch"] == largest:
            name, share = entry["contender"], entry["percent_of_limit"]
            text = f"{share:.0f} % ({entry['bound']})"
            marks.append(Mark(name, share, 0.0, text, colour[_artefact(name)]))
    words = f"Batch {largest}: share of the least possible time on this machine, and what sets it."
    return [
        *table(
            _sized(entries),
            "runner = contender name; batch d; size name; operations count; "
            "least ms = least_ms ms; limit = bound name; reached % = percent_of_limit .0f; "
            "ms without fusion = unfused_ms ms",
            f"Roofline: measured {', '.join(rates)}",
        ),
        Plot(rows_chart(marks, Axis("of the least possible time (%)")), words),
    ]


def limits_blocks(limits: Entry) -> list[Block]:
    """Return the limits on paper of a device that is not at hand, one line a graph and batch."""
    rows = [{**one, "rate": 1e3 * one["batch"] / one["least_ms"]} for one in limits["limits"]]
    device = limits["device"].upper()
    return table(
        rows,
        "graph = contender name; precision name; batch d; operations count; "
        "least ms = least_ms ms; most images/s = rate ,.0f; limit = bound name; "
        "ms without fusion = unfused_ms ms",
        f"Limits on paper of {device} ({limits['ceilings']['source']}); nothing here was measured",
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


# --- plots -------------------------------------------------------------------------------------


def _plots(rows: Sequence[Entry]) -> list[Block]:
    """Return latency at the smallest batch, and over several batches latency and throughput."""
    rows = [row for row in rows if row["image_size"] == rows[0]["image_size"]]
    batches = sorted({row["batch"] for row in rows})
    if not rows:
        return []
    colour = colours(row["artefact"] for row in rows)
    marks = []
    for row in sorted(rows, key=lambda row: row["p50"]):
        if row["batch"] == batches[0]:
            own, p50, p99 = colour[row["artefact"]], row["p50"], row["latency"]["p99_ms"]
            marks.append(Mark(row["contender"], p50, 0.0, f"{ms_text(p50)} ms", own, p50, p99))
    caption = f"Latency at batch {batches[0]}: median, whisker to the 99th percentile."
    blocks: list[Block] = [Plot(rows_chart(marks, Axis("latency (ms)")), caption)]
    x = Axis("batch", log=True, ticks=tuple(map(float, batches)))
    best = _fastest_runners(rows, batches[-1])
    for axis, figure, words in (
        (Axis("latency, median (ms)", log=True), "p50", "Latency of one call"),
        (Axis("images/s"), "rate", "Throughput"),
    ):
        lines = []
        for artefact, fast in best.items():
            own_rows = [row for row in rows if row["contender"] == fast["contender"]]
            points = [Mark("", float(r["batch"]), r[figure]) for r in sorted(own_rows, key=_batch)]
            lines.append(Series(fast["contender"], points, colour[artefact]))
        caption = f"{words} against batch: each artifact by its fastest runner."
        blocks.append(Plot(xy_chart(lines, x, axis, wide=False), caption, wide=False))
    return blocks if len(batches) > 1 else blocks[:1]


def _batch(row: Entry) -> int:
    return int(row["batch"])


def _fastest_runners(rows: Sequence[Entry], batch: int) -> dict[str, Entry]:
    """Return the row of most images a second of each artifact, the fastest first."""
    found: dict[str, Entry] = {}
    for row in sorted((row for row in rows if row["batch"] == batch), key=lambda r: -r["rate"]):
        found.setdefault(row["artefact"], row)
    return found


def tradeoff_blocks(accuracies: Mapping[str, Entry], report: Entry) -> list[Block]:
    """Return throughput against accuracy, of the artifacts that have both."""
    rows = _measured(report)
    batch = max(map(_batch, rows), default=0)
    best, colour = _fastest_runners(rows, batch), colours(accuracies)
    both, series = [], []
    for name, accuracy in accuracies.items():
        if name in best:
            runner, rate = best[name]["contender"], best[name]["rate"]
            low, high = (100 * end for end in accuracy["top1_interval"])
            both.append({**accuracy, "runner": runner, "rate": rate})
            point = Mark("", rate, 100 * accuracy["top1"], low=low, high=high)
            series.append(Series(runner, [point], colour[name]))
    x, y = Axis(f"images/s at batch {batch}"), Axis("top-1 (%)", zero=False)
    words = "Each artifact by its fastest runner here; the whiskers are 95 % intervals."
    return [
        *[Plot(xy_chart(series, x, y), words)] * bool(series),
        *table(
            both,
            "runner name; images/s = rate ,.1f; top-1 % = top1 percent; "
            "top-1, 95 % = top1_interval percents",
        ),
    ]
