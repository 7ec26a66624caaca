"""What the benchmarks that race contenders share: their arguments, the race, the rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lineup import SIZE

from van_deploy.bench.contender import Contender, Skipped
from van_deploy.bench.document import BenchReport
from van_deploy.bench.lane import Row
from van_deploy.bench.report import race_report
from van_deploy.config import BenchSettings, Budget

__all__ = ["NOTES", "arguments_of", "cells", "claim", "columns", "printed", "raced"]

NOTES = (
    "A ratio is the median of the quiet rounds' own, in brackets its 95 % interval; * marks one "
    "that had not come within 2 % over six quiet rounds or more when its time was up. Random "
    "weights: accuracy plays no part here.",
)


def arguments_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every race takes."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["van_b0", "van_b1"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="timed, a row, at least")
    parser.add_argument("--limit", type=float, default=10.0, help="timed, a row, at most")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--json", action="store_true")
    return parser


def raced(
    variant: str,
    contenders: Sequence[Contender],
    skipped: Sequence[Skipped],
    images: Any,
    arguments: argparse.Namespace,
    reference: str,
) -> BenchReport:
    """Return the report of one race."""
    budget = Budget(arguments.seconds, 100, max(arguments.limit, arguments.seconds))
    settings = BenchSettings(
        batches=tuple(arguments.batches), reference=reference, budget=budget, roofline=False
    )
    return race_report(
        contenders,
        skipped,
        {SIZE: images},
        settings,
        native_size=SIZE,
        images="sample photographs",
        model=variant,
        progress=lambda text: print(f"{variant}: {text}", file=sys.stderr, flush=True),
    )


def columns(reference: str) -> list[str]:
    """Return the headings of :func:`cells`."""
    return [
        *("variant", "runner", "batch", "p50 ms", "p99 ms", "images/s"),
        *(f"times {reference} (95 %)", "quiet rounds", "peak RAM MB"),
    ]


def cells(variant: str, row: Row) -> list[str]:
    """Return a row of a race as text."""
    if row.latency is None:
        return [variant, row.contender, str(row.batch), row.error, "", "", "", "", ""]
    ratio = row.ratio
    times = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
    rounds = f"{sum(row.round_quiet)} of {len(row.round_ms)}"
    return [
        variant,
        row.contender,
        str(row.batch),
        f"{row.latency.p50_ms:.2f}",
        f"{row.latency.p99_ms:.2f}",
        f"{row.images_per_s:.1f}",
        times,
        f"{rounds}{'*' if row.settled is False else ''}",
        f"{(row.peak_rss_bytes or 0) / 1e6:.0f}",
    ]


def claim(text: str, measured: str, met: bool) -> dict[str, object]:
    """Return a claim, what was measured of it, and whether that is enough."""
    return {"claim": text, "measured": measured, "met": met}


def printed(result: Mapping[str, Any], as_json: bool) -> int:
    """Print a result; return 1 if a claim is not met."""
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        lines = [result["columns"], *result["rows"]]
        lines += [
            ["met" if c["met"] else "MISSED", c["claim"], c["measured"]] for c in result["claims"]
        ]
        lines += [[note] for note in result["notes"]]
        print("\n".join("  ".join(f"{cell:<12}" for cell in line) for line in lines))
    return int(not all(c["met"] for c in result["claims"]))
