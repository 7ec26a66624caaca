"""The cost of ``van-deploy export`` against a bare torch.onnx.export + onnxsim.

Both start from random weights, each in a new process, alternating. Wall time and peak memory are
those of the whole process.

    python -m benchmarks.export                    # van_b1, and the memory of van_b6
    python -m benchmarks.export --variant van_b0 --skip-b6
"""

from __future__ import annotations

import statistics
import sys
import tempfile

from benchmarks.table import Table, measure_process, parse_options

BARE_EXPORT = """
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
    """Run both alternately and compare."""
    options = parse_options(__doc__, variant="van_b1", rounds=3, skip_b6=False)
    table, variant = Table(("variant", "command", "wall s", "peak memory GB")), options.variant
    rounds = [(_cost(variant, bare=True), _cost(variant)) for _ in range(options.rounds)]
    ratio = statistics.median(ours[0] / bare[0] for bare, ours in rounds)
    costs = {
        (variant, "bare"): [bare for bare, _ in rounds],
        (variant, f"van-deploy, {ratio:.2f} x bare"): [ours for _, ours in rounds],
    }
    if not options.skip_b6:
        costs["van_b6", "van-deploy"] = [_cost("van_b6")]
    for names, processes in costs.items():
        seconds, peaks = zip(*processes, strict=True)
        table.row(*names, f"{statistics.median(seconds):.1f}", f"{max(peaks) / 1e9:.2f}")
    table.notes.append(
        f"Median of {options.rounds} new processes each, alternating; the ratio is paired by "
        "round. van-deploy also checks the rewrites in float64 and the result in ONNX Runtime."
    )
    return table.print_json()


def _cost(variant: str, *, bare: bool = False) -> tuple[float, int]:
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        export = f"-m van_deploy export {variant} --weights random --output".split()
        code = ["-c", BARE_EXPORT, variant]
        return measure_process([sys.executable, *(code if bare else export), f"{folder}/bundle"])


if __name__ == "__main__":
    raise SystemExit(main())
