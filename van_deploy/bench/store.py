"""Keeping a benchmark: in the bundle it belongs to, and in a file."""

from __future__ import annotations

from pathlib import Path

from van_deploy.bench.document import BenchReport
from van_deploy.bundle import Bundle, writing
from van_deploy.errors import InputError
from van_deploy.files import write_atomic

BENCH_FILE = "bench.json"


def save_report(report: BenchReport, bundle: Bundle | None, output: Path | None) -> None:
    """Write a report into ``bundle`` and to ``output``, where given.

    In the bundle it becomes ``bench.json``, and the manifest's ``checks`` get a
    summary, so that whoever reads the manifest alone knows the figures.

    Raises:
        InputError: ``output`` cannot be written.
        BundleError: the bundle cannot be written.
    """
    text = report.text()
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(output, text)
        except OSError as error:
            raise InputError(
                f"'{output}' cannot be written: {error.strerror or error}.",
                "Choose another --output FILE.",
            ) from error
    if bundle is None:
        return
    rows = [
        {
            "contender": row.contender,
            "batch": row.batch,
            "image_size": row.image_size,
            "p50_ms": row.latency.p50_ms,
            "images_per_s": row.images_per_s,
            "ratio": row.ratio.median if row.ratio else None,
        }
        for row in report.rows
        if row.latency
    ]
    with writing(bundle.path) as draft:
        draft.file(BENCH_FILE).write_text(text, encoding="utf-8")
        draft.checks["bench"] = {
            "file": BENCH_FILE,
            "date": report.date,
            "machine": report.machine.cpu.name,
            "threads": report.threads,
            "reference": report.reference,
            "rows": rows,
            "skipped": {entry.name: entry.reason for entry in report.skipped},
        }
