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

from benchmarks.table import Table, parse_options, run_van_deploy
from van_deploy.bundle import Bundle
from van_deploy.data.images import decoded_batches, image_set
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.graph.export import van_from_onnx
from van_deploy.metrics import compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.images import choose_images
from van_deploy.precision.plan import histogram_tensors, layers_in_scope
from van_deploy.precision.scales import observe_ranges, range_batch_size
from van_deploy.recipe import ImageSelection

COLUMNS = ("what", "images", "SQNR dB", "agreement %", "Δtop-1 pp", "INT8 % of work", "MB", "s")
FORMS = ("--precision fp16", "--precision int8", "--max-drop 0.2", "--scope all", "--target cpu")
ORT_METHODS, ORT_CALIBRATION = ("MinMax", "Entropy", "Percentile"), 256
SIDE = 224
# ONNX Runtime keeps every activation of every image: 0.09 GB each at 224
RECORDINGS = (("ours", 64), ("ours", 512), ("onnxruntime", 24))
Images = npt.NDArray[np.float32]


def main() -> int:
    """Measure everything, or record in this process."""
    given = parse_options(__doc__, checkpoint="", calib="", eval="", record="")
    if given.record:
        print(json.dumps(_record(*given.record.split(","))))
        return 0
    channel = os.dup(1)  # ONNX Runtime's calibrators print, too
    os.dup2(2, 1)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        if given.checkpoint:
            bundle, images = folder / "network", (Path(given.calib), Path(given.eval))
            run_van_deploy("export", given.checkpoint, "--output", bundle)
            _forms(table, bundle, FORMS, images)
            _onnxruntime(table, Bundle.open(bundle), *images, folder / "target.onnx")
        run_van_deploy("export", EMBEDDED_NAME, "--output", folder / "digits")
        calib = write_digits_folder(folder / "calib", "train", 512)
        judge = write_digits_folder(folder / "eval", "heldout")
        forms = [form for form in FORMS if "--max-drop" not in form]
        _forms(table, folder / "digits", forms, (calib, judge))
        run_van_deploy("export", "van_b0", "--weights", "random", "--output", folder / "at_224")
        for who, count in RECORDINGS:
            words = [sys.executable, "-m", "benchmarks.precision", "--record"]
            command = [*words, f"{folder / 'at_224'},{who},{count}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peak, seconds = json.loads(done.stdout.splitlines()[-1])
            table.notes.append(
                f"Recording ranges of {count} images at {SIDE}, {who}: peak memory {peak:.2f} GB, "
                f"{1e3 * seconds:.0f} ms an image."
            )
    os.dup2(channel, 1)
    return table.print_json()


def _forms(table: Table, bundle: Path, forms: Iterable[str], images: tuple[Path, Path]) -> None:
    """Put forms of ``quantize`` into the table, with images to calibrate and to judge on."""
    for form in forms:
        start, (calib, judge) = time.perf_counter(), images
        words = (*form.split(), "--images", calib, "--eval", judge, "--force")
        facts = run_van_deploy("quantize", bundle, *words, codes=(0, 1))["facts"]
        seconds = time.perf_counter() - start
        reference, row = (
            next(r for r in facts["comparison"] if r["requested"] == wanted)
            for wanted in (False, True)
        )
        change = 100 * (row["correct"] - reference["correct"]) / row["images"]
        table.row(
            *(f"{bundle.name}: {form}", row["images"], f"{row['sqnr_db']:.2f}"),
            *(f"{100 * row['agreement']:.2f}", f"{change:+.2f}"),
            *(f"{100 * facts.get('int8_share', 0.0):.1f}", f"{row['size_bytes'] / 1e6:.1f}"),
            f"{seconds:.0f}",
        )


def _onnxruntime(table: Table, bundle: Bundle, calib: Path, judge: Path, target: Path) -> None:
    """Put ONNX Runtime's own methods into the table."""
    path, preprocessing = bundle.verified_path("fp32"), bundle.manifest.preprocessing
    chosen = choose_images(ImageSelection(count=ORT_CALIBRATION), calib)
    given, shown = (
        np.concatenate([b.inputs for b in decoded_batches(images.items, preprocessing, 32)])
        for images in (chosen, image_set(judge))
    )
    expected = _logits(path, shown)
    for method in ORT_METHODS:
        start = time.perf_counter()
        _quantize_static(path, target, given, method)
        seconds, found = time.perf_counter() - start, compare(expected, _logits(target, shown))
        table.row(
            *(f"ONNX Runtime quantize_static, {method}", found.images, f"{found.sqnr_db:.2f}"),
            *(f"{100 * (found.top1_agreement or 0):.2f}", "", ""),
            *(f"{target.stat().st_size / 1e6:.1f}", f"{seconds:.0f}"),
        )


def _quantize_static(source: Path, target: Path, inputs: Images, method: str) -> None:
    """Write ONNX Runtime's own Q/DQ file for the 1x1 convolutions, as TensorRT wants it."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing we have done
    pointwise = [
        conv.name
        for conv in onnx.load(source).graph.node
        if conv.op_type == "Conv"
        and onnx.helper.get_node_attr_value(conv, "kernel_shape") == [1, 1]
    ]
    quantize_static(
        source,
        target,
        reader(inputs),
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


def _record(folder: str, who: str, number: str) -> tuple[float, float]:
    """Record ranges in this process; return the peak memory in GB and the seconds an image."""
    rng, bundle, count = np.random.default_rng(0), Bundle.open(folder), int(number)
    path, size = bundle.verified_path("fp32"), range_batch_size(SIDE * SIDE)
    start = time.perf_counter()
    if who == "ours":
        network = van_from_onnx(onnx.load(path), bundle.manifest.architecture)
        layers = layers_in_scope(network.model, ("pointwise",))
        batches = (
            rng.standard_normal((min(size, count - done), 3, SIDE, SIDE), np.float32)
            for done in range(0, count, size)
        )
        observe_ranges(network, batches, histogram_tensors(network, layers, "tensorrt"))
    else:
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

        images = (rng.standard_normal((3, SIDE, SIDE), np.float32) for _ in range(count))
        with tempfile.TemporaryDirectory() as place:
            augmented, method = f"{place}/augmented.onnx", CalibrationMethod.Percentile
            calibrator = create_calibrator(path, ["Conv"], augmented, method)
            calibrator.collect_data(reader(images))
            calibrator.compute_data()
    seconds = time.perf_counter() - start
    return peak_memory_bytes() / 2**30, seconds / count


def reader(inputs: Iterable[Images]) -> Any:
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
