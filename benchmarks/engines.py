"""Builds an engine of every variant with TensorRT for RTX and says what each cost.

No GPU is needed. Weights are random, which neither the graph nor the build time
depends on. Each network is exported and each plan built in a process of its own,
one at a time, so that the memory reported is that build's alone.

    python benchmarks/engines.py --twice                # all seven in FP16, van_b0 in three
    python benchmarks/engines.py van_b2 --precision fp32 --target sm_86
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from van_deploy.config import BuildOptions
from van_deploy.engine.backend import RTX, backend_named
from van_deploy.engine.build import engine_from_onnx

VARIANTS = tuple(f"van_b{index}" for index in range(7))
PRECISIONS = ("fp32", "fp16", "int8")
SEVERAL = "van_b0"  # built in every precision, the others in FP16
LIMITS = {"seconds": {"van_b0": 5.0}, "gigabytes": {"van_b0": 2.0, "van_b6": 12.0}}
MAX_PARSER_LAYERS = {("van_b0", "fp32"): 220}


def main() -> int:
    """Run what the arguments ask for; return 1 if a limit is passed."""
    arguments = _arguments()
    if arguments.make:
        _make(arguments.variants[0], Path(arguments.make))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        for variant in arguments.variants or VARIANTS:
            command = [sys.executable, __file__, variant, "--make", folder]
            subprocess.run(command, check=True, stdout=sys.stderr)
            usual = PRECISIONS if variant == SEVERAL else ("fp16",)
            for precision in arguments.precision or usual:
                row = _measure(Path(folder), variant, precision, arguments)
                print(_line(row), file=sys.stderr, flush=True)
                rows.append(row)
            for path in Path(folder).glob(f"{variant}*"):
                path.unlink()
    result = _result(rows)
    print(json.dumps(result, indent=1))
    return int(not all(claim["met"] for claim in result["claims"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help="all seven by default")
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--batch", default="1:8:32")
    parser.add_argument("--twice", action="store_true", help="build twice and compare the bytes")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    return parser.parse_args()


def _make(variant: str, folder: Path) -> None:
    """Write the graphs of a variant with random weights; INT8 of one network only.

    What is in the scales does not change how TensorRT builds: ranges of one image do.
    """
    import onnx
    import torch

    from van_deploy.graph.export import onnx_from_van
    from van_deploy.graph.fold import fold_van
    from van_deploy.model.checkpoint import load_van
    from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes

    torch.set_num_threads(2)
    loaded = load_van(variant, weights="random")
    size = loaded.preprocessing.image_size
    images = torch.zeros(1, loaded.config.in_chans, size, size)
    folded = fold_van(loaded.model, images)
    model = onnx_from_van(folded.model, size, loaded.config.in_chans)
    config = loaded.config
    del loaded, folded
    onnx.save(model, folder / f"{variant}.fp32.onnx")
    kept = kept_nodes(model, DEFAULT_KEEP)
    onnx.save(fp16_from_fp32(model, kept), folder / f"{variant}.fp16.onnx")
    if variant == SEVERAL:
        from van_deploy.graph.rebuilt import van_from_onnx
        from van_deploy.precision.equalize import Equalization
        from van_deploy.precision.observers import observe
        from van_deploy.precision.plan import counted_tensors, layers_in_scope, make_plan
        from van_deploy.precision.qdq import qdq_for_tensorrt

        one = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).numpy()
        network = van_from_onnx(model, config)
        layers = layers_in_scope(network.model, ("pointwise",))
        ranges = observe(network, [one], counted_tensors(network, layers, "tensorrt"))
        plan = make_plan(Equalization(network), ranges, layers)
        onnx.save(qdq_for_tensorrt(model, plan, kept=kept), folder / f"{variant}.int8.onnx")


def _measure(
    folder: Path, variant: str, precision: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    options = BuildOptions.from_dict({"batch": [arguments.batch], "targets": arguments.target})
    sidecar = engine_from_onnx(
        folder / f"{variant}.{precision}.onnx",
        folder / f"{variant}-{precision}.plan",
        backend=backend_named(RTX),
        options=options,
        precision=precision,
        check_reproducible=arguments.twice,
    )
    return {
        "variant": variant,
        "precision": precision,
        "layers": sidecar.parser_layers,
        "seconds": sidecar.parse_seconds + sidecar.build_seconds,
        "gigabytes": sidecar.peak_memory_bytes / 1e9,
        "megabytes": sidecar.plan_bytes / 1e6,
        "same": sidecar.reproducible,
        "backend": f"{sidecar.backend} {sidecar.backend_version}",
    }


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the table, and whether the limits are kept."""
    claims = []
    for row in rows:
        what = f"{row['variant']} {row['precision']}"
        seconds = LIMITS["seconds"].get(row["variant"])
        gigabytes = LIMITS["gigabytes"].get(row["variant"])
        layers = MAX_PARSER_LAYERS.get((row["variant"], row["precision"]))
        for name, value, limit, unit in (
            ("parsed and built within", row["seconds"], seconds, " s"),
            ("peak memory within", row["gigabytes"], gigabytes, " GB"),
            ("parser's layers at most", row["layers"], layers, ""),
        ):
            if limit is not None:
                shown = f"{value:.2f}{unit}" if unit else str(value)
                claim = {"claim": f"{what}: {name} {limit:g}{unit}", "measured": shown}
                claims.append({**claim, "met": value <= limit})
        if row["same"] in (True, False):
            word = "the same bytes" if row["same"] else "other bytes"
            claims.append(
                {"claim": f"{what}: two builds", "measured": word, "met": bool(row["same"])}
            )
    columns = ["variant", "precision", "parser's layers", "parse and build s", "peak GB"]
    return {
        "columns": [*columns, "plan MB", "same twice"],
        "rows": [
            [
                row["variant"],
                row["precision"],
                str(row["layers"]),
                f"{row['seconds']:.1f}",
                f"{row['gigabytes']:.2f}",
                f"{row['megabytes']:.1f}",
                {True: "yes", False: "no"}.get(row["same"], "not checked"),
            ]
            for row in rows
        ],
        "claims": claims,
        "notes": [
            f"{rows[0]['backend']}, no GPU, random weights. No engine was executed: how fast "
            "they are was never measured."
        ],
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['variant']} {row['precision']}: {row['layers']} layers, {row['seconds']:.1f} s, "
        f"{row['gigabytes']:.2f} GB, plan {row['megabytes']:.1f} MB, same twice: {row['same']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
