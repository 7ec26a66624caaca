"""What each technique brings to INT8, on the trained networks there are.

Calibrates on one set of images and judges on another, against the FP32 logits.
``van_digits`` is inside the package; for another network give its checkpoint
and two folders of images, one folder a class.

    python benchmarks/fidelity.py
    python benchmarks/fidelity.py CHECKPOINT --calibrate DIR --evaluate DIR --baseline
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.images import find_images, load_batches
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME, write_digits_folder
from van_deploy.precision.compare import logits_session
from van_deploy.precision.equalize import EqualizeSettings, equalize
from van_deploy.precision.initial import initial_plan, nodes_in_scope
from van_deploy.precision.plan import QuantizationPlan, simulate
from van_deploy.precision.quantize import quantized_share
from van_deploy.precision.ranges import record_ranges
from van_deploy.precision.refine import RefineSettings, refine_plan
from van_deploy.precision.search import Drop, rank_layers, search_kept, top1_drop

CALIBRATION_IMAGES = 256
BATCH = 16
EQUALIZE_NONE = EqualizeSettings(**{f.name: False for f in fields(EqualizeSettings)})
REFINE_SWITCHES = ("bias_correction", "scales", "biases", "rounding")
LEARNT = ("scales", "biases", "rounding")


@dataclass(frozen=True)
class Set:
    """Normalised images ``(N, 3, S, S)`` and their classes ``(N,)``."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def batches(self, count: int | None = None) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the first ``count`` images, a batch at a time."""
        for start in range(0, len(self.images[:count]), BATCH):
            yield self.images[start : min(start + BATCH, count or len(self.images))]


@dataclass(frozen=True)
class Case:
    """One line of the table: what is switched on."""

    name: str
    equalize: EqualizeSettings
    refine: RefineSettings | None


def refining(*names: str) -> RefineSettings:
    """Return settings with only ``names`` switched on."""
    return RefineSettings(**{name: name in names for name in REFINE_SWITCHES})


def cases() -> list[Case]:
    """Return the lines of the table."""
    everything = EqualizeSettings()
    corrected = refining("bias_correction")
    switches = [field.name for field in fields(EqualizeSettings)]
    alone = [
        Case(f"{name} + bias_correction", replace(EQUALIZE_NONE, **{name: True}), corrected)
        for name in switches
    ]
    without = [
        Case(f"all equalising but {name} + bias_correction", less, corrected)
        for name in switches
        for less in [replace(everything, **{name: False})]
    ]
    learning = [
        Case(f"all equalising + bias_correction + {name}", everything, refining(*names))
        for name in LEARNT
        if (names := ("bias_correction", name))
    ]
    return [
        Case("scales by least error only", EQUALIZE_NONE, None),
        Case("bias_correction", EQUALIZE_NONE, corrected),
        *alone,
        Case("all equalising, no refining", everything, None),
        Case("all equalising + bias_correction", everything, corrected),
        *learning,
        Case("refining, no equalising", EQUALIZE_NONE, RefineSettings()),
        *without,
        Case("everything (default)", everything, RefineSettings()),
    ]


class Bench:
    """One network, its calibration and evaluation images, and its FP32 answers.

    Args:
        network: to quantise.
        calibrate: folder of images, one folder a class.
        evaluate: likewise.
        threads: of ONNX Runtime.
    """

    def __init__(self, network: LoadedVan, calibrate: Path, evaluate: Path, threads: int) -> None:
        """Read the images and fold the network."""
        self.network, self.threads = network, threads
        self.calibration = self._load(calibrate)
        shuffled = np.random.default_rng(0).permutation(len(self.calibration.images))
        first = shuffled[:CALIBRATION_IMAGES]
        self.labelled = self.calibration
        self.calibration = Set(self.calibration.images[first], self.calibration.labels[first])
        self.evaluation = self._load(evaluate)
        folded = fold_van(network.model, torch.from_numpy(self.calibration.images[:2]))
        self.model = onnx_from_van(folded.model, network.preprocessing.image_size)
        self.reference = self._run(self._original, self.evaluation)

    def _original(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(self.network.model(torch.from_numpy(images)).numpy())

    def _load(self, folder: Path) -> Set:
        paths = find_images(folder)
        classes = sorted({path.parent.name for path in paths})
        images, labels = [], []
        for part, names in load_batches(paths, self.network.preprocessing.transform(), 64):
            images.append(part)
            labels += [classes.index(name.parent.name) for name in names]
        return Set(np.concatenate(images), np.array(labels))

    def _run(self, run: Any, data: Set) -> npt.NDArray[np.float32]:
        return np.concatenate([run(part) for part in data.batches()])

    def plan(self, case: Case, scope: str) -> QuantizationPlan:
        """Return the plan of one case."""
        nodes = nodes_in_scope(self.model, scope)
        model = equalize(self.model, self.calibration.batches(64), nodes, case.equalize).model
        read = {node.input[0] for node in model.graph.node if node.name in nodes}
        ranges = record_ranges(
            model, self.calibration.batches(), histograms=read, threads=self.threads
        )
        plan = initial_plan(model, ranges, scope)
        if case.refine is None:
            return plan
        return refine_plan(plan, self.calibration.batches(), case.refine).plan

    def row(self, name: str, model: ModelProto, seconds: float, share: float) -> dict[str, Any]:
        """Return how near the logits of ``model`` are to FP32's on the evaluation images."""
        run = logits_session(model, fuse=False, threads=self.threads)
        found = self._run(run, self.evaluation)
        figures = compare(self.reference, found)
        labels = self.evaluation.labels
        drop = top1_drop(self.reference, found, labels)
        return {
            "case": name,
            "sqnr_db": round(figures.sqnr_db, 2),
            "agreement": round(100 * figures.top1_agreement, 2),
            "kl": float(f"{figures.kl:.3g}"),
            "top1": round(100 * float((found.argmax(1) == labels).mean()), 2),
            "drop": round(drop.points, 2),
            "int8_share": round(100 * share, 1),
            "seconds": round(seconds, 1),
        }

    def case_row(self, case: Case, scope: str) -> dict[str, Any]:
        """Return one line of the table."""
        start = time.perf_counter()
        plan = self.plan(case, scope)
        seconds = time.perf_counter() - start
        return self.row(f"{scope}: {case.name}", simulate(plan), seconds, quantized_share(plan))

    def search_row(self, max_drop: float) -> dict[str, Any]:
        """Return the line of the default plan after a search on the labelled calibration images."""
        start = time.perf_counter()
        plan = self.plan(cases()[-1], "pointwise")
        expected = self._run(self._original, self.labelled)

        def evaluate(candidate: QuantizationPlan) -> Drop:
            run = logits_session(simulate(candidate), fuse=False, threads=self.threads)
            return top1_drop(expected, self._run(run, self.labelled), self.labelled.labels)

        ranking = rank_layers(plan, self.calibration.images[:48])
        report = search_kept(plan, ranking, evaluate, max_drop)
        seconds = time.perf_counter() - start
        name = f"pointwise: search for at most {max_drop} points, {len(report.kept)} layers kept"
        name += "" if report.passed else " (budget not met)"
        return self.row(name, simulate(report.plan), seconds, report.share)

    def baseline_row(self, folder: Path) -> dict[str, Any]:
        """Return the line of ONNX Runtime's own ``quantize_static``, percentile 99.999."""
        from onnx import load_model, save_model
        from onnxruntime import quantization as ort

        nodes = nodes_in_scope(self.model, "pointwise")
        source, target = folder / "fp32.onnx", folder / "baseline.onnx"
        save_model(self.model, source)
        start = time.perf_counter()
        ort.quantize_static(
            str(source),
            str(target),
            _reader(self.calibration)(),
            nodes_to_quantize=list(nodes),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=ort.QuantType.QInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.Percentile,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "CalibPercentile": 99.999,
                "QuantizeBias": False,
            },
        )
        seconds = time.perf_counter() - start
        name = "pointwise: ONNX Runtime quantize_static, percentile"
        share = quantized_share(QuantizationPlan(self.model, dict.fromkeys(nodes)))  # type: ignore[arg-type]
        return self.row(name, load_model(target), seconds, share)


def _reader(data: Set) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands out the calibration images as ONNX Runtime wants them."""

        def __init__(self) -> None:
            self.parts = data.batches()

        def get_next(self) -> dict[str, Any] | None:
            """Return the next batch, None after the last."""
            part = next(self.parts, None)
            return None if part is None else {"images": part}

    return Reader


def main() -> int:
    """Run what the arguments ask for and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="?", default=EMBEDDED_NAME)
    parser.add_argument("--calibrate", type=Path, help="folder of images, one folder a class")
    parser.add_argument("--evaluate", type=Path, help="likewise, none of them the same")
    parser.add_argument("--only", action="append", help="only cases whose line holds this text")
    parser.add_argument("--baseline", action="store_true", help="ONNX Runtime's quantize_static")
    parser.add_argument("--max-drop", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    wanted = arguments.only or [""]
    with tempfile.TemporaryDirectory(prefix="van-deploy-bench-") as scratch:
        folder = Path(scratch)
        if arguments.weights == EMBEDDED_NAME and arguments.calibrate is None:
            arguments.calibrate = write_digits_folder(folder / "train", "train", 520)
            arguments.evaluate = write_digits_folder(folder / "heldout", "heldout")
        if arguments.calibrate is None or arguments.evaluate is None:
            parser.error("give --calibrate DIR and --evaluate DIR for a network of your own")
        bench = Bench(
            load_van(arguments.weights), arguments.calibrate, arguments.evaluate, arguments.threads
        )
        lines = [(f"{scope}: {case.name}", scope, case) for case in cases() for scope in SCOPES]
        for name, scope, case in lines:
            if any(text in name for text in wanted) and _in_table(case, scope):
                print(json.dumps(bench.case_row(case, scope)), flush=True)
        if any(text in "search" for text in wanted):
            print(json.dumps(bench.search_row(arguments.max_drop)), flush=True)
        if arguments.baseline:
            print(json.dumps(bench.baseline_row(folder)), flush=True)
    return 0


SCOPES = ("pointwise", "all")


def _in_table(case: Case, scope: str) -> bool:
    """Return whether a case is measured in a scope: ``all`` only has its first and last line."""
    ends = {cases()[0].name, cases()[-1].name}
    return scope == "pointwise" or case.name in ends


if __name__ == "__main__":
    sys.exit(main())
