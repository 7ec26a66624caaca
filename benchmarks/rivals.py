"""This project's files against the files others would deploy, in the same runtimes.

They race as ``van-deploy bench`` has it: each in a process of its own, the ratio is paired by
round. The others' files are made here, from the same random weights:

    export, export+sim        torch.onnx.export(dynamo=True) at opset 20, and through onnxsim
    torchscript+sim           the TorchScript exporter at opset 17 through onnxsim, as timm's and
                              Optimum's scripts do
    quantize_static           export+sim through ONNX Runtime's own quantiser (QDQ, uint8
                              activations, per channel, MinMax)
    openvino direct           OpenVINO's own conversion of the PyTorch module

    python -m benchmarks.rivals --variants van_b0 --seconds 3
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.precision import reader
from benchmarks.running import ASKED, made
from benchmarks.table import Table, options
from van_deploy.bench.document import Contender, Row
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.stopwatch import no_progress

COLUMNS = ("variant", "runtime", "theirs", "batch", "ours ms", "theirs ms", "ours x (95 %)")
SIZE, THREADS = 224, 2
# Runtime, our artifact, and the others' files.
GROUPS = {
    "ONNX Runtime": ("onnxruntime", "fp32", ("export", "export+sim", "torchscript+sim")),
    "ONNX Runtime INT8": ("onnxruntime", "int8-cpu", ("quantize_static",)),
    "OpenVINO": ("openvino", "fp32", ("export+sim", "openvino direct")),
}


def main() -> int:
    """Make the files, race them, and compare."""
    arguments, table = options(__doc__, **ASKED), Table(COLUMNS)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
            folder = Path(name)
            images = np.random.default_rng(0).standard_normal((max(batches), 3, SIZE, SIZE))
            np.save(folder / "none.npy", images.astype(np.float32))
            bundle, files = Bundle.open(made(variant, folder)), _rivals(variant, folder)
            for title, (runtime, artifact, names) in GROUPS.items():
                paths = {"ours": bundle.verified_path(artifact), **{n: files[n] for n in names}}
                budget = Budget(seconds=float(arguments.seconds))
                settings = BenchSettings(
                    device="cpu", threads=THREADS, reference="ours", budget=budget
                )
                lanes = [
                    TimedProcess(
                        Contender(name, runtime, "fp32", str(path), mode="ort-cpu"),
                        folder / "none.npy",
                        SIZE,
                        settings,
                    )
                    for name, path in paths.items()
                ]
                with InterleavedBenchmark(lanes, settings, no_progress) as race:
                    for batch in batches:
                        ours, *theirs = race.run_batch(batch, lanes)
                        for row in theirs:
                            table.row(variant, title, *_compared(ours, row))
    table.notes.append(f"{THREADS} threads, {SIZE} x {SIZE}, random weights.")
    return table.printed()


def _compared(ours: Row, theirs: Row) -> list[object]:
    """Return the name, the batch, both medians in ms, and the ratio with its interval."""
    if not (ours.latency and theirs.latency and theirs.ratio):
        raise SystemExit(f"{theirs.contender}: {ours.error or theirs.error}")
    ratio = theirs.ratio
    times = f"{1 / ratio.median:.2f} ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"
    medians = (f"{latency.p50_ms:.1f}" for latency in (ours.latency, theirs.latency))
    return [theirs.contender, ours.batch, *medians, times]


def _rivals(variant: str, folder: Path) -> dict[str, Path]:
    """Return the files others would deploy, by name."""
    import onnx
    import onnxsim
    import openvino
    import torch

    from van_deploy.model.van import random_van
    from van_deploy.model.variants import get_variant

    warnings.simplefilter("ignore")
    model, example = random_van(get_variant(variant).config), torch.zeros(2, 3, SIZE, SIZE)
    paths = {name: folder / f"{name}.onnx" for name in ("export", "export+sim", "torchscript+sim")}
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    dim = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1)},)}
    torch.onnx.export(
        model, (example,), dynamo=True, opset_version=20, verbose=False, **names, **dim
    ).save(paths["export"])
    script = folder / "torchscript.onnx"
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        model, (example,), script, dynamo=False, opset_version=17, dynamic_axes=axes, **names
    )
    for source, target in ((paths["export"], "export+sim"), (script, "torchscript+sim")):
        onnx.save(onnxsim.simplify(onnx.load(source))[0], paths[target])
    direct = folder / "direct.xml"
    converted = openvino.convert_model(model, example_input=example, input=[-1, 3, SIZE, SIZE])
    openvino.save_model(converted, direct, compress_to_fp16=False)
    quantised = _quantised(paths["export+sim"], folder)
    return {**paths, "quantize_static": quantised, "openvino direct": direct}


def _quantised(source: Path, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = np.random.default_rng(1).standard_normal((8, 3, SIZE, SIZE), np.float32)
    prepared, target = folder / "prepared.onnx", folder / "quantize_static.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, target, reader(images), per_channel=True, **kinds)
    return target


if __name__ == "__main__":
    raise SystemExit(main())
