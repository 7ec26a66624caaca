"""This project's files against the files others would deploy, in the same runtimes.

Sessions of one process are called in turns, round by round; a ratio is the median of its
rounds' own. The others' files are made here, from the same random weights:

    export, export+sim        torch.onnx.export(dynamo=True) at opset 20, and through onnxsim
    torchscript+sim           the TorchScript exporter at opset 17 through onnxsim, as timm's and
                              Optimum's scripts do
    quantize_static           export+sim through ONNX Runtime's own quantiser (QDQ, uint8
                              activations, per channel, MinMax)
    openvino direct           OpenVINO's own conversion of the PyTorch module

    python -m benchmarks.rivals --variants van_b0 --rounds 40
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.running import made
from benchmarks.table import Table, interval
from van_deploy.bundle import Bundle

COLUMNS = ("variant", "runtime", "theirs", "batch", "ours ms", "theirs ms", "ours x (95 %)")
SIZE, THREADS = 224, 2
NOISE = 0.98
"""Two sessions of one file may differ by as much: below it, slower is slower."""
Run = Callable[[Any], Any]


def main() -> int:
    """Make the files, call them in turns, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["van_b0", "van_b1"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    table = Table(
        ("variant", "runtime", "theirs", "batch", "ours ms", "theirs ms", "ours x (95 %)")
    )
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
            folder = Path(name)
            bundle = Bundle.open(made(variant, folder))
            files = _rivals(variant, folder)
            fp32, int8 = (bundle.verified(each) for each in ("fp32", "int8-cpu"))
            groups = {
                ("ONNX Runtime", "export", _onnxruntime): (fp32, files),
                ("ONNX Runtime INT8", "quantize_static", _onnxruntime): (int8, files),
                ("OpenVINO", "export+sim", _openvino): (fp32, files),
            }
            for (runtime, first, opened), (ours, theirs) in groups.items():
                names = [n for n in theirs if _goes_with(runtime, n, first)]
                sessions = {"ours": opened(ours), **{n: opened(theirs[n]) for n in names}}
                for batch in arguments.batches:
                    _raced(table, variant, runtime, batch, sessions, arguments.rounds)
    table.notes.append(f"{THREADS} threads, {SIZE} x {SIZE}, random weights.")
    return table.printed()


def _goes_with(runtime: str, name: str, first: str) -> bool:
    if runtime == "OpenVINO":
        return name in (first, "openvino direct")
    quantised = name == "quantize_static"
    return quantised if first == "quantize_static" else not quantised and name[0] != "o"


def _raced(
    table: Table, variant: str, runtime: str, batch: int, sessions: dict[str, Run], rounds: int
) -> None:
    images = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 2):
        for name in list(sessions)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            sessions[name](images)
            if turn >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - begun))
    ours = times.pop("ours")
    for name, theirs in times.items():
        ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
        shown = interval(ratios)
        medians = (f"{np.median(ours):.1f}", f"{np.median(theirs):.1f}")
        table.row(variant, runtime, name, batch, *medians, shown)
        text = f"{variant}, batch {batch}, {runtime}: ours not slower than {name}"
        table.claim(text, f"{shown} x", float(np.median(ratios)) >= NOISE)


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(path: Path) -> Run:
    import openvino

    hints = {"INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", hints)


def _rivals(variant: str, folder: Path) -> dict[str, Path]:
    """Return the files others would deploy, by name."""
    import onnx
    import onnxsim
    import openvino
    import torch

    from van_deploy.model.random_weights import random_van
    from van_deploy.model.variants import variant_named

    warnings.simplefilter("ignore")
    model, example = random_van(variant_named(variant).config), torch.zeros(2, 3, SIZE, SIZE)
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
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = np.random.default_rng(1).standard_normal((8, 1, 3, SIZE, SIZE), np.float32)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch}

    prepared, target = folder / "prepared.onnx", folder / "quantize_static.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(prepared, target, Reader(), per_channel=True, **kinds)
    return target


if __name__ == "__main__":
    raise SystemExit(main())
