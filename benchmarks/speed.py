"""Time of commands, and of networks in the runtimes of a CPU.

The peak memory of a process includes that of the process that starts it, so PyTorch is imported
only where it is needed.
"""

import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.table import Table, measure_process, run_van_deploy
from van_deploy.bundle import Bundle, edit_bundle

INTERVAL = "{median:.2f} ({low:.2f} to {high:.2f})"
# By our artifact in a runtime: the files of other exporters in the same runtime.
RIVALS = {
    "ort-cpu/fp32": "ort-cpu/export,ort-cpu/export-sim,ort-cpu/torchscript-sim",
    "ort-cpu/int8-cpu": "ort-cpu/quantize_static",
    "openvino/fp32": "openvino/export-sim",
}


def startup(rounds: int = 9) -> Table:
    """Startup time.

    Wall time and peak memory of whole commands, each in a new process.
    """
    commands = ("--help", "list", "export --help")
    return time_commands(
        {f"van-deploy {c}": f"-m van_deploy {c}".split() for c in commands}, rounds
    )


def export(variant: str = "van_b1", rounds: int = 2) -> Table:
    """Export time and memory.

    `van-deploy export` next to torch.onnx.export and onnxsim alone, both from random weights, each
    in a new process, alternating. Wall time and peak memory are those of the whole process.
    van-deploy also checks the rewrites in float64 and the result in ONNX Runtime.
    """
    others = "import sys, benchmarks.exporters as e; e.export_with_torch(*sys.argv[1:])"
    ours = f"-m van_deploy export {variant} --weights random -o FOLDER".split()
    commands = {
        f"{variant}: torch.onnx.export and onnxsim": ["-c", others, variant, "FOLDER"],
        f"{variant}: van-deploy export": ours,
    }
    return time_commands(commands, rounds)


def time_commands(commands: Mapping[str, Sequence[str]], rounds: int) -> Table:
    """Run the commands of Python alternately; ``FOLDER`` in them is an empty folder."""
    table = Table(("command", "runs", "median s", "fastest s", "peak memory GB"))
    costs: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for name in [*commands] * rounds:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
            words = [folder if word == "FOLDER" else word for word in commands[name]]
            costs[name].append(measure_process([sys.executable, *words]))
    for name, processes in costs.items():
        seconds, peaks = zip(*processes, strict=True)
        times = f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}"
        table.row(name, rounds, *times, f"{max(peaks) / 1e9:.2f}")
    return table


def running(variant: str = "van_b0", batches: str = "1,8", seconds: float = 3.0) -> Table:
    """Inference speed on a CPU.

    The artifacts of a bundle in every runtime of this machine next to PyTorch's own modes, as
    `van-deploy bench` measures them: each in its own process, in interleaved rounds.
    """
    table = speed_table(variant, "x eager PyTorch (95 %)")
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        add_rows(table, create_bundle(variant, folder), batches, seconds)
    return table


def rivals(variant: str = "van_b0", batches: str = "1,8", seconds: float = 3.0) -> Table:
    """Inference speed compared with other exporters.

    `van-deploy bench` of the FP32 and INT8 artifacts of a bundle, and of the files that other
    exporters make of the same random weights. `export` is torch.onnx.export(dynamo=True) at opset
    20, `torchscript` its older form at opset 17 (as in the scripts of timm and Optimum), `sim` is
    onnxsim, and `quantize_static` ONNX Runtime's quantiser of `export-sim` (Q/DQ, uint8
    activations, per channel, MinMax).
    """
    from benchmarks.exporters import export_all

    table = speed_table(variant, "x ours (95 %)")
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        bundle = create_bundle(variant, folder)
        own = Bundle.open(bundle).artifact("fp32")
        with edit_bundle(bundle) as draft:
            for file in export_all(variant, Path(folder)):
                shutil.copyfile(file, draft.file(file.name))
                changes = {"name": file.stem, "file": file.name, "files": {file.name: ""}}
                draft.record(own.model_copy(update=changes))
        for ours, others in RIVALS.items():
            words = ("--runners", f"{ours},{others}", "--reference", ours)
            add_rows(table, bundle, batches, seconds, *words)
    return table


def speed_table(variant: str, ratio: str) -> Table:
    """Return an empty table for :func:`add_rows`."""
    columns = ("runner", "batch", "p50 ms", "p99 ms", "images/s", ratio)
    return Table(columns, notes=[f"{variant} with random weights."])


def add_rows(table: Table, bundle: str, batches: str, seconds: float, *words: str) -> None:
    """Run ``van-deploy bench`` and add its rows, the fastest of each batch size first."""
    time = ("--batches", batches, "--seconds", seconds, "--limit", 2 * seconds)
    report = run_van_deploy("bench", bundle, *time, *words, "--no-roofline", "--no-save")
    for row in sorted(report["rows"], key=lambda r: (r["batch"], -(r["images_per_s"] or 0))):
        if latency := row["latency"]:
            figures = f"{latency['p50_ms']:.2f}", f"{latency['p99_ms']:.2f}"
            ratio = INTERVAL.format(**row["ratio"]) if row["ratio"] else ""
            cells = (row["contender"], row["batch"], *figures)
            table.row(*cells, f"{row['images_per_s']:.1f}", ratio)
        else:
            table.notes.append(f"{row['contender']} at batch {row['batch']}: {row['error']}")
    skipped = [f"{name} skipped, {reason}" for name, reason in report["skipped"].items()]
    table.notes += [*report["warnings"], *skipped]


def create_bundle(variant: str, folder: str) -> str:
    """Create a bundle of random weights with FP32 and INT8 for CPUs."""
    bundle = f"{folder}/{variant}"
    run_van_deploy("export", variant, "--weights", "random", "--output", bundle)
    # The speed of INT8 does not depend on its scales, so the fastest calibration is used. Its gate,
    # which random weights may fail, is not part of this benchmark.
    fast = "--calibrate-on-noise --method minmax --no-equalize --no-bias-correction"
    words = ("--precision", "int8", "--target", "cpu", *fast.split())
    run_van_deploy("quantize", bundle, *words, codes=(0, 1))
    return bundle
