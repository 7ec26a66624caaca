r"""What FP16 and INT8 cost and bring, beside ONNX Runtime's own quantiser, in one run.

Four tables, each of which can be had alone with ``--only``:

methods  SQNR and agreement of FP16, of INT8 by every method of this project, and of
         ONNX Runtime's ``quantize_static`` (the same 1x1 convolutions, symmetric int8,
         per-channel weights) by each of its methods, on labelled images
memory   seconds an image and peak memory of recording ranges at 224 pixels, for two
         numbers of images, each in a process of its own, beside ONNX Runtime's
         percentile calibrator
cpu      speed of ``--target cpu`` against FP32 in ONNX Runtime at 224, measured in turns
defaults everything `van-deploy quantize` does by default, and each switch left out

    python benchmarks/precision.py --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval \
        --photographs ../shared/data/imagenet
    python benchmarks/precision.py --only methods    # van_digits, with what ships inside
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from van_deploy.bundle import Bundle
from van_deploy.images import UnreadableImages, find_images, open_image
from van_deploy.metrics import compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.precision.calibration import ImageSelection, choose_images, input_batches
from van_deploy.precision.compare import interleaved_ms, logits_session
from van_deploy.precision.cpu import CPU_SCOPE, qdq_for_cpu
from van_deploy.precision.equalize import EqualizeSettings
from van_deploy.precision.half import DEFAULT_KEEP, half_from_fp32, kept_nodes
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.quantize import qdq_from_plan
from van_deploy.precision.ranges import float_tensors, lean_batch, record_ranges
from van_deploy.precision.refine import RefineSettings
from van_deploy.precision.scales import Method
from van_deploy.precision.settings import QuantizeSettings
from van_deploy.precision.stage import quantize_bundle

TABLES = ("methods", "memory", "cpu", "defaults")
LIMITS = {"peak_gb": 1.5, "faster_than_onnxruntime": 8.0, "cpu_speed": 1.3}
ORT_IMAGES = 24  # ONNX Runtime keeps every activation of every image: 0.09 GB each at 224
ORT_METHODS = ("MinMax", "Entropy", "Percentile")
Images = npt.NDArray[np.float32]


def main() -> int:
    """Run what the arguments ask for; return 1 if a limit of :data:`LIMITS` is passed."""
    arguments = _arguments()
    if arguments.record:
        print(json.dumps(_record(arguments)))
        return 0
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        bench = _Bench(arguments, Path(folder))
        for table in arguments.only or TABLES:
            results[table] = getattr(bench, table)()
    print(json.dumps(results, indent=2))
    failures = [line for table in results.values() for line in table if line.get("passed") is False]
    return int(bool(failures))


class _Bench:
    """The exported networks, and one method a table."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.folder = folder
        spec = arguments.checkpoint or EMBEDDED_NAME
        self.bundle = self._exported(spec, folder / "network")
        self.preprocessing = Preprocessing.from_dict(self.bundle.manifest["preprocessing"])
        self.calib, self.eval = arguments.calib, arguments.eval
        if arguments.checkpoint is None:
            self.calib = write_digits_folder(folder / "calib", "train", 512)
            self.eval = write_digits_folder(folder / "eval", "heldout")

    def _exported(self, spec: str, path: Path, *more: str) -> Bundle:
        command = [sys.executable, "-m", "van_deploy", "export", spec, "-o", str(path), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Bundle.open(path)

    def _inputs(self, folder: Path, count: int) -> Images:
        chosen = choose_images(ImageSelection(count=count), folder)
        batches = input_batches(chosen, self.preprocessing, 32, UnreadableImages())
        return np.concatenate([images for images, _ in batches])

    def methods(self) -> list[dict[str, Any]]:
        """Return one line a graph: what it is, SQNR, agreement."""
        model = onnx.load(self.bundle.verified("fp32"))
        calib, judge = self._inputs(self.calib, 512), self._inputs(self.eval, 1 << 30)
        expected = _logits(model, judge)
        lines: list[dict[str, Any]] = []

        def line(name: str, graph: onnx.ModelProto) -> None:
            found = compare(expected, _logits(graph, judge))
            lines.append(
                {
                    "graph": name,
                    "sqnr_db": round(found.sqnr_db, 2),
                    "agreement": found.top1_agreement,
                    "bytes": graph.ByteSize(),
                    "images": found.images,
                }
            )
            _say(lines[-1])

        kept = kept_nodes(model, DEFAULT_KEEP)
        line("fp16", half_from_fp32(model, kept).model)
        ranges = record_ranges(model, [calib[i : i + 16] for i in range(0, len(calib), 16)])
        for method in Method:
            plan = initial_plan(model, ranges, "pointwise", method)
            line(f"int8 {method.value}", qdq_from_plan(plan, kept=kept))
        line("int8 mse, scope all", qdq_from_plan(initial_plan(model, ranges, "all"), kept=kept))
        for name in ORT_METHODS:
            line(f"onnxruntime {name}", _quantize_static(model, calib[:256], name, self.folder))
        return lines

    def defaults(self) -> list[dict[str, Any]]:
        """Return one line a set of switches of ``van-deploy quantize``, with what it took."""
        usual = QuantizeSettings()
        chosen = {
            "defaults": usual,
            "no refining": replace(usual, refine=None),
            "no equalising": replace(usual, equalize=None),
            "neither": replace(usual, equalize=None, refine=None),
            "no learning, biases corrected": replace(
                usual, refine=RefineSettings(scales=False, biases=False, rounding=False)
            ),
            "no shift": replace(usual, equalize=EqualizeSettings(shift=False)),
            "scope all": replace(usual, scope=("all",)),
            "max-drop 0.2": replace(usual, max_drop=0.2),
            "cpu": replace(usual, target="cpu"),
        }
        lines = []
        for name, settings in chosen.items():
            start = time.perf_counter()
            result = quantize_bundle(
                self.bundle.path, settings, images=self.calib, evaluate=self.eval
            )
            row = next(r for r in result.facts["comparison"] if r["requested"])
            lines.append(
                {
                    "settings": name,
                    **{key: row[key] for key in ("sqnr_db", "agreement", "correct", "images")},
                    "fp32_correct": result.facts["comparison"][0]["correct"],
                    "int8_share": result.facts["int8_share"],
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            _say(lines[-1])
        return lines

    def memory(self) -> list[dict[str, Any]]:
        """Return seconds an image and peak memory of three recordings at 224 pixels."""
        path = self._at_224()
        lines = []
        for who, count in (("ours", 64), ("ours", 512), ("onnxruntime", ORT_IMAGES)):
            command = [sys.executable, __file__, "--record", who, "--count", str(count)]
            command += ["--model", str(path)]
            if self.arguments.photographs:
                command += ["--photographs", str(self.arguments.photographs)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            lines.append({"who": who, "images": count, **json.loads(done.stdout.splitlines()[-1])})
            _say(lines[-1])
        few, many, theirs = lines
        faster = theirs["seconds_per_image"] / many["seconds_per_image"]
        many["passed"] = many["peak_gb"] <= LIMITS["peak_gb"]
        many["growth_from_64_images"] = round(many["peak_gb"] / few["peak_gb"], 3)
        theirs["ours_is_faster"] = round(faster, 1)
        theirs["passed"] = faster >= LIMITS["faster_than_onnxruntime"]
        return lines

    def cpu(self) -> list[dict[str, Any]]:
        """Return the speed of the CPU's INT8 graph over FP32's, measured in turns."""
        model = onnx.load(self._at_224())
        preprocessing = replace(self.preprocessing, image_size=224)
        inputs = np.stack(list(_crops(self.arguments.photographs, preprocessing, 16)))
        every = float_tensors(model)
        ranges = record_ranges(model, [inputs[i : i + 4] for i in (0, 4, 8, 12)], histograms=every)
        graph = qdq_for_cpu(initial_plan(model, ranges, CPU_SCOPE), ranges)
        runs = [logits_session(m, fuse=True, threads=None) for m in (model, graph)]
        lines = []
        for batch in (1, 8):
            pieces = [_batched(run, inputs[:batch]) for run in runs]
            fp32, int8 = interleaved_ms(pieces, inputs[:batch], rounds=25)
            ratio = fp32 / int8
            lines.append(
                {
                    "batch": batch,
                    "fp32_ms": round(fp32 / batch, 2),
                    "int8_ms": round(int8 / batch, 2),
                    "speed": round(ratio, 2),
                    "passed": ratio >= LIMITS["cpu_speed"],
                }
            )
            _say(lines[-1])
        return lines

    def _at_224(self) -> Path:
        spec = self.arguments.checkpoint or "van_b0"
        weights = () if self.arguments.checkpoint else ("--weights", "random")
        path = self.folder / "at_224"
        if not path.exists():
            self._exported(spec, path, "--image-size", "224", *weights)
        return Bundle.open(path).verified("fp32")


def _record(arguments: argparse.Namespace) -> dict[str, float]:
    """Record ranges in this process, and return what an image took and the peak memory."""
    model = onnx.load(arguments.model)
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    preprocessing = Preprocessing(size, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "a benchmark")
    crops = _crops(arguments.photographs, preprocessing, arguments.count)
    if arguments.record == "ours":
        start = time.perf_counter()
        record_ranges(model, _batches(crops, lean_batch(model)))
        seconds = time.perf_counter() - start
    else:
        with tempfile.TemporaryDirectory() as folder:
            seconds = _calibrate_with_onnxruntime(Path(arguments.model), crops, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    return {"seconds_per_image": round(seconds / arguments.count, 4), "peak_gb": round(peak, 2)}


def _calibrate_with_onnxruntime(model: Path, inputs: Iterator[Images], folder: Path) -> float:
    """Return the seconds ONNX Runtime's percentile calibrator takes for ``inputs``."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    start = time.perf_counter()
    calibrator = create_calibrator(
        model,
        ["Conv"],
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,
    )
    calibrator.collect_data(_reader(inputs))
    calibrator.compute_data()
    return time.perf_counter() - start


def _quantize_static(
    model: onnx.ModelProto, inputs: Images, method: str, folder: Path
) -> onnx.ModelProto:
    """Return ONNX Runtime's own Q/DQ file for the 1x1 convolutions, as TensorRT wants it."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing we have done
    source, target = folder / "source.onnx", folder / "target.onnx"
    onnx.save(model, source)
    quantize_static(
        source,
        target,
        _reader(inputs),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=list(nodes_in_scope(model)),
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
        def __init__(self) -> None:
            self.left = iter(inputs)

        def get_next(self) -> dict[str, Images] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    return Reader()


def _crops(folder: Path | None, preprocessing: Preprocessing, count: int) -> Iterator[Images]:
    """Yield ``count`` network inputs ``(C, S, S)``: photographs, then random crops of them."""
    rng = np.random.default_rng(0)
    if folder is None:
        from van_deploy.images import sample_batch

        yield from sample_batch(count, preprocessing.transform())
        return
    paths = find_images(folder)
    for number in range(count):
        picture = open_image(paths[number % len(paths)])
        if number >= len(paths):
            side = int(0.7 * min(picture.size))
            left, top = (int(rng.integers(0, whole - side + 1)) for whole in picture.size)
            picture = picture.crop((left, top, left + side, top + side))
        yield normalised(pixels_from_image(picture, preprocessing)[None], preprocessing)[0]


def _batches(inputs: Iterator[Images], size: int) -> Iterator[Images]:
    batch: list[Images] = []
    for image in inputs:
        batch.append(image)
        if len(batch) == size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _batched(run: Any, inputs: Images) -> Any:
    """Return ``run`` on all of ``inputs``, whatever it is given."""
    return lambda _: run(inputs)


def _logits(model: onnx.ModelProto, images: Images) -> npt.NDArray[np.float32]:
    run = logits_session(model, fuse=False)
    return np.concatenate([run(images[i : i + 25]) for i in range(0, len(images), 25)])


def _say(line: dict[str, Any]) -> None:
    print("  ".join(f"{key} {value}" for key, value in line.items()), file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=TABLES, help="this table; repeatable")
    parser.add_argument("--checkpoint", help="van_digits by default")
    parser.add_argument("--calib", type=Path, help="images to calibrate on, in class folders")
    parser.add_argument("--eval", type=Path, help="images to judge on, in class folders")
    parser.add_argument("--photographs", type=Path, help="photographs for 224 pixels")
    parser.add_argument("--record", choices=("ours", "onnxruntime"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.checkpoint and not (arguments.calib and arguments.eval):
        parser.error("--checkpoint needs --calib and --eval")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
