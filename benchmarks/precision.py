r"""What FP16 and INT8 cost and bring, beside ONNX Runtime's own quantiser, in one run.

accuracy  ``van-deploy quantize`` in every form, judged on labelled images, beside ONNX
          Runtime's ``quantize_static`` (the same 1x1 convolutions, symmetric int8,
          per-channel weights) by each of its methods
digits    the same on van_digits, with the images inside the package
memory    seconds an image and peak memory of recording ranges at 224 pixels, for two
          numbers of images, each in a process of its own, beside ONNX Runtime's
          percentile calibrator

    python -m benchmarks.precision --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.precision --only digits    # with what ships inside
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.table import Table, van_deploy
from van_deploy.bundle import Bundle
from van_deploy.calibration_set import ImageSelection
from van_deploy.data import decoded_batches
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.graph.rebuilt import RebuiltVan, van_from_onnx
from van_deploy.metrics import compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.variants import VanConfig
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.job_images import choose_images
from van_deploy.precision.observers import images_at_once, observe
from van_deploy.precision.plan import counted_tensors, layers_in_scope

PARTS = ("accuracy", "digits", "memory")
COLUMNS = ("what", "images", "SQNR dB", "agreement %", "Δtop-1 pp", "INT8 % of work", "MB", "s")
FORMS = {
    "FP16": ("--precision", "fp16"),
    "INT8": (),
    "INT8 --max-drop 0.2": ("--max-drop", "0.2"),
    "INT8 --scope all": ("--scope", "all"),
    "INT8 --target cpu": ("--target", "cpu"),
}
ASKED = {  # least SQNR in dB, agreement in %, Δtop-1 in pp, work in INT8 in %
    "FP16": (70.0, 99.9, -0.1, 0.0),
    "INT8": (36.0, 99.3, -0.3, 0.0),
    "INT8 --max-drop 0.2": (36.0, 0.0, -0.2, 70.0),
    "INT8 --scope all": (30.0, 0.0, -0.5, 0.0),
    "INT8 --target cpu": (33.7, 99.3, -0.3, 0.0),
    f"{EMBEDDED_NAME}: INT8": (40.0, 99.3, -100.0, 0.0),
}
UNITS = ("SQNR", " dB"), ("agreement", " %"), ("Δtop-1", " pp"), ("work in INT8", " %")
ORT_IMAGES = 24  # ONNX Runtime keeps every activation of every image: 0.09 GB each at 224
ORT_CALIBRATION, ORT_METHODS = 256, ("MinMax", "Entropy", "Percentile")
PEAK_GB, FASTER = 1.2, 6.0
SIDE = 224
Images = npt.NDArray[np.float32]


def main() -> int:
    """Measure the parts asked for."""
    arguments = _arguments()
    if arguments.record:
        print(json.dumps(_record(arguments)))
        return 0
    channel = os.dup(1)  # ONNX Runtime's calibrators print, too
    os.dup2(2, 1)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        if "accuracy" in arguments.only and arguments.checkpoint:
            bundle = folder / "network"
            van_deploy("export", arguments.checkpoint, "--output", bundle)
            best = _forms(table, bundle, "", arguments.calib, arguments.eval)
            theirs = _onnxruntime(table, Bundle.open(bundle), arguments, folder)
            text = "INT8: at least 6 dB above ONNX Runtime's best method"
            table.claim(text, f"{best - theirs:+.2f} dB", best - theirs >= 6.0)
        if "digits" in arguments.only:
            van_deploy("export", EMBEDDED_NAME, "--output", folder / "digits")
            calib = write_digits_folder(folder / "calib", "train", 512)
            judge = write_digits_folder(folder / "eval", "heldout")
            _forms(table, folder / "digits", f"{EMBEDDED_NAME}: ", calib, judge)
        if "memory" in arguments.only:
            _memory(table, folder)
    os.dup2(channel, 1)
    return table.printed()


def _forms(table: Table, bundle: Path, prefix: str, calib: Path, judge: Path) -> float:
    """Put every form of ``quantize`` into the table; return the SQNR of the default INT8 in dB."""
    usual = 0.0
    for form, words in FORMS.items():
        if prefix and "--max-drop" in words:
            continue
        start = time.perf_counter()
        images = ("--images", calib, "--eval", judge, "--force")
        facts = van_deploy("quantize", bundle, *words, *images, codes=(0, 1))["facts"]
        seconds = time.perf_counter() - start
        reference, row = (
            next(r for r in facts["comparison"] if r["requested"] == wanted)
            for wanted in (False, True)
        )
        change = 100 * (row["correct"] - reference["correct"]) / row["images"]
        share = 100 * facts.get("int8_share", 0.0)
        figures = (row["sqnr_db"], 100 * row["agreement"], change, share)
        shown = (f"{figures[0]:.2f}", f"{figures[1]:.2f}", f"{change:+.2f}", f"{share:.1f}")
        size = f"{row['size_bytes'] / 1e6:.1f}"
        table.row(prefix + form, row["images"], *shown, size, f"{seconds:.0f}")
        for found, least, (what, unit) in zip(
            figures, ASKED.get(prefix + form, (-1e9,) * 4), UNITS, strict=True
        ):
            if least > -1e9 and least != 0.0:
                text = f"{prefix}{form}: {what} >= {least:g}{unit}"
                table.claim(text, f"{found:.2f}{unit}", found >= least)
        usual = row["sqnr_db"] if form == "INT8" else usual
    return usual


def _onnxruntime(
    table: Table, bundle: Bundle, arguments: argparse.Namespace, folder: Path
) -> float:
    """Put ONNX Runtime's own methods into the table; return the best SQNR in dB."""
    model = onnx.load(bundle.verified("fp32"))
    calib, judge = (
        _inputs(images, bundle.manifest.preprocessing, count)
        for images, count in ((arguments.calib, ORT_CALIBRATION), (arguments.eval, 1 << 30))
    )
    expected, best = _logits(model, judge), -np.inf
    for method in ORT_METHODS:
        start = time.perf_counter()
        graph = _quantize_static(model, calib, method, folder)
        found = compare(expected, _logits(graph, judge))
        table.row(
            f"ONNX Runtime quantize_static, {method}",
            *(found.images, f"{found.sqnr_db:.2f}", f"{100 * found.top1_agreement:.2f}", "", ""),
            *(f"{graph.ByteSize() / 1e6:.1f}", f"{time.perf_counter() - start:.0f}"),
        )
        best = max(best, found.sqnr_db)
    return best


def _memory(table: Table, folder: Path) -> None:
    """Measure seconds an image and peak memory of three recordings at 224 pixels."""
    van_deploy("export", "van_b0", "--weights", "random", "--output", folder / "at_224")
    model = Bundle.open(folder / "at_224").verified("fp32")
    found = []
    for who, count in (("ours", 64), ("ours", 512), ("onnxruntime", ORT_IMAGES)):
        words = ("--record", who, "--count", str(count), "--model", str(model))
        command = [sys.executable, "-m", "benchmarks.precision", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (few, _), (peak, ours), (theirs_gb, theirs) = found
    text = f"calibrating 512 images at {SIDE}: peak memory <= {PEAK_GB} GB"
    table.claim(text, f"{peak:.2f} GB", peak <= PEAK_GB)
    text = "memory independent of the count (512 images over 64)"
    table.claim(text, f"{peak / few:.2f} x", peak <= 1.1 * few)
    text = f"an image >= {FASTER:g} x faster than ONNX Runtime's percentile calibrator"
    shown = f"{theirs / ours:.1f} x ({1e3 * ours:.0f} against {1e3 * theirs:.0f} ms)"
    table.claim(text, shown, theirs >= FASTER * ours)
    table.notes.append(
        f"ONNX Runtime's percentile calibrator took {theirs_gb:.2f} GB for {ORT_IMAGES} images."
    )


def _record(arguments: argparse.Namespace) -> tuple[float, float]:
    """Record ranges in this process; return the peak memory in GB and the seconds an image."""
    rng = np.random.default_rng(0)
    images = (rng.standard_normal((3, SIDE, SIDE), np.float32) for _ in range(arguments.count))
    start = time.perf_counter()
    if arguments.record == "ours":
        network = _network(onnx.load(arguments.model))
        counted = counted_tensors(
            network, layers_in_scope(network.model, ("pointwise",)), "tensorrt"
        )
        observe(network, _batches(images, images_at_once(SIDE * SIDE)), counted)
    else:
        with tempfile.TemporaryDirectory() as folder:
            _calibrate_with_onnxruntime(Path(arguments.model), images, Path(folder))
    seconds = time.perf_counter() - start
    return peak_memory_bytes() / 2**30, seconds / arguments.count


def _network(model: onnx.ModelProto) -> RebuiltVan:
    """Return the network of an exported graph, which names its own architecture."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    fields = json.loads(properties["van_deploy.architecture"])
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return van_from_onnx(model, VanConfig(**config))


def _calibrate_with_onnxruntime(model: Path, inputs: Iterator[Images], folder: Path) -> None:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    calibrator = create_calibrator(
        model,
        ["Conv"],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,
    )
    calibrator.collect_data(_reader(inputs))
    calibrator.compute_data()


def _quantize_static(
    model: onnx.ModelProto, inputs: Images, method: str, folder: Path
) -> onnx.ModelProto:
    """Return ONNX Runtime's own Q/DQ file for the 1x1 convolutions, as TensorRT wants it."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing we have done
    source, target = folder / "source.onnx", folder / "target.onnx"
    onnx.save(model, source)
    quantize_static(
        source,
        target,
        _reader(inputs),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=list(layers_in_scope(_network(model).model, ("pointwise",))),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
        },
    )
    return onnx.load(target)


def _reader(inputs: Iterable[Images]) -> Any:
    """Return ``inputs`` one at a time, in the form ONNX Runtime's calibrators read."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter(inputs)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    return Reader()


def _batches(inputs: Iterator[Images], size: int) -> Iterator[Images]:
    batch: list[Images] = []
    for image in inputs:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _logits(model: onnx.ModelProto, images: Images) -> npt.NDArray[np.float32]:
    run = logits_session(model, fuse=False)
    return np.concatenate([run(images[i : i + 25]) for i in range(0, len(images), 25)])


def _inputs(folder: Path, preprocessing: Preprocessing, count: int) -> Images:
    chosen = choose_images(ImageSelection(count=count), folder)
    return np.concatenate([b.inputs for b in decoded_batches(chosen.items, preprocessing, 32)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--checkpoint", help="a trained network, for the part accuracy")
    parser.add_argument("--calib", type=Path, help="images to calibrate on, in class folders")
    parser.add_argument("--eval", type=Path, help="images to judge on, in class folders")
    parser.add_argument("--record", choices=("ours", "onnxruntime"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint and not (arguments.calib and arguments.eval):
        parser.error("--checkpoint needs --calib and --eval")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
