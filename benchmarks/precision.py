r"""What FP16 and INT8 cost and bring, beside ONNX Runtime's own quantiser, in one run.

``van-deploy quantize`` in every form, judged on labelled images, on van_digits with the images
inside the package and on a trained network beside ONNX Runtime's ``quantize_static`` (the same 1x1
convolutions, symmetric int8, per-channel weights) by each of its methods; then seconds an image and
peak memory of recording ranges at 224 pixels, for two numbers of images, each in a process of its
own, beside ONNX Runtime's percentile calibrator.

    python -m benchmarks.precision --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.precision    # with what ships inside
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.ablation import parsed, parser_of
from benchmarks.table import Table, van_deploy
from van_deploy.bundle import Bundle
from van_deploy.data.images import decoded_batches, image_set
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.graph.export import van_from_onnx
from van_deploy.metrics import compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.images import choose_images
from van_deploy.precision.plan import counted_tensors, layers_in_scope
from van_deploy.precision.scales import images_at_once, observe
from van_deploy.recipe import ImageSelection

COLUMNS = ("what", "images", "SQNR dB", "agreement %", "Δtop-1 pp", "INT8 % of work", "MB", "s")
FIGURES = ("SQNR (dB)", "agreement (%)", "Δtop-1 (pp)", "work in INT8 (%)")
FORMS: dict[str, tuple[float | None, ...]] = {  # options, and the least FIGURES of van_b0
    "--precision fp16": (70.0, 99.9, -0.1, None),
    "--precision int8": (36.0, 99.3, -0.3, None),
    "--max-drop 0.2": (36.0, None, -0.2, 70.0),
    "--scope all": (30.0, None, -0.5, None),
    "--target cpu": (33.7, 99.3, -0.3, None),
}
DIGITS = {"--precision int8": (40.0, 99.3, None, None)}
ORT_IMAGES = 24  # ONNX Runtime keeps every activation of every image: 0.09 GB each at 224
ORT_CALIBRATION, ORT_METHODS = 256, ("MinMax", "Entropy", "Percentile")
PEAK_GB, FASTER, SIDE = 1.2, 6.0, 224
Images = npt.NDArray[np.float32]


def main() -> int:
    """Measure everything, or record in this process."""
    parser = parser_of(__doc__)
    parser.add_argument("--record", nargs=3, help=argparse.SUPPRESS)
    arguments = parsed(parser)
    if arguments.record:
        print(json.dumps(_record(*arguments.record)))
        return 0
    channel = os.dup(1)  # ONNX Runtime's calibrators print, too
    os.dup2(2, 1)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        if arguments.checkpoint:
            bundle, images = folder / "network", (arguments.calib, arguments.eval)
            van_deploy("export", arguments.checkpoint, "--output", bundle)
            ours = _forms(table, bundle, "", *images)
            above = ours - _onnxruntime(table, Bundle.open(bundle), *images, folder)
            text = "INT8: at least 6 dB above ONNX Runtime's best method"
            table.claim(text, f"{above:+.2f} dB", above >= 6.0)
        van_deploy("export", EMBEDDED_NAME, "--output", folder / "digits")
        calib = write_digits_folder(folder / "calib", "train", 512)
        judge = write_digits_folder(folder / "eval", "heldout")
        _forms(table, folder / "digits", f"{EMBEDDED_NAME}: ", calib, judge)
        _memory(table, folder)
    os.dup2(channel, 1)
    return table.printed()


def _forms(table: Table, bundle: Path, prefix: str, calib: Path, judge: Path) -> float:
    """Put every form of ``quantize`` into the table; return the SQNR of the default INT8 in dB."""
    usual = 0.0
    for form, least in FORMS.items():
        if prefix and "--max-drop" in form:
            continue
        start = time.perf_counter()
        images = ("--images", calib, "--eval", judge, "--force")
        facts = van_deploy("quantize", bundle, *form.split(), *images, codes=(0, 1))["facts"]
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
        wanted = DIGITS.get(form, (None,) * 4) if prefix else least
        for what, found, limit in zip(FIGURES, figures, wanted, strict=True):
            if limit is not None:
                text = f"{prefix}{form}: {what} >= {limit:g}"
                table.claim(text, f"{found:.2f}", found >= limit)
        usual = row["sqnr_db"] if form == "--precision int8" else usual
    return usual


def _onnxruntime(table: Table, bundle: Bundle, calib: Path, judge: Path, folder: Path) -> float:
    """Put ONNX Runtime's own methods into the table; return the best SQNR in dB."""
    path, preprocessing = bundle.verified("fp32"), bundle.manifest.preprocessing
    chosen = choose_images(ImageSelection(count=ORT_CALIBRATION), calib)
    given, shown = (
        np.concatenate([b.inputs for b in decoded_batches(images.items, preprocessing, 32)])
        for images in (chosen, image_set(judge))
    )
    expected, best = _logits(path, shown), -np.inf
    for method in ORT_METHODS:
        start, target = time.perf_counter(), folder / "target.onnx"
        _quantize_static(path, target, given, method)
        found = compare(expected, _logits(target, shown))
        table.row(
            f"ONNX Runtime quantize_static, {method}",
            *(found.images, f"{found.sqnr_db:.2f}", f"{100 * (found.top1_agreement or 0):.2f}"),
            *("", "", f"{target.stat().st_size / 1e6:.1f}", f"{time.perf_counter() - start:.0f}"),
        )
        best = max(best, found.sqnr_db)
    return best


def _quantize_static(source: Path, target: Path, inputs: Images, method: str) -> None:
    """Write ONNX Runtime's own Q/DQ file for the 1x1 convolutions, as TensorRT wants it."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing we have done
    every = {n.name: n.attribute for n in onnx.load(source).graph.node if n.op_type == "Conv"}
    pointwise = []
    for name, attributes in every.items():
        values = {a.name: onnx.helper.get_attribute_value(a) for a in attributes}
        if values["kernel_shape"] == [1, 1] and values.get("group", 1) == 1:
            pointwise.append(name)
    quantize_static(
        source,
        target,
        _reader(inputs),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=pointwise,
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


def _logits(path: Path, images: Images) -> Images:
    run = logits_session(onnx.load(path), fuse=False)
    return np.concatenate([run(images[i : i + 25]) for i in range(0, len(images), 25)])


def _memory(table: Table, folder: Path) -> None:
    """Measure seconds an image and peak memory of three recordings at 224 pixels."""
    bundle, found = folder / "at_224", []
    van_deploy("export", "van_b0", "--weights", "random", "--output", bundle)
    for words in (("ours", "64"), ("ours", "512"), ("onnxruntime", str(ORT_IMAGES))):
        command = [sys.executable, "-m", "benchmarks.precision", "--record", str(bundle), *words]
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


def _record(folder: str, who: str, number: str) -> tuple[float, float]:
    """Record ranges in this process; return the peak memory in GB and the seconds an image."""
    rng, bundle, count = np.random.default_rng(0), Bundle.open(folder), int(number)
    path, size = bundle.verified("fp32"), images_at_once(SIDE * SIDE)
    start = time.perf_counter()
    if who == "ours":
        network = van_from_onnx(onnx.load(path), bundle.manifest.architecture)
        layers = layers_in_scope(network.model, ("pointwise",))
        batches = (
            rng.standard_normal((min(size, count - done), 3, SIDE, SIDE), np.float32)
            for done in range(0, count, size)
        )
        observe(network, batches, counted_tensors(network, layers, "tensorrt"))
    else:
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

        images = (rng.standard_normal((3, SIDE, SIDE), np.float32) for _ in range(count))
        with tempfile.TemporaryDirectory() as place:
            augmented, method = f"{place}/augmented.onnx", CalibrationMethod.Percentile
            calibrator = create_calibrator(path, ["Conv"], augmented, method)
            calibrator.collect_data(_reader(images))
            calibrator.compute_data()
    seconds = time.perf_counter() - start
    return peak_memory_bytes() / 2**30, seconds / count


def _reader(inputs: Iterable[Images]) -> Any:
    """Return ``inputs`` one at a time, in the form ONNX Runtime's calibrators read."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter(inputs)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    return Reader()


if __name__ == "__main__":
    raise SystemExit(main())
