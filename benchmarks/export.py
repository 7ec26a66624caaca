"""What ``van-deploy export`` costs against a bare torch.onnx.export + onnxsim.

Both start from random weights, each run in a fresh process, in turns. Wall time and peak
memory are those of the whole process.

    python -m benchmarks.export                    # van_b1, and van_b6's memory
    python -m benchmarks.export --variant van_b0 --skip-b6
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile

from benchmarks.table import Table, process_cost

SLOWER_AT_MOST = 1.3
LIMITS_GB = {"van_b1": 1.85, "van_b6": 12.0}

BARE = """
import sys, torch, onnx, onnxsim
from van_deploy.model.van import random_van
from van_deploy.model.variants import variant_named
model = random_van(variant_named(sys.argv[1]).config)
program = torch.onnx.export(
    model, (torch.zeros(2, 3, 224, 224),), dynamo=True, opset_version=20, verbose=False,
    input_names=["images"], output_names=["logits"],
    dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
program.save(sys.argv[2] + ".onnx")
simplified, _ = onnxsim.simplify(onnx.load(sys.argv[2] + ".onnx"))
onnx.save(simplified, sys.argv[2] + ".onnx")
"""


def main() -> int:
    """Run both in turns and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="van_b1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-b6", action="store_true")
    arguments = parser.parse_args()
    variant, rounds = arguments.variant, arguments.rounds
    table = Table(("variant", "what", "wall s", "peak memory GB"))
    costs = [(_cost(True, variant), _cost(False, variant)) for _ in range(rounds)]
    bare, ours = ([pair[place] for pair in costs] for place in (0, 1))
    _row(table, variant, "bare", bare)
    _row(table, variant, "van-deploy", ours)
    ratio = statistics.median(pair[1][0] / pair[0][0] for pair in costs)
    text = f"export of {variant} within {SLOWER_AT_MOST:g} x of torch.onnx.export + onnxsim"
    table.claim(text, f"{ratio:.2f} x", ratio <= SLOWER_AT_MOST)
    if not arguments.skip_b6:
        _row(table, "van_b6", "van-deploy", [_cost(False, "van_b6")])
    table.notes.append(
        f"Median of {rounds} fresh processes each, in turns; the ratio is paired by round. "
        "Ours also proves the rewrites in float64 and checks the result in ONNX Runtime."
    )
    return table.printed()


def _row(table: Table, variant: str, name: str, costs: list[tuple[float, int]]) -> None:
    peak = max(peak for _, peak in costs) / 1e9
    table.row(variant, name, f"{statistics.median(s for s, _ in costs):.1f}", f"{peak:.2f}")
    limit = LIMITS_GB.get(variant)
    if limit and name == "van-deploy":
        text = f"peak memory of exporting {variant} within {limit:g} GB"
        table.claim(text, f"{peak:.2f} GB", peak <= limit)


def _cost(bare: bool, variant: str) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        words = ["export", variant, "--weights", "random", "--output", f"{folder}/bundle"]
        code = ["-c", BARE, variant, f"{folder}/bundle"]
        return process_cost([sys.executable, *(code if bare else ["-m", "van_deploy", *words])])


if __name__ == "__main__":
    raise SystemExit(main())
