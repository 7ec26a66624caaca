"""A benchmark as blocks: latency, throughput, limits, and what changed since an older one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from van_deploy.config.sizes import size_text
from van_deploy.report.document import Block, Entry, Facts, Plot, notices, table
from van_deploy.report.figures import listed, ms_text
from van_deploy.report.plots import Axis, Mark, Series, colours, rows_chart, xy_chart

__all__ = ["bench_blocks", "fastest", "limits_blocks", "machine_text", "tradeoff_blocks"]

STEADY_PERCENT = 2.5  # deviation over mean of all calls, above which it is marked


def bench_blocks(report: Entry) -> list[Block]:
    """Return everything a person wants to see of a benchmark."""
    failed = (f"{r['contender']} at batch {r['batch']}: {r['error']}" for r in report["rows"])
    return [
        Facts(_facts(report)),
        *notices("WARNING", report["warnings"]),
        *_plots(report),
        *_latency(report),
        *notices("FAIL", (line for line in failed if not line.endswith(": "))),
        *_on_gpu(report["rows"]),
        *_best(report["best_under_p99"]),
        *_loading(report),
        *_roofline(report),
        *_profiles(report["profiles"]),
        *notices("SKIPPED", (f"{one['name']}: {one['reason']}" for one in report["skipped"])),
        *_changes(report),
    ]


def machine_text(machine: Entry) -> str:
    """Return the machine on one line."""
    cpu = machine["cpu"]
    gpus = "".join(f", {gpu['name']}" for gpu in machine["gpus"])
    special = [feature for feature in cpu["features"] if feature != "fma"]
    return f"{cpu['name']}, {cpu['cores_allowed']} cores ({listed(special)}){gpus}"


def _measured(report: Entry) -> list[Entry]:
    return [row for row in report["rows"] if row["latency"]]


def _ms(row: Entry) -> float:
    return float(row["latency"]["p50_ms"])


def _rate(row: Entry) -> float:
    return float(row["images_per_s"] or 0.0)


def fastest(report: Entry) -> Entry | None:
    """Return the row of least latency at the smallest batch."""
    rows = _measured(report)
    batch = min((row["batch"] for row in rows), default=0)
    return min((row for row in rows if row["batch"] == batch), key=_ms, default=None)


def _facts(report: Entry) -> Entry:
    seconds, reference = report["seconds"], report["reference"]
    return {
        "model": report["model"],
        "machine": machine_text(report["machine"]),
        "device": report["device"],
        "date": report["date"][:10],
        "threads": f"{report['threads']} a runner, {report['settings']['streams']} stream(s)",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "images": report["images"],
        "time": f"{seconds['wall']:.0f} s, of which {seconds['timed']:.0f} s timed",
        "faster": f"times faster than {reference}, paired by round (95 % interval)"
        if reference
        else "nothing to compare with",
        "rounds": "that were quiet, of all; * a ratio that did not settle",
    }


def _sized(rows: Sequence[Entry]) -> list[Entry]:
    """Return rows with the image size as ``size`` where there are several."""
    several = len({size_text(row["image_size"]) for row in rows}) > 1
    return [{**row, "size": size_text(row["image_size"]) if several else None} for row in rows]


def _latency(report: Entry) -> list[Block]:
    rows = sorted(
        _measured(report), key=lambda r: (size_text(r["image_size"]), r["batch"], -_rate(r))
    )
    marked = [
        {
            **row,
            "rounds": f"{sum(row['round_quiet'])} of {len(row['round_ms'])}"
            f"{'*' if row['settled'] is False else ''}",
        }
        for row in _sized(rows)
    ]
    return table(
        marked,
        "runner = contender name; batch = batch d; size = size name; p50 ms = latency.p50_ms ms; "
        "p90 ms = latency.p90_ms ms; p99 ms = latency.p99_ms ms; images/s = images_per_s ,.1f; "
        "faster (95 %) = ratio ratio; rounds = rounds number",
    )


def _on_gpu(rows: Sequence[Entry]) -> list[Block]:
    """Return what only a GPU has: copies, launches among queued ones, and its state."""
    return table(
        (row for row in rows if row["gpu"]),
        "runner = contender name; batch = batch d; queued ms = queued_ms ms; "
        "upload ms = upload_ms ms; download ms = download_ms ms; SM MHz = gpu.sm_mhz .0f; "
        "W = gpu.power_w .0f; °C = gpu.temperature_c .0f; slowed by = throttled",
        "On the GPU",
    )


def _profiles(profiles: Mapping[str, Sequence[Entry]]) -> list[Block]:
    rows = [{**line, "runner": name} for name, lines in profiles.items() for line in lines]
    return table(
        rows,
        "runner = runner name; kind = kind; ms = ms ms; % = percent .1f; calls = calls .0f",
        "Time by kind of layer at the largest batch",
        folded=True,
    )


def _best(under: Entry | None) -> list[Block]:
    if under is None:
        return []
    columns = (
        "runner = 0 name; batch = 1.batch d; p99 ms = 1.p99_ms ms; images/s = 1.images_per_s ,.1f"
    )
    return table(
        under["best"].items(), columns, f"Best batch with p99 below {under['limit_ms']:g} ms"
    )


def _loading(report: Entry) -> list[Block]:
    rows = []
    for name, took in report["loading"].items():
        own = [row for row in _measured(report) if row["contender"] == name]
        cv = max((row["latency"]["cv_percent"] for row in own), default=None)
        loud = cv is not None and cv > STEADY_PERCENT
        figures = {
            "name": name,
            "first_ms": own[0]["first_call_ms"] if own else None,
            "bytes": max((row["peak_rss_bytes"] or 0 for row in own), default=None),
            "calls": sum(row["latency"]["calls"] for row in own),
            "cv": None if cv is None else f"{cv:.1f}{'*' * loud}",
        }
        rows.append({**took, **figures})
    return table(
        rows,
        "runner = name name; import s = import_s .2f; load s = load_s .2f; "
        "first call ms = first_ms ms; peak RAM = bytes bytes; calls = calls d; CV % = cv number",
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
    marks = [
        Mark(
            entry["contender"],
            entry["percent_of_limit"],
            text=f"{entry['percent_of_limit']:.0f} % ({entry['limit']['bound']})",
            colour=colour[_artefact(entry["contender"])],
        )
        for entry in sorted(entries, key=lambda e: -float(e["percent_of_limit"]))
        if entry["batch"] == largest
    ]
    words = f"Batch {largest}: share of the least possible time on this machine, and what sets it."
    return [
        *table(
            _sized(entries),
            "runner = contender name; batch = batch d; size = size name; "
            "operations = work.operations count; least ms = limit.ms ms; "
            "limit = limit.bound name; reached % = percent_of_limit .0f; "
            "ms without fusion = limit.traffic_ms ms",
            f"Roofline: measured {', '.join(rates)}",
        ),
        Plot(rows_chart(marks, Axis("of the least possible time (%)")), words),
    ]


def limits_blocks(limits: Entry) -> list[Block]:
    """Return the limits on paper of a device that is not at hand, one line a graph and batch."""
    rows = [{**one, "rate": 1e3 * one["batch"] / one["limit"]["ms"]} for one in limits["limits"]]
    device = limits["device"].upper()
    return table(
        rows,
        "graph = graph name; precision = precision name; batch = batch d; "
        "operations = operations count; least ms = limit.ms ms; most images/s = rate ,.0f; "
        "limit = limit.bound name; ms without fusion = limit.traffic_ms ms",
        f"Limits on paper of {device} ({limits['source']}); nothing here was measured",
    )


def _changes(report: Entry) -> list[Block]:
    """Return what changed since an older benchmark, and in how many ratios both agree."""
    agreed = report["agreement"]
    if agreed is None:
        return []
    rows = [
        {
            **one,
            "file": "same" if one["same_file"] else "another",
            "mark": "!" if one["moved"] else "",
            "size": size_text(one["image_size"]),
        }
        for one in report["changes"]
    ]
    blocks = table(
        rows,
        "runner = contender name; batch = batch d; size = size name; before ms = before_ms ms; "
        "after ms = after_ms ms; times faster = speedup .3f; "
        "ratio change % = ratio_change_percent +.1f; moved = mark name; "
        "open % = uncertainty_percent .1f; file = file name",
        "Compared with the older benchmark (open: what both ratios' intervals leave open)",
    )
    limit = f"{agreed['within_percent']:g} %"
    said = []
    if agreed["ratios"]:
        said.append(
            f"{agreed['within']} of {agreed['ratios']} ratios agree within {limit}; the largest "
            f"change is {agreed['worst_percent']:+.1f} %, {agreed['worst']}"
        )
    if agreed["open"]:
        said.append(
            f"{agreed['open']} changed by more, but by no more than their intervals leave open: "
            "measure longer (--limit)"
        )
    said += [f"{name} moved by more than {limit} and its uncertainty" for name in agreed["moved"]]
    state = "OK" if agreed["within"] == agreed["ratios"] else "WARNING"
    return [*blocks, *notices(state, said)]


# --- plots -------------------------------------------------------------------------------------


def _plots(report: Entry) -> list[Block]:
    """Return latency at the smallest batch, and over several batches latency and throughput."""
    rows = _measured(report)
    rows = [row for row in rows if row["image_size"] == rows[0]["image_size"]]
    batches = sorted({row["batch"] for row in rows})
    if not rows:
        return []
    colour = colours(_artefact(row["contender"]) for row in rows)
    marks = [
        Mark(
            row["contender"],
            _ms(row),
            text=f"{ms_text(_ms(row))} ms",
            colour=colour[_artefact(row["contender"])],
            low=_ms(row),
            high=row["latency"]["p99_ms"],
        )
        for row in sorted(rows, key=_ms)
        if row["batch"] == batches[0]
    ]
    caption = f"Latency at batch {batches[0]}: median, whisker to the 99th percentile."
    blocks: list[Block] = [Plot(rows_chart(marks, Axis("latency (ms)")), caption)]
    if len(batches) == 1:
        return blocks
    x = Axis("batch", log=True, ticks=tuple(map(float, batches)))
    for axis, figure, words in (
        (Axis("latency, median (ms)", log=True), _ms, "Latency of one call"),
        (Axis("images/s"), _rate, "Throughput"),
    ):
        lines = []
        for name in _fastest_runners(rows, batches[-1]).values():
            own = sorted((r for r in rows if r["contender"] == name), key=lambda r: int(r["batch"]))
            points = [Mark("", float(row["batch"]), figure(row)) for row in own]
            lines.append(Series(name, points, colour[_artefact(name)]))
        caption = f"{words} against batch: each artifact by its fastest runner."
        blocks.append(Plot(xy_chart(lines, x, axis, wide=False), caption, wide=False))
    return blocks


def _fastest_runners(rows: Iterable[Entry], batch: int) -> dict[str, str]:
    """Return the runner of most images a second of each artifact, the fastest first."""
    found: dict[str, str] = {}
    for row in sorted((row for row in rows if row["batch"] == batch), key=lambda r: -_rate(r)):
        found.setdefault(_artefact(row["contender"]), row["contender"])
    return found


def tradeoff_blocks(accuracies: Mapping[str, Entry], report: Entry) -> list[Block]:
    """Return throughput against accuracy, of the artifacts that have both."""
    rows = _measured(report)
    batch = max((row["batch"] for row in rows), default=0)
    best, colour = _fastest_runners(rows, batch), colours(accuracies)
    rates = {row["contender"]: _rate(row) for row in rows if row["batch"] == batch}
    both = [
        {**accuracy, "name": best[name], "rate": rates[best[name]], "colour": colour[name]}
        for name, accuracy in accuracies.items()
        if name in best
    ]
    series = [
        Series(
            one["name"],
            [Mark("", one["rate"], 100 * one["top1"], low=low, high=high)],
            one["colour"],
        )
        for one in both
        for low, high in [[100 * end for end in one["top1_interval"]]]
    ]
    x, y = Axis(f"images/s at batch {batch}"), Axis("top-1 (%)", zero=False)
    words = "Each artifact by its fastest runner here; the whiskers are 95 % intervals."
    columns = (
        "runner = name name; images/s = rate ,.1f; top-1 % = top1 percent; "
        "top-1, 95 % = top1_interval percents"
    )
    return [*[Plot(xy_chart(series, x, y), words)] * bool(series), *table(both, columns)]


def _artefact(contender: str) -> str:
    """Return which artifact a contender runs; PyTorch's own is called ``pytorch``."""
    return contender.partition("/")[2] or "pytorch"
