"""This project's artefacts in every run time against PyTorch's own modes.

One race a variant: every contender in a process of its own, one awake at a time,
the same images, rounds in turn (see van_deploy/bench/race.py).

    python benchmarks/runtimes.py                       # van_b0 and van_b1 at 224, batch 1 and 8
    python benchmarks/runtimes.py --variants van_b0 --seconds 1
    python benchmarks/runtimes.py --repeat              # some of them, raced twice and compared
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from lineup import prepared
from races import NOTES, arguments_of, cells, claim, columns, printed, raced

from van_deploy.bench.compare import agreement, compare_reports
from van_deploy.bench.contenders import GIVES_BACK, REFERENCE
from van_deploy.bench.document import BenchReport
from van_deploy.bench.lane import Row
from van_deploy.bench.timing import paired_ratio
from van_deploy.config.bench import LEAST_ROUNDS

TORCH_BEST = ("pytorch", "pytorch-channels-last", "pytorch-compile", "pytorch-autocast")
REPEATED = ("pytorch", "pytorch-channels-last", "ort-cpu/fp32", "ort-cpu/int8-cpu", "openvino/fp32")
"""Raced twice by --repeat: one of each kind; the whole field would take an hour."""
PLAIN = "ort-cpu/fp32"
OVERHEAD_PERCENT = 15.0
MORE_NOTES = (
    *NOTES,
    "`pytorch` and all others keep the memory they free; `pytorch-default-malloc` is eager PyTorch "
    "with the C library's own settings, whose processes differ (see `Processes`).",
    "OpenVINO computes in bfloat16 by default where the processor has it; `openvino/` rows are "
    "forced to float32, `openvino-bf16/` rows are not.",
)


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    parser = arguments_of(__doc__)
    parser.add_argument(
        "--repeat", action="store_true", help=f"race {', '.join(REPEATED)} twice and compare"
    )
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    claims: list[dict[str, object]] = []
    notes: list[str] = []
    for variant in arguments.variants:
        reports = _reports(variant, arguments)
        for report in reports:
            rows += [cells(variant, row) for row in _ordered(report)]
            notes += [f"{variant}: {text}" for text in report.warnings]
            claims.append(_overhead(variant, report))
        notes += [f"{variant}: {s.name} skipped, {s.reason}" for s in reports[0].skipped]
        claims += [_repeatable(variant, *reports)] if arguments.repeat else []
        claims += [] if arguments.repeat else _claims(variant, reports[0])
    result = {
        "columns": columns("eager"),
        "rows": rows,
        "claims": claims,
        "notes": [*notes, *MORE_NOTES],
    }
    return printed(result, arguments.json)


def _reports(variant: str, arguments: argparse.Namespace) -> list[BenchReport]:
    """Return one race of all, or two of the chosen few, with the same files."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        contenders, skipped, images = prepared(
            variant, Path(folder), arguments.batches, with_peers=False
        )
        if arguments.repeat:
            contenders = [entry for entry in contenders if entry.name in REPEATED]
            skipped = [entry for entry in skipped if entry.name in REPEATED]
        contenders = [entry for entry in contenders if entry.name not in arguments.without]
        races = 2 if arguments.repeat else 1
        return [
            raced(variant, contenders, skipped, images, arguments, REFERENCE) for _ in range(races)
        ]


def _ordered(report: BenchReport) -> list[Row]:
    return sorted(report.rows, key=lambda row: (row.batch, -(row.images_per_s or 0.0)))


def _claims(variant: str, report: BenchReport) -> Iterable[dict[str, object]]:
    for batch in sorted({row.batch for row in report.rows}):
        rows = {r.contender: r for r in report.rows if r.batch == batch and r.latency}
        where = f"{variant}, batch {batch}"
        ours = {n: r for n, r in rows.items() if "/" in n}
        best = max(ours, key=lambda n: ours[n].images_per_s or 0.0)
        own = [name for name in TORCH_BEST if name in rows]
        torch_best = max(own, key=lambda n: rows[n].images_per_s or 0.0)
        eager = {GIVES_BACK: "eager as it comes", REFERENCE: "eager that keeps its memory"}
        for name, words in eager.items():
            if name in rows:
                yield _at_least(f"{where}: {best} >= 5 x {words}", rows, best, name, 5.0)
                text = f"{where}: {PLAIN} >= 2.5 x {words}"
                yield _at_least(text, rows, PLAIN, name, 2.5)
        text = f"{where}: {best} >= 2 x the best of PyTorch's own ({torch_best})"
        yield _at_least(text, rows, best, torch_best, 2.0)


def _at_least(
    text: str, rows: Mapping[str, Row], name: str, other: str, limit: float
) -> dict[str, object]:
    """Return a claim on the ratio of two rows, paired by the rounds that were quiet for both."""
    own, theirs = rows[name], rows[other]
    pairs = list(zip(theirs.round_ms, own.round_ms, strict=False))
    both = zip(theirs.round_quiet, own.round_quiet, strict=False)
    quiet = [pair for pair, calm in zip(pairs, both, strict=True) if all(calm)]
    slow, fast = zip(*(quiet if len(quiet) >= LEAST_ROUNDS else pairs), strict=True)
    ratio = own.ratio if other == REFERENCE else paired_ratio(slow, fast)
    if ratio is None:
        return claim(text, "no round in common", met=False)
    measured = f"{ratio.median:.2f} x ({ratio.low:.2f} to {ratio.high:.2f})"
    return claim(text, measured, met=ratio.median >= limit)


def _overhead(variant: str, report: BenchReport) -> dict[str, object]:
    overhead = report.seconds.overhead_percent
    text = f"{variant}: benchmark overhead at most {OVERHEAD_PERCENT:g} %"
    return claim(text, f"{overhead:.1f} %", met=overhead <= OVERHEAD_PERCENT)


def _repeatable(variant: str, first: BenchReport, second: BenchReport) -> dict[str, object]:
    changes = compare_reports(first, second)
    agreed = agreement(changes)
    names = ", ".join(dict.fromkeys(c.contender for c in changes if c.contender != REFERENCE))
    measured = (
        f"{agreed.within} of {agreed.ratios} ratios; the largest change, {agreed.worst}, "
        f"{agreed.worst_percent:+.1f} %; {agreed.open} open, {len(agreed.moved)} moved"
    )
    text = (
        f"{variant}: two consecutive runs of {names} against PyTorch eager agree on "
        f"every ratio within {agreed.within_percent:g} %"
    )
    return claim(text, measured, met=agreed.within == agreed.ratios)


if __name__ == "__main__":
    raise SystemExit(main())
