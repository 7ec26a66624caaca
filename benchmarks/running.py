"""A bundle's artifacts in every runtime of this machine against PyTorch's own modes.

``van-deploy bench`` itself measures: every runner in a process of its own, rounds in turns.

    python -m benchmarks.running                       # van_b0 at 224, batch 1 and 8
    python -m benchmarks.running --variants van_b1 van_b2 --seconds 1
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.table import Table, options, van_deploy
from van_deploy.data.images import decode_item
from van_deploy.data.samples import sample_set

COLUMNS = ("variant", "runner", "batch", "p50 ms", "p99 ms", "images/s", "x eager (95 %)")
PHOTOGRAPHS = 16
ASKED = {"variants": ("van_b0",), "batches": "1,8", "seconds": "3"}


def main() -> int:
    """Export, quantize for the CPU, and run the benchmark."""
    arguments, table = options(__doc__, **ASKED), Table(COLUMNS)
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            bundle = made(variant, Path(folder))
            words = ("--batches", arguments.batches, "--seconds", arguments.seconds)
            report = van_deploy("bench", bundle, *words, "--no-roofline", "--no-save")
        timed = [row for row in report["rows"] if row["latency"]]
        for row in sorted(timed, key=lambda row: (row["batch"], -row["images_per_s"])):
            ratio, latency = row["ratio"], row["latency"]
            times = "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) if ratio else ""
            shown = (f"{latency['p50_ms']:.2f}", f"{latency['p99_ms']:.2f}")
            rate = f"{row['images_per_s']:.1f}"
            table.row(variant, row["contender"], row["batch"], *shown, rate, times)
        table.notes += [f"{variant}: {text}" for text in report["warnings"]]
        table.notes += [
            f"{variant}: {who} skipped, {why}" for who, why in report["skipped"].items()
        ]
    table.notes.append("Random weights: accuracy plays no part here.")
    return table.printed()


def made(variant: str, folder: Path) -> Path:
    """Return a bundle of random weights with FP32 and INT8 for CPUs, made by the commands."""
    bundle, images = folder / "bundle", folder / "images"
    images.mkdir()
    samples = [decode_item(item) for item in sample_set().items]
    for number in range(PHOTOGRAPHS):  # ever smaller crops of the sample photographs
        picture = samples[number % len(samples)]
        inset = number // len(samples) * min(picture.size) // 8
        box = (inset, inset, picture.width - inset, picture.height - inset)
        picture.crop(box).save(images / f"{number}.png")
    van_deploy("export", variant, "--weights", "random", "--output", bundle)
    # How fast INT8 is does not depend on its scales: the quickest way to have some will do,
    # and its gate, which random weights may miss, is not this benchmark's.
    quick = ("--method", "minmax", "--no-equalize", "--no-bias-correction")
    words = ("--precision", "int8", "--target", "cpu", "--images", images)
    van_deploy("quantize", bundle, *words, *quick, codes=(0, 1))
    return bundle


if __name__ == "__main__":
    raise SystemExit(main())
