"""What building an engine costs with TensorRT for RTX; no GPU is needed.

Weights are random, which neither the graph nor the build time depends on. Every build runs
in a process of its own, so that the memory reported is that build's alone.

    python -m benchmarks.engines                        # all seven in FP16, van_b0 in three
    python -m benchmarks.engines van_b2 --target sm_86
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.table import Table, van_deploy

VARIANTS = tuple(f"van_b{index}" for index in range(7))
SEVERAL = "van_b0"  # built in every precision, the others in FP16
SECONDS, GIGABYTES = {"van_b0": 5.0}, {"van_b0": 2.0, "van_b6": 12.0}
COLUMNS = ("variant", "precision", "parser's layers", "parse and build s", "peak GB", "plan MB")


def main() -> int:
    """Export, quantize and build each variant twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--batch", default="1:8:32")
    arguments = parser.parse_args()
    table = Table((*COLUMNS, "same twice"))
    for variant in arguments.variants or VARIANTS:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            _built(table, variant, Path(folder) / "bundle", arguments)
    table.notes.append("No engine was executed: how fast they are was not measured here.")
    return table.printed()


def _built(table: Table, variant: str, bundle: Path, arguments: argparse.Namespace) -> None:
    van_deploy("export", variant, "--weights", "random", "--output", bundle)
    precisions = ["fp32", "fp16", "int8"] if variant == SEVERAL else ["fp16"]
    for precision in precisions[1:] or precisions:
        quick = ("--calibrate-on-noise", "--no-equalize", "--no-bias-correction")
        more = (*quick, "--method", "minmax") if precision == "int8" else ()
        van_deploy("quantize", bundle, "--precision", precision, *more, codes=(0, 1))
    words = ("--backend", "tensorrt-rtx", "--target", arguments.target, "--batch", arguments.batch)
    wanted = ("build", bundle, *words, "--precision", ",".join(precisions), "--force")
    first, second = (van_deploy(*wanted)["outcomes"] for _ in range(2))
    for outcome, again in zip(first, second, strict=True):
        made = outcome["sidecar"]
        same = made["plan_sha256"] == again["sidecar"]["plan_sha256"]
        seconds, peak = made["parse_seconds"] + made["build_seconds"], made["peak_memory_bytes"]
        what = f"{variant} {made['precision']}"
        table.row(
            *(variant, made["precision"], made["parser_layers"], f"{seconds:.1f}"),
            *(f"{peak / 1e9:.2f}", f"{made['plan_bytes'] / 1e6:.1f}"),
            "yes" if same else "no",
        )
        if variant in SECONDS:
            limit = SECONDS[variant]
            table.claim(f"{what}: within {limit:g} s", f"{seconds:.2f} s", seconds <= limit)
        if variant in GIGABYTES:
            limit, held = GIGABYTES[variant], peak / 1e9
            table.claim(f"{what}: peak memory within {limit:g} GB", f"{held:.2f} GB", held <= limit)
        table.claim(f"{what}: two builds give the same bytes", str(same), same)


if __name__ == "__main__":
    raise SystemExit(main())
