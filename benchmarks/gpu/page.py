"""The page of one or more runs of the GPU report, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from van_deploy.bench.roofline import kernel_traffic_bytes
from van_deploy.model.variants import VARIANTS

Document = Mapping[str, Any]
Row = Mapping[str, Any]

INTRODUCTION = """# Results on a GPU

Written by `python benchmarks/gpu/report.py --page` from the JSON files of `make gpu-report`.

How to read the tables:

- **latency** is one batch alone, **queued** a batch with the next ones queued behind it, both
  by CUDA events with inputs and outputs on the device. Images a second come from *queued*.
  **H2D** and **D2H** are the transfers through pinned memory; no other column holds them.
- **% of floor**: the floor is the FP16 network with one kernel a step (a convolution with its
  bias, GELU, gate or residual) at the copy bandwidth and the FP16 product rate measured in
  the same run: van_b0 at 224 moves 55.6 MB an image. What fuses further can pass 100 %, and so
  can small batches, whose maps stay in the second-level cache.
- **x PyTorch** is against the fastest of PyTorch's own modes at the same batch on a GPU of that
  name on this page, **x eager** against eager FP32 (whose convolutions compute in TF32, as
  PyTorch has it). `max-autotune` leaves Inductor's own convolution templates out: they never won
  against cuDNN.
- **SQNR** is against the same network in FP32 without TF32 on the same images; of part b against
  ONNX Runtime's FP32 on the processor, on noise, which INT8 was not made for.
- Weights are random with natural statistics unless a row says otherwise. Modes of
  `torch.compile` are tuned while other steps run, and their **first call** holds the time they
  were stopped for others; they are timed alone.
"""

COLUMNS = (
    *("network", "runner", "precision", "batch", "latency ms", "p99 ms", "queued ms"),
    *("images/s", "% of floor", "x PyTorch", "x eager", "SQNR dB", "H2D ms", "D2H ms"),
    *("first call s", "SM MHz", "W", "GPU MiB", "remarks"),
)


SHOWN = (
    "by PyTorch module",
    "by kind of kernel",
    "one by one",
    "plan tuned",
    "van-deploy",
    "without a",
)
"""Words of the titles of tables that are shown; the others are left to the JSON files."""

LONG = 14  # rows; a longer table is folded
UNSHOWN = {"at_s", "tile", "tiles", "bytes", "operations", "kernels", "variant", "tried", "where"}
"""Keys of kernels.py's rows that only its JSON needs."""


def page(documents: Sequence[Document]) -> str:
    """Return the whole page: one table a GPU, then where time goes, then what ran and what not."""
    lines = [INTRODUCTION]
    for gpu in dict.fromkeys(map(_gpu, documents)):
        runs = [document for document in documents if _gpu(document) == gpu]
        everything = [row for run in runs for row in rows_of(run, runs)]
        tried = [row for row in everything if _was_tried(row)]
        everything = [row for row in everything if not _was_tried(row)]
        best: dict[Any, dict[str, Any]] = {}
        for row in everything:
            key = (*_place(row), str(row["runner"]).partition(",")[0], row.get("precision"))
            if key not in best or row["queued_ms"] < best[key]["queued_ms"]:
                best[key] = row
        rows = sorted(best.values(), key=lambda row: (*_place(row), row["queued_ms"]))
        facts = next((f for run in runs if (f := _facts(run, "environment")).get("device")), {})
        lines += [f"## {gpu or 'No GPU'}", "", f"- {_device_text(runs[-1], facts)}"]
        for run in runs:
            lines += [*_run_line(run), *_ceiling_lines(run)]
        lines += ["", _table(COLUMNS, [_cells(row) for row in rows]), ""]
        last = {
            title: table
            for run in runs
            for step in run["steps"]
            for title, table in (step.get("content") or {}).get("tables", {}).items()
            if any(words in title for words in SHOWN)
        }
        old = [title for title in last if "one by one" in title][:-1]
        lines += [
            text
            for title, table in last.items()
            if title not in old
            for text in _titled(title, table)
        ]
        if tried:
            lines += _titled("Fusions that were tried and are gone", [_attempt(r) for r in tried])
        lines += [text for run in runs for text in _steps(run)]
    return "\n".join(lines).rstrip() + "\n"


def _was_tried(row: Row) -> bool:
    """Return whether a row is of kernels in another plan than the one that ships (``apart``)."""
    return ", plan " in str(row["runner"]) and ", plan apart" not in str(row["runner"])


def _attempt(row: Row) -> dict[str, Any]:
    names = ("network", "batch", "runner", "queued_ms", "times_best")
    return {name: row.get(name) for name in names}


def _run_line(run: Document) -> list[str]:
    rehearsal = " (a rehearsal on a CPU: no number here is a GPU's)" * bool(run["rehearsal"])
    versions = _facts(run, "environment").get("versions", {})
    named = ", ".join(f"{name} {text}" for name, text in versions.items())
    head = f"- {run['date']}{rehearsal}: `{_shown(run['command'])}`, {run['seconds']:.0f} s"
    return [head, *([f"- {named}"] if named else [])]


def _titled(title: str, rows: Sequence[Row]) -> list[str]:
    """Return one table under its title, folded where it is long."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in UNSHOWN))
    table = _table(columns, [[_any(row.get(column)) for column in columns] for row in rows])
    if len(rows) <= LONG:
        return [f"### {title}", "", table, ""]
    return [f"<details><summary>{title}</summary>", "", table, "", "</details>", ""]


def rows_of(document: Document, beside: Sequence[Document] = ()) -> list[dict[str, Any]]:
    """Return every measured row with its floor and its ratios, by network, batch and speed.

    Args:
        document: the run.
        beside: further runs on a GPU of the same name, whose PyTorch rows count, too.
    """
    rows = _measured(document)
    everywhere = [row for run in (document, *beside) for row in _measured(run)]
    found = (_facts(run, "ceilings").get("ceilings") for run in (document, *beside))
    ceilings = next((one for one in found if one), None)
    for row in rows:
        same = [r for r in everywhere if _place(r) == _place(row)]
        rivals = [r["queued_ms"] for r in same if r.get("group") == "pytorch"]
        eager = [r["queued_ms"] for r in same if r["runner"] == "pytorch-eager-fp32"]
        row["times_best"] = min(rivals) / row["queued_ms"] if rivals else None
        row["times_eager"] = min(eager) / row["queued_ms"] if eager else None
        row["percent_of_floor"] = _percent_of_floor(row, ceilings)
    return sorted(rows, key=lambda row: (*_place(row), row["queued_ms"]))


def _measured(document: Document) -> list[dict[str, Any]]:
    return [
        dict(row)
        for step in document["steps"]
        for row in (step.get("content") or {}).get("rows", ())
        if row.get("queued_ms")
    ]


def _gpu(document: Document) -> str:
    """Return the name of the GPU of a run."""
    return str((_facts(document, "environment").get("device") or {}).get("name", ""))


def _place(row: Row) -> tuple[str, int, int]:
    return row["network"], row.get("image_size", 224), row["batch"]


def _percent_of_floor(row: Row, ceilings: Any) -> float | None:
    variant = VARIANTS.get(row["network"])
    if variant is None or not ceilings or "fp16" not in ceilings["ops_per_s"]:
        return None
    size, batch = row.get("image_size", 224), row["batch"]
    moved = kernel_traffic_bytes(variant.config, size, batch) / ceilings["bytes_per_s"]
    operations = 2 * batch * variant.config.mac_count(size)
    return 100e3 * max(moved, operations / ceilings["ops_per_s"]["fp16"]) / row["queued_ms"]


def _cells(row: Row) -> list[str]:
    latency, state = row.get("latency_ms") or {}, row.get("state") or {}
    if not isinstance(latency, dict):
        latency = {"p50_ms": latency}
    memory = state.get("memory_used_bytes")
    first = row.get("compile_s") or (row.get("first_call_ms") or 0) / 1e3
    remarks = [row.get("note", ""), *(f"slowed: {why}" for why in row.get("throttled") or ())]
    if row.get("steady") is False:
        remarks.append("clock not steady")
    agreement = row.get("top1_agreement")
    if agreement is not None and agreement < 1:
        remarks.append(f"top-1 as FP32 on {100 * agreement:.1f} %")
    return [
        str(row["network"]),
        str(row["runner"]).replace(", plan apart", ""),
        str(row.get("precision", "")),
        str(row["batch"]),
        _number(latency.get("p50_ms") or latency.get("p50"), 3),
        _number(latency.get("p99_ms"), 3),
        _number(row["queued_ms"], 3),
        _number(row.get("images_per_s") or 1e3 * row["batch"] / row["queued_ms"], 0),
        _number(row.get("percent_of_floor"), 0),
        _number(row.get("times_best"), 2),
        _number(row.get("times_eager"), 2),
        _number(row.get("sqnr_db"), 1),
        _number(row.get("upload_ms"), 3),
        _number(row.get("download_ms"), 3),
        _number(first or None, 1),
        _number(state.get("sm_mhz"), 0),
        _number(state.get("power_w"), 0),
        _number(memory / 2**20 if memory else None, 0),
        "; ".join(remark for remark in remarks if remark),
    ]


def short_table(document: Document) -> str:
    """Return what fits a terminal: every row in one line, and every step that has none."""
    lines = [
        f"{row['network']:<8} b{row['batch']:<4} {row['runner']:<34} "
        f"{_number(row['queued_ms'], 3):>9} ms"
        f" {_number(1e3 * row['batch'] / row['queued_ms'], 0):>8}"
        f" img/s {_number(row['percent_of_floor'], 0):>4} % floor"
        f" x{_number(row['times_best'], 2)} best PyTorch, {_number(row.get('sqnr_db'), 1)} dB"
        for row in rows_of(document)
    ]
    lines += [
        f"{step['name']}: {step['state']}: {step['reason']}"
        for step in document["steps"]
        if step["state"] != "done"
    ]
    return "\n".join(lines)


def _device_text(document: Document, facts: Mapping[str, Any]) -> str:
    device, nvml = facts.get("device"), facts.get("nvml") or {}
    if not device:
        return f"device: {document['device']}, Python {facts.get('python', '?')}"
    return (
        f"{device['name']}, compute capability {device['compute_capability']}, "
        f"{device['multiprocessors']} multiprocessors, {device['memory_bytes'] / 2**30:.0f} GiB, "
        f"L2 {device['l2_bytes'] / 2**20:.0f} MiB; driver {nvml.get('driver', '?')}, "
        f"CUDA {facts.get('cuda_of_torch')} of PyTorch, cuDNN {device['cudnn']}; "
        f"power limit {_number(nvml.get('power_limit_w'), 0)} W, "
        f"at most {_number(nvml.get('max_sm_mhz'), 0)} MHz; Python {facts.get('python', '?')}"
    )


def _ceiling_lines(document: Document) -> list[str]:
    ceilings = _facts(document, "ceilings").get("ceilings")
    if not ceilings:
        return []
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings["ops_per_s"].items())
    return [
        f"- ceilings of this run: {ceilings['bytes_per_s'] / 1e9:.4g} GB/s "
        f"({ceilings['how']['memory']}); matrix products in TFLOP/s: {rates}"
    ]


def _shown(command: str) -> str:
    """Return a command without the folders of its run.

    >>> _shown("python x.py ort --out /tmp/a.json --bundle /data/b/van_b0 --seconds 1")
    'python x.py ort --bundle van_b0 --seconds 1'
    """
    command = re.sub(r" --(out|output|cache)( /?[^ -]\S*)+", "", command)
    return re.sub(r"(?<= )\S*/(?=[\w.-]+( |$))(?<!gpu/)", "", command)


def _steps(document: Document) -> list[str]:
    """Return what ran, what did not and why, and what the steps noted."""
    rows = [
        [
            step["name"],
            step["state"] if step["state"] != "done" else "ran",
            _number(step.get("seconds"), 0),
            step["reason"],
        ]
        for step in document["steps"]
    ]
    title = (
        f"### What ran on {document['date'][:16].replace('T', ' at ')} (part {document['part']})"
    )
    table = _table(("step", "", "s", "reason"), rows)
    notes = [
        f"- {step['name']}: {note}"
        for step in document["steps"]
        for note in (step.get("content") or {}).get("notes", ())
    ]
    return [title, "", table, "", *notes, *([""] if notes else [])]


def _facts(document: Document, name: str) -> dict[str, Any]:
    for step in document["steps"]:
        if step["name"] == name:
            facts: dict[str, Any] = (step.get("content") or {}).get("facts", {})
            return facts
    return {}


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def _any(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        )

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])
