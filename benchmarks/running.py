"""A bundle's artifacts in every runtime of this machine against PyTorch's own modes.

The measurement is that of ``van-deploy bench``: each runner in its own process, interleaved rounds.

    python -m benchmarks.running                       # van_b0 at 224, batch 1 and 8
    python -m benchmarks.running --variants van_b1 van_b2 --seconds 1
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.table import Table, parse_options, run_van_deploy

COLUMNS = ("variant", "runner", "batch", "p50 ms", "p99 ms", "images/s", "x eager (95 %)")
OPTIONS = {"variants": ("van_b0",), "batches": "1,8", "seconds": "3"}


def main() -> int:
    """Export, quantise for the CPU, and run the benchmark."""
    options, table = parse_options(__doc__, **OPTIONS), Table(COLUMNS)
    for variant in options.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            bundle = create_bundle(variant, Path(folder))
            words = ("--batches", options.batches, "--seconds", options.seconds)
            report = run_van_deploy("bench", bundle, *words, "--no-roofline", "--no-save")
        rows = [row for row in report["rows"] if row["latency"]]
        for row in sorted(rows, key=lambda row: (row["batch"], -row["images_per_s"])):
            ratio, latency = row["ratio"], row["latency"]
            cells = [f"{latency['p50_ms']:.2f}", f"{latency['p99_ms']:.2f}"]
            cells.append(f"{row['images_per_s']:.1f}")
            cells.append("{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) if ratio else "")
            table.row(variant, row["contender"], row["batch"], *cells)
        skipped = [f"{name} skipped, {reason}" for name, reason in report["skipped"].items()]
        table.notes += [f"{variant}: {text}" for text in [*report["warnings"], *skipped]]
    table.notes.append("The weights are random: accuracy is not measured here.")
    return table.print_json()


def create_bundle(variant: str, folder: Path) -> Path:
    """Create a bundle of random weights with FP32 and INT8 for CPUs."""
    bundle = folder / "bundle"
    run_van_deploy("export", variant, "--weights", "random", "--output", bundle)
    # The speed of INT8 does not depend on its scales, so the fastest calibration is used. Its gate,
    # which random weights may fail, is not part of this benchmark.
    fast = "--calibrate-on-noise --method minmax --no-equalize --no-bias-correction"
    words = ("--precision", "int8", "--target", "cpu", *fast.split())
    run_van_deploy("quantize", bundle, *words, codes=(0, 1))
    return bundle


if __name__ == "__main__":
    raise SystemExit(main())
