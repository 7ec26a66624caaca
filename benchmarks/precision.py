r"""What FP16 and INT8 cost and bring, beside ONNX Runtime's own quantiser, in one run.

accuracy  `van-deploy quantize` in every form the project promises figures for, judged on
          labelled images, beside ONNX Runtime's ``quantize_static`` (the same 1x1
          convolutions, symmetric int8, per-channel weights) by each of its methods
digits    the same defaults on van_digits, with the images inside the package
memory    seconds an image and peak memory of recording ranges at 224 pixels, for two
          numbers of images, each in a process of its own, beside ONNX Runtime's
          percentile calibrator
cpu       speed of ``--target cpu`` against FP32 in ONNX Runtime at 224, measured in turns

    python benchmarks/precision.py --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval \
        --photographs ../shared/data/imagenet
    python benchmarks/precision.py --only digits    # with what ships inside
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from van_deploy.bundle import Bundle
from van_deploy.calibration_set import ImageSelection
from van_deploy.config import QuantizeSettings
from van_deploy.data import check_images, decoded_batches, find_images, open_image
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.graph.rebuilt import RebuiltVan, van_from_onnx
from van_deploy.metrics import compare
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.model.pixels import normalised, pixels_from_image
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.variants import VanConfig
from van_deploy.precision.comparison import logits_session
from van_deploy.precision.job_images import choose_images
from van_deploy.precision.observers import images_at_once, observe
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.precision.plan import counted_tensors, layers_in_scope

PARTS = ("accuracy", "digits", "memory", "cpu")
COLUMNS = (
    *("what", "images", "SQNR dB", "agreement %", "top-1 drop", "INT8 % of work"),
    *("MB", "s"),
)
ASKED = (  # SQNR in dB, agreement, largest drop in points, share of the work in INT8
    ("FP16", 70.0, 0.999, 0.1, 0.0),
    ("INT8", 36.0, 0.993, 0.3, 0.0),
    ("INT8 --max-drop 0.2", 36.0, 0.0, 0.2, 0.7),
    ("INT8 --scope all", 30.0, 0.0, 0.5, 0.0),
    ("INT8 --target cpu", 33.7, 0.993, 0.3, 0.0),
)
ORT_IMAGES = 24  # ONNX Runtime keeps every activation of every image: 0.09 GB each at 224
ORT_CALIBRATION = 256
ORT_METHODS = ("MinMax", "Entropy", "Percentile")
Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Figures:
    """What one graph costs: shares are 0..1, the drop is in percentage points."""

    images: int
    sqnr_db: float
    agreement: float
    drop: float | None
    share: float | None
    megabytes: float
    seconds: float


def main() -> int:
    """Print one JSON document; return 1 if a claim is missed."""
    arguments = _arguments()
    if arguments.record:
        print(json.dumps(_record(arguments)))
        return 0
    channel = os.fdopen(os.dup(1), "w")  # ONNX Runtime's calibrators print, too
    os.dup2(2, 1)
    result: dict[str, Any] = {"columns": list(COLUMNS), "rows": [], "claims": [], "notes": []}
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as folder:
        bench = _Bench(arguments, Path(folder), result)
        for part in arguments.only or PARTS:
            if part != "accuracy" or arguments.checkpoint:
                getattr(bench, part)()
    channel.write(json.dumps(result, indent=1) + "\n")
    channel.close()
    return int(not all(claim["met"] for claim in result["claims"]))


class _Bench:
    """The exported networks, and one method a part; each fills in ``result``."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
        self.arguments = arguments
        self.folder = folder
        self.result = result

    def _exported(self, spec: str, path: Path, *more: str) -> Bundle:
        command = [sys.executable, "-m", "van_deploy", "export", spec, "-o", str(path), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Bundle.open(path)

    def _claim(self, claim: str, measured: str, met: bool) -> None:
        self.result["claims"].append({"claim": claim, "measured": measured, "met": bool(met)})
        _say(f"{'met' if met else 'MISSED'}: {claim}: {measured}")

    def _line(self, name: str, figures: _Figures) -> None:
        row = [
            name,
            str(figures.images),
            f"{figures.sqnr_db:.2f}",
            f"{100 * figures.agreement:.2f}",
            "" if figures.drop is None else f"{figures.drop:+.2f}",
            "" if figures.share is None else f"{100 * figures.share:.1f}",
            f"{figures.megabytes:.1f}",
            f"{figures.seconds:.0f}",
        ]
        self.result["rows"].append(row)
        _say("  ".join(row))

    def _quantized(
        self, bundle: Bundle, name: str, settings: QuantizeSettings, calib: Path, judge: Path
    ) -> _Figures:
        """Return the figures of one `van-deploy quantize`, after putting them in the table."""
        start = time.perf_counter()
        result = quantize_bundle(bundle.path, settings, images=calib, evaluate=judge, force=True)
        seconds = time.perf_counter() - start
        row = next(r for r in result.facts["comparison"] if r["requested"])
        reference = result.facts["comparison"][0]
        drop = None
        if row["correct"] is not None:
            drop = 100 * (reference["correct"] - row["correct"]) / row["images"]
        figures = _Figures(
            row["images"],
            row["sqnr_db"],
            row["agreement"],
            drop,
            result.facts.get("int8_share"),
            row["size_bytes"] / 1e6,
            seconds,
        )
        self._line(name, figures)
        return figures

    def accuracy(self) -> None:
        """Measure every promised form on the checkpoint, and ONNX Runtime's own quantiser."""
        arguments = self.arguments
        bundle = self._exported(arguments.checkpoint, self.folder / "network")
        name = Path(arguments.checkpoint).name.split(".")[0]
        self.result["notes"].append(
            f"Judged on {arguments.eval.name} of {name}; s: the whole command."
        )
        usual = QuantizeSettings()
        forms = {
            "FP16": usual.changed(precision="fp16"),
            "INT8": usual,
            "INT8 --max-drop 0.2": usual.changed(max_drop=0.2),
            "INT8 --scope all": usual.changed(scope=("all",)),
            "INT8 --target cpu": usual.changed(target="cpu"),
        }
        found = {
            form: self._quantized(
                bundle, f"{name}: {form}", settings, arguments.calib, arguments.eval
            )
            for form, settings in forms.items()
        }
        theirs = self._onnxruntime(bundle, name)
        self._accuracy_claims(found, theirs)

    def _accuracy_claims(self, found: dict[str, _Figures], theirs: float) -> None:
        for form, sqnr, agreement, drop, share in ASKED:
            figures = found[form]
            asked = [(f"SQNR >= {sqnr} dB", f"{figures.sqnr_db:.2f} dB", figures.sqnr_db >= sqnr)]
            if agreement:
                measured = f"{100 * figures.agreement:.2f} %"
                held = figures.agreement >= agreement
                asked.append((f"agreement >= {100 * agreement:g} %", measured, held))
            if figures.drop is not None:
                measured, held = f"{figures.drop:+.2f}", figures.drop <= drop
                asked.append((f"top-1 drop <= {drop} points", measured, held))
            if share and figures.share is not None:
                measured = f"{100 * figures.share:.1f} %"
                asked.append(
                    (f">= {100 * share:g} % of the work in INT8", measured, figures.share >= share)
                )
            for what, measured, held in asked:
                self._claim(f"{form}: {what}", measured, held)
        gain = found["INT8"].sqnr_db - theirs
        self._claim(
            "INT8: at least 6 dB above ONNX Runtime's best method", f"{gain:+.2f} dB", gain >= 6.0
        )

    def _onnxruntime(self, bundle: Bundle, name: str) -> float:
        """Return the best SQNR of ONNX Runtime's own methods, in dB."""
        preprocessing = bundle.manifest.preprocessing
        model = onnx.load(bundle.verified("fp32"))
        calib, judge = (
            _inputs(folder, preprocessing, count)
            for folder, count in (
                (self.arguments.calib, ORT_CALIBRATION),
                (self.arguments.eval, 1 << 30),
            )
        )
        expected = _logits(model, judge)
        best = -np.inf
        for method in ORT_METHODS:
            start = time.perf_counter()
            graph = _quantize_static(model, calib, method, self.folder)
            seconds = time.perf_counter() - start
            found = compare(expected, _logits(graph, judge))
            size = graph.ByteSize() / 1e6
            figures = _Figures(
                found.images, found.sqnr_db, found.top1_agreement, None, None, size, seconds
            )
            self._line(f"{name}: ONNX Runtime quantize_static, {method}", figures)
            best = max(best, found.sqnr_db)
        return best

    def digits(self) -> None:
        """Measure the defaults on the network and the images inside the package."""
        calib = write_digits_folder(self.folder / "calib", "train", 512)
        judge = write_digits_folder(self.folder / "eval", "heldout")
        bundle = self._exported(EMBEDDED_NAME, self.folder / "digits")
        usual = QuantizeSettings()
        for form, settings in {
            "FP16": usual.changed(precision="fp16"),
            "INT8": usual,
            "INT8 --scope all": usual.changed(scope=("all",)),
            "INT8 --target cpu": usual.changed(target="cpu"),
        }.items():
            found = self._quantized(bundle, f"{EMBEDDED_NAME}: {form}", settings, calib, judge)
            if form == "INT8":
                self._claim(
                    "van_digits, INT8: agreement >= 99.3 % and SQNR >= 40 dB",
                    f"{100 * found.agreement:.2f} %, {found.sqnr_db:.2f} dB",
                    found.agreement >= 0.993 and found.sqnr_db >= 40.0,
                )

    def memory(self) -> None:
        """Measure seconds an image and peak memory of three recordings at 224 pixels."""
        path = self._at_224()
        lines = []
        for who, count in (("ours", 64), ("ours", 512), ("onnxruntime", ORT_IMAGES)):
            command = [sys.executable, __file__, "--record", who, "--count", str(count)]
            command += ["--model", str(path)]
            if self.arguments.photographs:
                command += ["--photographs", str(self.arguments.photographs)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            lines.append(json.loads(done.stdout.splitlines()[-1]))
            _say(f"{who} {count} {lines[-1]}")
        few, many, theirs = lines
        peak, growth = many["peak_gb"], many["peak_gb"] / few["peak_gb"]
        self._claim(
            "calibrating 512 images at 224: peak memory <= 1.2 GB", f"{peak:.2f} GB", peak <= 1.2
        )
        self._claim(
            "memory independent of the count (512 images over 64)", f"{growth:.2f} x", growth <= 1.1
        )
        ours_ms, theirs_ms = (1000 * line["seconds_per_image"] for line in (many, theirs))
        times = f"{ours_ms:.0f} against {theirs_ms:.0f} ms"
        faster = theirs_ms / ours_ms
        self._claim(
            "per image >= 6 x faster than ONNX Runtime's percentile calibrator",
            f"{faster:.1f} x ({times})",
            faster >= 6.0,
        )
        self.result["notes"].append(
            f"ONNX Runtime's percentile calibrator took {theirs['peak_gb']:.2f} GB for "
            f"{ORT_IMAGES} images."
        )

    def cpu(self) -> None:
        """Time every scope of `--target cpu` at 224 against FP32, and note the fastest."""
        path = self._at_224().parent
        settings = QuantizeSettings(target="cpu", scope=("auto",))
        result = quantize_bundle(path, settings, images=self.arguments.photographs, force=True)
        times = {row["name"]: row["ms_per_image"] for row in result.facts["comparison"]}
        shown = (f"{name} {ms:.1f}" for name, ms in times.items())
        self.result["notes"].append(
            f"`--target cpu --scope auto` at 224, ms an image in turns: {', '.join(shown)}; "
            f"recommended: {result.facts['recommended']}, {result.facts['why']}."
        )

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
        network = _network(model)
        start = time.perf_counter()
        layers = layers_in_scope(network.model, ("pointwise",))
        counted = counted_tensors(network, layers, "tensorrt")
        observe(network, _batches(crops, images_at_once(size * size)), counted)
        seconds = time.perf_counter() - start
    else:
        with tempfile.TemporaryDirectory() as folder:
            seconds = _calibrate_with_onnxruntime(Path(arguments.model), crops, Path(folder))
    peak = peak_memory_bytes() / 2**30
    return {"seconds_per_image": round(seconds / arguments.count, 4), "peak_gb": round(peak, 2)}


def _network(model: onnx.ModelProto) -> RebuiltVan:
    """Return the network of an exported graph, which names its own architecture."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    fields = json.loads(properties["van_deploy.architecture"])
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return van_from_onnx(model, VanConfig(**config))


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
        nodes_to_quantize=_pointwise(model),
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


def _pointwise(model: onnx.ModelProto) -> list[str]:
    return list(layers_in_scope(_network(model).model, ("pointwise",)))


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
        yield from check_images("", preprocessing, count).inputs
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


def _logits(model: onnx.ModelProto, images: Images) -> npt.NDArray[np.float32]:
    run = logits_session(model, fuse=False)
    return np.concatenate([run(images[i : i + 25]) for i in range(0, len(images), 25)])


def _inputs(folder: Path, preprocessing: Preprocessing, count: int) -> Images:
    chosen = choose_images(ImageSelection(count=count), folder)
    return np.concatenate([b.inputs for b in decoded_batches(chosen.items, preprocessing, 32)])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; repeatable")
    parser.add_argument("--checkpoint", help="a trained network, for the part accuracy")
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
