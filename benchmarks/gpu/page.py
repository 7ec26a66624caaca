"""The page of one or more runs of the GPU report, as Markdown."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from van_deploy.bench.document import Ceilings
from van_deploy.bench.roofline import least_time
from van_deploy.model.variants import VARIANTS
from van_deploy.report.render_markdown import markdown_table

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

Show = Callable[[Row], Any]
COLUMNS: dict[str, tuple[int, Show]] = {
    "batch": (0, itemgetter("batch")),
    "latency ms": (3, lambda row: row["latency_ms"].get("p50_ms")),
    "p99 ms": (3, lambda row: row["latency_ms"].get("p99_ms")),
    "queued ms": (3, itemgetter("queued_ms")),
    "images/s": (0, lambda row: 1e3 * row["batch"] / row["queued_ms"]),
    "% of floor": (0, itemgetter("percent_of_floor")),
    "x PyTorch": (2, itemgetter("times_best")),
    "x eager": (2, itemgetter("times_eager")),
    "SQNR dB": (1, itemgetter("sqnr_db")),
    "H2D ms": (3, itemgetter("upload_ms")),
    "D2H ms": (3, itemgetter("download_ms")),
    "first call s": (1, lambda row: row["compile_s"] or _seconds(row["first_call_ms"])),
    "SM MHz": (0, lambda row: row["gpu"].get("sm_mhz")),
    "W": (0, lambda row: row["gpu"].get("power_w")),
    "GPU MiB": (0, lambda row: (row["gpu"].get("memory_used_bytes") or 0) / 2**20 or None),
}
"""Digits behind the point, and the figure. What a row lacks is None."""

SHOWN = ("by PyTorch module", "by kind of kernel", "one by one", "van-deploy", "without a")
"""Words of the titles of tables that are shown; the others are left to the JSON files."""

LONG = 14  # rows; a longer table is folded


def page(documents: Sequence[Document]) -> str:
    """Return the whole page: one table a GPU, then where time goes, then what ran and what not."""
    lines = [INTRODUCTION]
    for gpu in dict.fromkeys(map(_gpu, documents)):
        runs = [document for document in documents if _gpu(document) == gpu]
        facts = next((f for run in runs if (f := _facts(run, "environment")).get("device")), {})
        lines += [f"## {gpu or 'No GPU'}", "", f"- {_device_text(runs[-1], facts)}"]
        for run in runs:
            lines += [*_run_line(run), *_ceiling_lines(run)]
        best: dict[Any, Row] = {}  # of several runs the faster one
        for row in sorted(rows_of(runs), key=itemgetter("queued_ms")):
            best.setdefault((*_place(row), row["runner"], row["precision"]), row)
        rows = sorted(best.values(), key=lambda row: (*_place(row), row["queued_ms"]))
        names = ("network", "runner", "precision", *COLUMNS, "remarks")
        lines += ["", markdown_table(names, map(_cells, rows)), ""]
        tables = {
            title: table
            for run in runs
            for step in run["steps"]
            for title, table in (step.get("content") or {}).get("tables", {}).items()
            if any(words in title for words in SHOWN)
        }
        for title, table in tables.items():
            lines += _titled(title, table)
        for run in runs:
            lines += _steps(run)
    return "\n".join(lines).rstrip() + "\n"


def rows_of(runs: Sequence[Document]) -> list[Row]:
    """Return every measured row with its floor and its ratios, by network, batch and speed.

    Args:
        runs: on GPUs of one name.
    """
    measured = [
        {**row, "latency_ms": row.get("latency_ms") or {}, "gpu": row.get("gpu") or {}}
        for run in runs
        for step in run["steps"]
        for row in (step.get("content") or {}).get("rows", ())
        if row.get("queued_ms")
    ]
    found = (_facts(run, "ceilings").get("ceilings") for run in runs)
    ceilings = next((one for one in found if one), None)
    rows: list[Row] = []
    for row in measured:
        same = [other for other in measured if _place(other) == _place(row)]
        rivals = [other["queued_ms"] for other in same if other.get("group") == "pytorch"]
        eager = [o["queued_ms"] for o in same if o["runner"] == "pytorch-eager-fp32"]
        full = defaultdict(lambda: None, row)
        full["times_best"] = min(rivals) / row["queued_ms"] if rivals else None
        full["times_eager"] = min(eager) / row["queued_ms"] if eager else None
        full["percent_of_floor"] = _percent_of_floor(row, ceilings)
        rows.append(full)
    return sorted(rows, key=lambda row: (*_place(row), row["queued_ms"]))


def short_table(document: Document) -> str:
    """Return what fits a terminal: every row in one line, and every step that has none."""
    lines = [
        f"{row['network']:<8} b{row['batch']:<4} {row['runner']:<34} "
        f"{_number(row['queued_ms'], 3):>9} ms {_number(row['percent_of_floor'], 0):>4} % floor"
        f" x{_number(row['times_best'], 2)} best PyTorch, {_number(row['sqnr_db'], 1)} dB"
        for row in rows_of([document])
    ]
    steps = (step for step in document["steps"] if step["state"] != "done")
    return "\n".join([*lines, *(f"{s['name']}: {s['state']}: {s['reason']}" for s in steps)])


def _place(row: Row) -> tuple[str, int, int]:
    return row["network"], row.get("image_size", 224), row["batch"]


def _gpu(document: Document) -> str:
    """Return the name of the GPU of a run."""
    return str((_facts(document, "environment").get("device") or {}).get("name", ""))


def _facts(document: Document, name: str) -> dict[str, Any]:
    contents = (step.get("content") for step in document["steps"] if step["name"] == name)
    return next((content["facts"] for content in contents if content), {})


def _percent_of_floor(row: Row, ceilings: Any) -> float | None:
    variant = VARIANTS.get(row["network"])
    if variant is None or not ceilings or "fp16" not in ceilings["ops_per_s"]:
        return None
    place = ("", "fp16", row["batch"], row.get("image_size", 224))
    rates = Ceilings(ceilings["ops_per_s"], ceilings["bytes_per_s"], "")
    (least,) = least_time(variant.config, rates, "fp16", place)
    product_ms = 1e3 * least.operations / rates.ops_per_s["fp16"]
    return 100 * max(least.unfused_ms, product_ms) / row["queued_ms"]


def _cells(row: Row) -> list[str]:
    remarks = [row["note"], *(f"slowed: {why}" for why in row["throttled"] or ())]
    if row["top1_agreement"] is not None and row["top1_agreement"] < 1:
        remarks.append(f"top-1 as FP32 on {100 * row['top1_agreement']:.1f} %")
    figures = (_number(show(row), digits) for digits, show in COLUMNS.values())
    names = (row["network"], row["runner"], row["precision"] or "")
    return [*names, *figures, "; ".join(filter(None, remarks))]


def _run_line(run: Document) -> list[str]:
    rehearsal = " (a rehearsal on a CPU: no number here is a GPU's)" * bool(run["rehearsal"])
    versions = _facts(run, "environment").get("versions", {})
    named = ", ".join(f"{name} {text}" for name, text in versions.items())
    head = f"- {run['date']}{rehearsal}: `{_shown(run['command'])}`, {run['seconds']:.0f} s"
    return [head, *([f"- {named}"] if named else [])]


def _titled(title: str, rows: Sequence[Row]) -> list[str]:
    """Return one table under its title, folded where it is long."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = markdown_table(columns, ([_any(row.get(c)) for c in columns] for row in rows))
    if len(rows) <= LONG:
        return [f"### {title}", "", table, ""]
    return [f"<details><summary>{title}</summary>", "", table, "", "</details>", ""]


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
        f"- ceilings of this run: copying {ceilings['bytes_per_s'] / 1e9:.4g} GB/s, read and "
        f"written; matrix products in TFLOP/s: {rates}"
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
    state = {"done": "ran"}
    rows = [
        [s["name"], state.get(s["state"], s["state"]), _number(s.get("seconds"), 0), s["reason"]]
        for s in document["steps"]
    ]
    when = document["date"][:16].replace("T", " at ")
    notes = [
        f"- {step['name']}: {note}"
        for step in document["steps"]
        for note in (step.get("content") or {}).get("notes", ())
    ]
    title = f"### What ran on {when} (part {document['part']})"
    return [title, "", markdown_table(("step", "", "s", "reason"), rows), "", *notes, ""]


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1e3


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def _any(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
