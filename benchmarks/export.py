"""What ``van-deploy export`` costs against a bare torch.onnx.export + onnxsim.

Both start from random weights, each run in a fresh process, in turns. Wall time and peak
memory are those of the whole process.

    python -m benchmarks.export                    # van_b1, and van_b6's memory
    python -m benchmarks.export --variant van_b0 --skip-b6
"""

from __future__ import annotations

import statistics
import sys
import tempfile

from benchmarks.table import Table, options, process_cost

BARE = """
import sys, torch, onnx, onnxsim
from van_deploy.model.van import random_van
from van_deploy.model.variants import get_variant
model = random_van(get_variant(sys.argv[1]).config)
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
    given = options(__doc__, variant="van_b1", rounds=3, skip_b6=False)
    table = Table(("variant", "what", "wall s", "peak memory GB"))
    turns = [(_cost(True, given.variant), _cost(False, given.variant)) for _ in range(given.rounds)]
    ratio = statistics.median(ours[0] / bare[0] for bare, ours in turns)
    rows = {
        (given.variant, "bare"): [bare for bare, _ in turns],
        (given.variant, f"van-deploy, {ratio:.2f} x bare"): [ours for _, ours in turns],
    }
    if not given.skip_b6:
        rows["van_b6", "van-deploy"] = [_cost(False, "van_b6")]
    for (variant, what), costs in rows.items():
        seconds, peak = statistics.median(s for s, _ in costs), max(peak for _, peak in costs)
        table.row(variant, what, f"{seconds:.1f}", f"{peak / 1e9:.2f}")
    table.notes.append(
        f"Median of {given.rounds} fresh processes each, in turns; the ratio is paired by round. "
        "Ours also proves the rewrites in float64 and checks the result in ONNX Runtime."
    )
    return table.printed()


def _cost(bare: bool, variant: str) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        words = ["export", variant, "--weights", "random", "--output", f"{folder}/bundle"]
        code = ["-c", BARE, variant, f"{folder}/bundle"]
        return process_cost([sys.executable, *(code if bare else ["-m", "van_deploy", *words])])


if __name__ == "__main__":
    raise SystemExit(main())
