"""This project's files against the files of other exporters, in the same runtimes.

The measurement is that of ``van-deploy bench``: each file in its own process, and the ratio is
paired by round. The other files are created from the same random weights:

    export, export+sim        torch.onnx.export(dynamo=True) at opset 20, and through onnxsim
    torchscript+sim           the TorchScript exporter at opset 17 through onnxsim, as in the
                              scripts of timm and Optimum
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
from benchmarks.running import OPTIONS, create_bundle
from benchmarks.table import Table, parse_options
from van_deploy.bench.document import Contender, Row
from van_deploy.bench.interleaved import InterleavedBenchmark, TimedProcess
from van_deploy.bundle import Bundle
from van_deploy.config import BenchSettings, Budget
from van_deploy.stopwatch import no_progress

COLUMNS = ("variant", "runtime", "other file", "batch", "ours ms", "other ms", "ours x (95 %)")
SIZE, THREADS = 224, 2
# By title: runtime, our artifact, and the other files.
GROUPS = {
    "ONNX Runtime": ("onnxruntime", "fp32", ("export", "export+sim", "torchscript+sim")),
    "ONNX Runtime INT8": ("onnxruntime", "int8-cpu", ("quantize_static",)),
    "OpenVINO": ("openvino", "fp32", ("export+sim", "openvino direct")),
}


def main() -> int:
    """Create the files, time them, and compare."""
    options, table = parse_options(__doc__, **OPTIONS), Table(COLUMNS)
    batches = tuple(int(batch) for batch in options.batches.split(","))
    budget = Budget(seconds=float(options.seconds))
    common: dict[str, Any] = {"device": "cpu", "threads": THREADS, "batches": batches}
    settings = BenchSettings(**common, reference="ours", budget=budget)
    for variant in options.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
            folder = Path(name)
            inputs = folder / "none.npy"
            images = np.random.default_rng(0).standard_normal((max(batches), 3, SIZE, SIZE))
            np.save(inputs, images.astype(np.float32))
            bundle, files = Bundle.open(create_bundle(variant, folder)), _export(variant, folder)
            for title, (runtime, artifact, names) in GROUPS.items():
                paths = {"ours": bundle.verified_path(artifact), **{n: files[n] for n in names}}
                contenders = [
                    Contender(name, runtime, "fp32", str(path), mode="ort-cpu")
                    for name, path in paths.items()
                ]
                processes = [TimedProcess(one, inputs, SIZE, settings) for one in contenders]
                with InterleavedBenchmark(processes, settings, no_progress) as benchmark:
                    rows = benchmark.run()
                ours = {row.batch: row for row in rows if row.contender == "ours"}
                for row in rows:
                    if row.contender != "ours":
                        table.row(variant, title, *_cells(ours[row.batch], row))
    table.notes.append(f"{THREADS} threads, {SIZE} x {SIZE}, random weights.")
    return table.print_json()


def _cells(ours: Row, other: Row) -> list[object]:
    """Return the name, the batch, both medians in ms, and the ratio with its interval."""
    if not (ours.latency and other.latency and other.ratio):
        raise SystemExit(f"{other.contender}: {ours.error or other.error}")
    ratio, medians = other.ratio, [ours.latency.p50_ms, other.latency.p50_ms]
    interval = f"{1 / ratio.median:.2f} ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"
    return [other.contender, ours.batch, *(f"{ms:.1f}" for ms in medians), interval]


def _export(variant: str, folder: Path) -> dict[str, Path]:
    """Create the files of other exporters and return their paths by name."""
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
    paths["openvino direct"] = folder / "direct.xml"
    converted = openvino.convert_model(model, example_input=example, input=[-1, 3, SIZE, SIZE])
    openvino.save_model(converted, paths["openvino direct"], compress_to_fp16=False)
    paths["quantize_static"] = _quantize_static(paths["export+sim"], folder)
    return paths


def _quantize_static(source: Path, folder: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = np.random.default_rng(1).standard_normal((8, 3, SIZE, SIZE), np.float32)
    prepared, target = folder / "prepared.onnx", folder / "quantize_static.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, target, reader(images), per_channel=True, **types)
    return target


if __name__ == "__main__":
    raise SystemExit(main())
