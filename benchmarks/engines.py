"""What building an engine costs with TensorRT for RTX; no GPU is needed.

Weights are random, which neither the graph nor the build time depends on. Every build runs
in a process of its own, so that the memory reported is that build's alone.

    python -m benchmarks.engines                        # all seven in FP16, van_b0 in three
    python -m benchmarks.engines --variants van_b2 --target sm_86
"""

from __future__ import annotations

import tempfile

from benchmarks.table import Table, options, van_deploy

VARIANTS = tuple(f"van_b{index}" for index in range(7))
SEVERAL = "van_b0"  # built in every precision, the others in FP16
COLUMNS = ("variant", "precision", "parser's layers", "parse and build s", "peak GB", "plan MB")


def main() -> int:
    """Export, quantize and build each variant twice."""
    given = options(__doc__, variants=VARIANTS, target="sm_89", batch="1:8:32")
    table = Table((*COLUMNS, "same twice"))
    words = ("--backend", "tensorrt-rtx", "--target", given.target, "--batch", given.batch)
    for variant in given.variants:
        precisions = ["fp32", "fp16", "int8"] if variant == SEVERAL else ["fp16"]
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            bundle = f"{folder}/bundle"
            van_deploy("export", variant, "--weights", "random", "--output", bundle)
            for precision in precisions[1:] or precisions:
                quick = ("--calibrate-on-noise", "--no-equalize", "--no-bias-correction")
                more = (*quick, "--method", "minmax") if precision == "int8" else ()
                van_deploy("quantize", bundle, "--precision", precision, *more, codes=(0, 1))
            wanted = ("build", bundle, *words, "--precision", ",".join(precisions), "--force")
            twice = [van_deploy(*wanted)["outcomes"] for _ in range(2)]
        for made, again in (
            [built["sidecar"] for built in pair] for pair in zip(*twice, strict=True)
        ):
            seconds = made["parse_seconds"] + made["build_seconds"]
            sizes = (made["peak_memory_bytes"] / 1e9, made["plan_bytes"] / 1e6)
            same = "yes" if made["plan_sha256"] == again["plan_sha256"] else "no"
            shown = (f"{seconds:.1f}", f"{sizes[0]:.2f}", f"{sizes[1]:.1f}")
            table.row(variant, made["precision"], made["parser_layers"], *shown, same)
    table.notes.append("No engine was executed: how fast they are was not measured here.")
    return table.printed()


if __name__ == "__main__":
    raise SystemExit(main())
