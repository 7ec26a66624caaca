"""What `van-deploy export` costs against a bare torch.onnx.export + onnxsim.

Both start from a network with random weights, each run in a fresh process, in
turn. Wall time and peak memory are those of the whole process.

    python benchmarks/export.py                        # van_b1, and van_b6's memory
    python benchmarks/export.py --variant van_b0 --skip-b6
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SLOWER_AT_MOST = 2.0
BASE_BYTES = 1.5e9
PARAMETER_TIMES = 6
B6_BYTES = 12e9

BARE = """
import sys, torch, onnx, onnxsim
from van_deploy.model.random_weights import random_van
from van_deploy.model.variants import variant_named
model = random_van(variant_named(sys.argv[1]).config)
program = torch.onnx.export(
    model, (torch.zeros(2, 3, 224, 224),), dynamo=True, opset_version=20, verbose=False,
    input_names=["images"], output_names=["logits"],
    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
program.save(sys.argv[2])
simplified, _ = onnxsim.simplify(onnx.load(sys.argv[2]))
onnx.save(simplified, sys.argv[2])
"""


def main() -> int:
    """Print the rows; return 1 if a claim is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="van_b1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-b6", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = _measure(arguments.variant, arguments.rounds, not arguments.skip_b6)
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return int(not all(claim["met"] for claim in result["claims"]))


def _measure(variant: str, rounds: int, with_b6: bool) -> dict[str, Any]:
    runs: dict[str, list[tuple[float, int]]] = {"bare": [], "van-deploy": []}
    for _ in range(rounds):
        for name, collected in runs.items():
            collected.append(_run(name, variant))
    seconds = {name: statistics.median(t for t, _ in found) for name, found in runs.items()}
    peaks = {name: max(peak for _, peak in found) for name, found in runs.items()}
    ratio = statistics.median(
        ours[0] / bare[0] for ours, bare in zip(runs["van-deploy"], runs["bare"], strict=True)
    )
    parameters = _parameters(variant)
    allowed = PARAMETER_TIMES * 4 * parameters + BASE_BYTES
    rows = [[variant, name, f"{seconds[name]:.1f}", f"{peaks[name] / 1e9:.2f}"] for name in runs]
    claims = [
        _claim(
            f"export of {variant} within {SLOWER_AT_MOST:g} x of torch.onnx.export + onnxsim",
            f"{ratio:.2f} x",
            ratio <= SLOWER_AT_MOST,
        ),
        _claim(
            f"its peak memory within {PARAMETER_TIMES} x the parameters' bytes + 1.5 GB "
            f"({allowed / 1e9:.2f} GB)",
            f"{peaks['van-deploy'] / 1e9:.2f} GB",
            peaks["van-deploy"] <= allowed,
        ),
    ]
    if with_b6:
        took, peak = _run("van-deploy", "van_b6")
        rows.append(["van_b6", "van-deploy", f"{took:.1f}", f"{peak / 1e9:.2f}"])
        claims.append(_claim("van_b6 within 12 GB", f"{peak / 1e9:.2f} GB", peak <= B6_BYTES))
    return {
        "columns": ["variant", "what", "wall s", "peak memory GB"],
        "rows": rows,
        "claims": claims,
        "notes": [
            f"Median of {rounds} fresh processes each, in turn; the ratio is paired by round. "
            "Ours also proves the rewrites in float64 and checks the result in ONNX Runtime."
        ],
    }


def _run(name: str, variant: str) -> tuple[float, int]:
    """Return wall seconds and peak resident bytes of one fresh process."""
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        if name == "bare":
            command = [sys.executable, "-c", BARE, variant, str(Path(folder) / "bare.onnx")]
        else:
            words = ["export", variant, "--weights", "random", "--output", f"{folder}/bundle"]
            command = [sys.executable, "-m", "van_deploy", *words, "--json"]
        start = time.perf_counter()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
            _, status, usage = os.wait4(process.pid, 0)
            took = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                errors.seek(0)
                raise SystemExit(errors.read().decode(errors="replace")[-2000:])
        return took, usage.ru_maxrss * 1024


def _parameters(variant: str) -> int:
    from van_deploy.model.variants import variant_named

    return variant_named(variant).config.parameter_count()


def _claim(claim: str, measured: str, met: bool) -> dict[str, object]:
    return {"claim": claim, "measured": measured, "met": met}


def _text(result: dict[str, Any]) -> str:
    lines = [result["columns"], *result["rows"]]
    lines += [
        ["met" if c["met"] else "MISSED", c["claim"], c["measured"]] for c in result["claims"]
    ]
    return "\n".join("  ".join(f"{cell:<14}" for cell in line) for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
