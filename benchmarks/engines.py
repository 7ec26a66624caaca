"""Builds an engine of every variant with TensorRT for RTX and says what each cost.

No GPU is needed. Weights are random, which neither the graph nor the build time
depends on. Each network is exported and each plan built in a process of its own,
one at a time, so that the memory reported is that build's alone.

    python benchmarks/engines.py                        # all seven, FP32 and FP16, sm_89
    python benchmarks/engines.py van_b0 --target sm_86 --twice
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from van_deploy.engine.backend import RTX, backend_named
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.options import BuildOptions, parse_target
from van_deploy.engine.sidecar import Sidecar
from van_deploy.recipe import BatchRange

VARIANTS = tuple(f"van_b{index}" for index in range(7))
PRECISIONS = ("fp32", "fp16")
LIMITS = {"seconds": {"van_b0": 5.0}, "gigabytes": {"van_b0": 2.0, "van_b6": 12.0}}
MAX_PARSER_LAYERS = {("van_b0", "fp32"): 220}


def main() -> int:
    """Run what the arguments ask for; return 1 if a limit of :data:`LIMITS` is passed."""
    arguments = _arguments()
    if arguments.make:
        _make(arguments.variants[0], Path(arguments.make))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        for variant in arguments.variants or VARIANTS:
            subprocess.run([sys.executable, __file__, variant, "--make", folder], check=True)
            for precision in arguments.precision or PRECISIONS:
                row = _measure(Path(folder), variant, precision, arguments)
                print(_line(row), file=sys.stderr, flush=True)
                rows.append(row)
            for path in Path(folder).glob(f"{variant}*"):
                path.unlink()
    print(json.dumps(rows, indent=2))
    return int(any(row["passed"] is False for row in rows))


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
    """Write the FP32 and the FP16 graph of a variant with random weights."""
    import onnx
    import torch

    from van_deploy.graph.export import onnx_from_van
    from van_deploy.graph.fold import fold_van
    from van_deploy.model.checkpoint import load_van
    from van_deploy.precision.half import DEFAULT_KEEP, half_from_fp32, kept_nodes

    torch.set_num_threads(2)
    loaded = load_van(variant, weights="random")
    size = loaded.preprocessing.image_size
    images = torch.zeros(1, loaded.config.in_chans, size, size)
    folded = fold_van(loaded.model, images)
    model = onnx_from_van(folded.model, size, loaded.config.in_chans)
    del loaded, folded
    onnx.save(model, folder / f"{variant}.fp32.onnx")
    half = half_from_fp32(model, kept_nodes(model, DEFAULT_KEEP))
    onnx.save(half.model, folder / f"{variant}.fp16.onnx")


def _measure(
    folder: Path, variant: str, precision: str, arguments: argparse.Namespace
) -> dict[str, object]:
    target = parse_target(arguments.target)
    options = replace(
        BuildOptions(), profiles=(BatchRange.parse(arguments.batch),), targets=(target,)
    )
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
        "target": target,
        "batch": arguments.batch,
        "backend": f"{sidecar.backend} {sidecar.backend_version}",
        "parser_layers": sidecar.parser_layers,
        "parse_seconds": sidecar.parse_seconds,
        "build_seconds": sidecar.build_seconds,
        "peak_memory_gb": round(sidecar.peak_memory_bytes / 1e9, 3),
        "plan_mb": round(sidecar.plan_bytes / 1e6, 1),
        "device_memory_mb": {k: round(v / 1e6, 1) for k, v in sidecar.device_memory.items()},
        "reproducible": sidecar.reproducible,
        "fixed_addresses": sidecar.fixed_addresses,
        "passed": _passed(variant, precision, sidecar),
    }


def _passed(variant: str, precision: str, sidecar: Sidecar) -> bool | None:
    """Return whether the limits are kept; None where there are none."""
    bounds = [
        (sidecar.parse_seconds + sidecar.build_seconds, LIMITS["seconds"].get(variant)),
        (sidecar.peak_memory_bytes / 1e9, LIMITS["gigabytes"].get(variant)),
        (sidecar.parser_layers, MAX_PARSER_LAYERS.get((variant, precision))),
    ]
    kept = [value <= limit for value, limit in bounds if limit is not None]
    return all(kept) if kept else None


def _line(row: dict[str, object]) -> str:
    return (
        f"{row['variant']} {row['precision']}: {row['parser_layers']} layers, "
        f"parsed in {row['parse_seconds']} s, built in {row['build_seconds']} s, "
        f"{row['peak_memory_gb']} GB, plan {row['plan_mb']} MB, "
        f"reproducible: {row['reproducible']}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
