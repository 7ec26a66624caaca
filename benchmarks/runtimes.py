"""This project's artefacts against PyTorch and against what others would deploy.

One race a variant: every contender in a process of its own, one awake at a time,
the same images, rounds in turn (see van_deploy/bench/race.py).

    python benchmarks/runtimes.py                       # van_b0 and van_b1 at 224, batch 1 and 8
    python benchmarks/runtimes.py --variants van_b0 --seconds 1
    python benchmarks/runtimes.py --repeat              # some of them, raced twice and compared
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lineup import PEERS, SIZE, prepared

from van_deploy.bench.budget import Budget
from van_deploy.bench.compare import agreement, compare_reports
from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.lane import Row
from van_deploy.bench.report import BenchReport, race_report
from van_deploy.bench.settings import Settings
from van_deploy.bench.timing import paired_ratio

TORCH_BEST = ("pytorch-channels-last", "pytorch-compile", "pytorch-autocast")
SAME_RUN_TIME = {  # our file against every peer's file of that precision in that run time
    "ort-cpu/fp32": [name for name, p in PEERS.items() if p[1:] == ("onnxruntime", "fp32")],
    "openvino/fp32": [name for name, p in PEERS.items() if p[1:] == ("openvino", "fp32")],
    "openvino-bf16/fp32": ["peer:openvino-direct-bf16"],
    "ort-cpu/int8-cpu": ["peer:ort-int8"],
}
NOISE = 0.98  # two runs of the same file differ by as much: below it, slower is slower
REPEATED = ("pytorch", "pytorch-channels-last", "ort-cpu/fp32", "ort-cpu/int8-cpu", "openvino/fp32")
"""Raced twice by --repeat: one of each kind; the whole field would take an hour."""
OVERHEAD_PERCENT = 15.0
NOTES = (
    "OpenVINO computes in bfloat16 by default where the processor has it; `openvino/` rows are "
    "forced to float32, `openvino-bf16/` rows are not. Random weights: accuracy plays no part in "
    "this table.",
    "A ratio is the median of the rounds' own, in brackets its 95 % interval; * marks one whose "
    "interval was still wider than 2 % when its time was up.",
)


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    arguments = _arguments()
    rows: list[list[str]] = []
    claims: list[dict[str, object]] = []
    notes: list[str] = []
    for variant in arguments.variants:
        reports, skipped = _raced(variant, arguments)
        for report in reports:
            rows += [_cells(variant, row) for row in _ordered(report.rows)]
            notes += [f"{variant}: {text}" for text in report.facts["warnings"]]
        notes += [f"{variant}: {skip.name} skipped, {skip.reason}" for skip in skipped]
        claims += [_repeatable(variant, *reports)] if arguments.repeat else []
        claims += [] if arguments.repeat else _claims(variant, reports[0])
    result = {
        "columns": [
            "variant",
            "runner",
            "batch",
            "p50 ms",
            "p99 ms",
            "images/s",
            "times eager (95 %)",
            "rounds",
            "peak RAM MB",
        ],
        "rows": rows,
        "claims": claims,
        "notes": [*notes, *NOTES],
    }
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(not all(claim["met"] for claim in claims))


def _raced(
    variant: str, arguments: argparse.Namespace
) -> tuple[list[BenchReport], Sequence[Skipped]]:
    """Return one race of all, or two of the chosen few, with the same files."""
    settings = Settings(
        batches=tuple(arguments.batches),
        budget=Budget(arguments.seconds, 100, max(arguments.limit, arguments.seconds)),
        roofline=False,
    )
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        contenders, skipped, images = prepared(
            variant, Path(folder), arguments.batches, with_peers=not arguments.repeat
        )
        if arguments.repeat:
            contenders = [entry for entry in contenders if entry.name in REPEATED]
            skipped = [entry for entry in skipped if entry.name in REPEATED]
        contenders = [entry for entry in contenders if entry.name not in arguments.without]
        races = 2 if arguments.repeat else 1
        reports = [_race(variant, contenders, skipped, images, settings) for _ in range(races)]
    return reports, skipped


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["van_b0", "van_b1"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="timed, a row, at least")
    parser.add_argument("--limit", type=float, default=6.0, help="timed, a row, at most")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument(
        "--repeat", action="store_true", help=f"race {', '.join(REPEATED)} twice and compare"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _race(
    variant: str,
    contenders: Sequence[Contender],
    skipped: Sequence[Skipped],
    images: Any,
    settings: Settings,
) -> BenchReport:
    def progress(text: str) -> None:
        print(f"{variant}: {text}", file=sys.stderr, flush=True)

    return race_report(
        contenders,
        skipped,
        {SIZE: images},
        settings,
        native_size=SIZE,
        images="sample photographs",
        about={"model": variant},
        progress=progress,
    )


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.batch, -(row.images_per_s or 0.0)))


def _cells(variant: str, row: Row) -> list[str]:
    if row.latency is None:
        return [variant, row.contender, str(row.batch), row.error, "", "", "", "", ""]
    ratio = row.ratio
    times = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    return [
        variant,
        row.contender,
        str(row.batch),
        f"{row.latency.p50_ms:.2f}",
        f"{row.latency.p99_ms:.2f}",
        f"{row.images_per_s:.1f}",
        times,
        f"{len(row.round_ms)}{'*' if row.settled is False else ''}",
        f"{(row.peak_rss_bytes or 0) / 1e6:.0f}",
    ]


def _claims(variant: str, report: BenchReport) -> Iterable[dict[str, object]]:
    for batch in sorted({row.batch for row in report.rows}):
        rows = {r.contender: r for r in report.rows if r.batch == batch and r.latency}
        where = f"{variant}, batch {batch}"
        ours = {n: r for n, r in rows.items() if "/" in n}
        best = max(ours, key=lambda n: ours[n].images_per_s or 0.0)
        own = [name for name in TORCH_BEST if name in rows]
        torch_best = max(own, key=lambda n: rows[n].images_per_s or 0.0, default=None)
        if "pytorch" in rows:
            yield _at_least(f"{where}: {best} >= 5 x PyTorch eager", rows, best, "pytorch", 5.0)
            name = "ort-cpu/fp32"
            yield _at_least(f"{where}: {name} >= 2.5 x PyTorch eager", rows, name, "pytorch", 2.5)
        if torch_best:
            text = f"{where}: {best} >= 2 x the best of PyTorch's own ({torch_best})"
            yield _at_least(text, rows, best, torch_best, 2.0)
        peer = "peer:torchscript-17+sim"
        if peer in rows:
            text = f"{where}: ort-cpu/fp32 >= 1.3 x opset-17 export + onnxsim"
            yield _at_least(text, rows, "ort-cpu/fp32", peer, 1.3)
        for name, peers in SAME_RUN_TIME.items():
            for peer in peers:
                if name in rows and peer in rows:
                    text = f"{where}: {name} not slower than {peer}"
                    yield _at_least(text, rows, name, peer, NOISE)
    overhead = report.facts["seconds"]["overhead_percent"]
    yield {
        "claim": f"{variant}: benchmark overhead at most {OVERHEAD_PERCENT:g} %",
        "measured": f"{overhead:.1f} %",
        "met": overhead <= OVERHEAD_PERCENT,
    }


def _at_least(
    claim: str, rows: dict[str, Row], name: str, other: str, limit: float
) -> dict[str, object]:
    """Return a claim on the ratio of two rows, paired by round."""
    own, theirs = rows[name], rows[other]
    ratio = own.ratio if other == "pytorch" else paired_ratio(theirs.round_ms, own.round_ms)
    if ratio is None:
        return {"claim": claim, "measured": "no round in common", "met": False}
    return {
        "claim": claim,
        "measured": f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})",
        "met": ratio.median >= limit,
    }


def _repeatable(variant: str, first: BenchReport, second: BenchReport) -> dict[str, object]:
    changes = compare_reports(first.as_dict(), second.as_dict())
    agreed = agreement(changes)
    names = ", ".join(dict.fromkeys(c.contender for c in changes if c.contender != "pytorch"))
    measured = (
        f"{agreed['within']} of {agreed['ratios']} ratios; the largest change, {agreed['worst']}, "
        f"{agreed['worst_percent']:+.1f} %; {agreed['open']} open, {len(agreed['moved'])} moved"
    )
    return {
        "claim": f"{variant}: two consecutive runs of {names} against PyTorch eager agree on "
        f"every ratio within {agreed['within_percent']:g} %",
        "measured": measured,
        "met": agreed["within"] == agreed["ratios"],
    }


def _text(result: dict[str, Any]) -> str:
    lines = [result["columns"], *result["rows"]]
    lines += [
        ["met" if c["met"] else "MISSED", c["claim"], c["measured"]] for c in result["claims"]
    ]
    return "\n".join(
        "  ".join(f"{cell:<12}" for cell in line)
        for line in [*lines, *[[n] for n in result["notes"]]]
    )


if __name__ == "__main__":
    raise SystemExit(main())
