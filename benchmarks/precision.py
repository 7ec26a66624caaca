r"""Accuracy, size and time of FP16 and INT8, next to ONNX Runtime's own quantiser, in one run.

``van-deploy quantize`` with different options, evaluated on labelled images, on van_digits with
the images in the package, and on a trained network next to ONNX Runtime's ``quantize_static`` (the
same 1x1 convolutions, symmetric int8, per-channel weights) with each of its methods. Then the
seconds per image and the peak memory of recording ranges at 224 pixels, for two numbers of images,
each in its own process, next to ONNX Runtime's percentile calibrator.

    python -m benchmarks.precision --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.precision    # with the data in the package
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

COLUMNS = ("command", "images", "SQNR dB", "agreement %", "Δtop-1 pp", "INT8 % of ops", "MB", "s")
QUANTIZE_OPTIONS = (
    *("--precision fp16", "--precision int8", "--max-drop 0.2", "--scope all", "--target cpu"),
)
ORT_METHODS, ORT_CALIBRATION = ("MinMax", "Entropy", "Percentile"), 256
SIDE = 224
# ONNX Runtime keeps all activations of all images: 0.09 GB per image at 224 pixels
RECORDINGS = (("ours", 64), ("ours", 512), ("onnxruntime", 24))
Images = npt.NDArray[np.float32]


def main() -> int:
    """Run the whole comparison, or one recording in this process."""
    options = parse_options(__doc__, checkpoint="", calib="", eval="", record="")
    if options.record:
        print(json.dumps(_record_ranges(*options.record.split(","))))
        return 0
    stdout = os.dup(1)  # ONNX Runtime's calibrators print to stdout
    os.dup2(2, 1)
    table = Table(COLUMNS)
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as name:
        folder = Path(name)
        if options.checkpoint:
            bundle, images = folder / "network", (Path(options.calib), Path(options.eval))
            run_van_deploy("export", options.checkpoint, "--output", bundle)
            _add_van_deploy_rows(table, bundle, QUANTIZE_OPTIONS, images)
            _add_onnxruntime_rows(table, Bundle.open(bundle), *images, folder / "target.onnx")
        run_van_deploy("export", EMBEDDED_NAME, "--output", folder / "digits")
        calib = write_digits_folder(folder / "calib", "train", 512)
        images = (calib, write_digits_folder(folder / "eval", "heldout"))
        without_drop = [words for words in QUANTIZE_OPTIONS if "--max-drop" not in words]
        _add_van_deploy_rows(table, folder / "digits", without_drop, images)
        bundle = folder / "at_224"
        run_van_deploy("export", "van_b0", "--weights", "random", "--output", bundle)
        for method, count in RECORDINGS:
            command = [sys.executable, "-m", "benchmarks.precision", "--record"]
            command.append(f"{bundle},{method},{count}")
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peak, seconds = json.loads(done.stdout.splitlines()[-1])
            table.notes.append(
                f"Recording ranges of {count} images at {SIDE}, {method}: peak memory {peak:.2f} "
                f"GB, {1e3 * seconds:.0f} ms per image."
            )
    os.dup2(stdout, 1)
    return table.print_json()


def _add_van_deploy_rows(
    table: Table, bundle: Path, quantize_options: Iterable[str], images: tuple[Path, Path]
) -> None:
    """Add a row for each set of ``quantize`` options; ``images``: calibration and evaluation."""
    for words in quantize_options:
        start, (calib, evaluation) = time.perf_counter(), images
        command = ("quantize", bundle, *words.split(), "--images", calib, "--eval", evaluation)
        facts = run_van_deploy(*command, "--force", codes=(0, 1))["facts"]
        seconds = time.perf_counter() - start
        reference, row = (
            next(r for r in facts["comparison"] if r["requested"] == requested)
            for requested in (False, True)
        )
        change = 100 * (row["correct"] - reference["correct"]) / row["images"]
        table.row(
            *(f"{bundle.name}: {words}", row["images"], f"{row['sqnr_db']:.2f}"),
            *(f"{100 * row['agreement']:.2f}", f"{change:+.2f}"),
            *(f"{100 * facts.get('int8_share', 0.0):.1f}", f"{row['size_bytes'] / 1e6:.1f}"),
            f"{seconds:.0f}",
        )


def _add_onnxruntime_rows(
    table: Table, bundle: Bundle, calib: Path, evaluation: Path, target: Path
) -> None:
    """Add a row for each method of ONNX Runtime's quantiser."""
    source, preprocessing = bundle.verified_path("fp32"), bundle.manifest.preprocessing
    selection = choose_images(ImageSelection(count=ORT_CALIBRATION), calib)
    inputs, images = (
        np.concatenate([b.inputs for b in decoded_batches(images.items, preprocessing, 32)])
        for images in (selection, image_set(evaluation))
    )
    expected = _logits(source, images)
    for method in ORT_METHODS:
        start = time.perf_counter()
        _quantize_static(source, target, inputs, method)
        seconds, metrics = time.perf_counter() - start, compare(expected, _logits(target, images))
        table.row(
            *(f"ONNX Runtime quantize_static, {method}", metrics.images, f"{metrics.sqnr_db:.2f}"),
            *(f"{100 * (metrics.top1_agreement or 0):.2f}", "", ""),
            *(f"{target.stat().st_size / 1e6:.1f}", f"{seconds:.0f}"),
        )


def _quantize_static(source: Path, target: Path, inputs: Images, method: str) -> None:
    """Write ONNX Runtime's own Q/DQ file of the 1x1 convolutions, as TensorRT requires it."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    logging.getLogger().setLevel(logging.ERROR)  # it recommends preprocessing that was done
    convolutions = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    kernel_shape = onnx.helper.get_node_attr_value
    pointwise = [c.name for c in convolutions if kernel_shape(c, "kernel_shape") == [1, 1]]
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


def _record_ranges(folder: str, method: str, number: str) -> tuple[float, float]:
    """Record ranges in this process; return the peak memory in GB and the seconds per image."""
    rng, bundle, count = np.random.default_rng(0), Bundle.open(folder), int(number)
    path, size = bundle.verified_path("fp32"), range_batch_size(SIDE * SIDE)
    start = time.perf_counter()
    if method == "ours":
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
        with tempfile.TemporaryDirectory() as temporary:
            augmented, percentile = f"{temporary}/augmented.onnx", CalibrationMethod.Percentile
            calibrator = create_calibrator(path, ["Conv"], augmented, percentile)
            calibrator.collect_data(reader(images))
            calibrator.compute_data()
    seconds = time.perf_counter() - start
    return peak_memory_bytes() / 2**30, seconds / count


def reader(inputs: Iterable[Images]) -> Any:
    """Return a ``CalibrationDataReader`` of ONNX Runtime for ``inputs``, one image at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        images = iter(inputs)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    return Reader()


if __name__ == "__main__":
    raise SystemExit(main())
