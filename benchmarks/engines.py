"""The cost of building an engine with TensorRT for RTX; no GPU is needed.

The weights are random; they affect neither the graph nor the build time. Each build runs in its
own process, so that the peak memory is that of one build.

    python -m benchmarks.engines                        # all variants in FP16, van_b0 in three
    python -m benchmarks.engines --variants van_b2 --target sm_86
"""

from __future__ import annotations

import tempfile

from benchmarks.table import Table, parse_options, run_van_deploy

VARIANTS = tuple(f"van_b{index}" for index in range(7))
ALL_PRECISIONS_VARIANT = "van_b0"
COLUMNS = ("variant", "precision", "parser's layers", "parse and build s", "peak GB", "plan MB")


def main() -> int:
    """Export, quantise and build each variant twice."""
    options = parse_options(__doc__, variants=VARIANTS, target="sm_89", batch="1:8:32")
    table = Table((*COLUMNS, "same plan twice"))
    build = ("--backend", "tensorrt-rtx", "--target", options.target, "--batch", options.batch)
    for variant in options.variants:
        quantised = ["fp16", "int8"] if variant == ALL_PRECISIONS_VARIANT else ["fp16"]
        precisions = ["fp32", *quantised] if variant == ALL_PRECISIONS_VARIANT else quantised
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            bundle = f"{folder}/bundle"
            run_van_deploy("export", variant, "--weights", "random", "--output", bundle)
            for precision in quantised:
                fast = "--calibrate-on-noise --no-equalize --no-bias-correction --method minmax"
                words = ("--precision", precision, *(fast.split() if precision == "int8" else ()))
                run_van_deploy("quantize", bundle, *words, codes=(0, 1))
            command = ("build", bundle, *build, "--precision", ",".join(precisions), "--force")
            builds = [run_van_deploy(*command)["outcomes"] for _ in range(2)]
        for outcomes in zip(*builds, strict=True):
            first, second = (outcome["sidecar"] for outcome in outcomes)
            seconds = first["parse_seconds"] + first["build_seconds"]
            sizes = f"{first['peak_memory_bytes'] / 1e9:.2f}", f"{first['plan_bytes'] / 1e6:.1f}"
            same = "yes" if first["plan_sha256"] == second["plan_sha256"] else "no"
            layers = first["parser_layers"]
            table.row(variant, first["precision"], layers, f"{seconds:.1f}", *sizes, same)
    table.notes.append("No engine was executed: their speed was not measured here.")
    return table.print_json()


if __name__ == "__main__":
    raise SystemExit(main())
