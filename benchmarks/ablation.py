r"""The effect of each INT8 technique on accuracy, and of its added nodes on the plan.

    python -m benchmarks.ablation --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.ablation          # van_digits only, with the images in the package

Each row is the whole network in scope ``pointwise``, rounded as TensorRT's graph is (without
FP16), on images that were not used for calibration. Kernels are those in the build log of a plan
by TensorRT for RTX for an Ada GPU: no GPU is needed.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch

from benchmarks.table import Table, parse_options
from van_deploy.config import BatchRange, BuildOptions, Profiling
from van_deploy.data.images import ImageSet, decoded_batches, image_set
from van_deploy.data.samples import digits_set
from van_deploy.engine.backend import RTX, load_backend
from van_deploy.engine.build import engine_from_onnx
from van_deploy.engine.sidecar import log_path
from van_deploy.graph.export import onnx_from_van, van_from_onnx
from van_deploy.graph.fold import fold_van
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.precision.equalize import TECHNIQUES, equalize
from van_deploy.precision.fp16 import default_fp32_nodes, fp16_from_fp32
from van_deploy.precision.images import choose_images, split, subsample
from van_deploy.precision.plan import (
    CORRECTION_IMAGES,
    QuantizationPlan,
    correct_biases,
    layers_in_scope,
    logits,
    make_plan,
)
from van_deploy.precision.qdq import qdq_for_tensorrt
from van_deploy.precision.scales import observe_ranges
from van_deploy.recipe import ImageSelection

COLUMNS = (
    *("techniques", "van_digits, SQNR dB", "agreement %"),
    *("van_b0 on CIFAR-10, SQNR dB", "agreement %"),
)
CORRECTION = "bias correction"
ALL_TECHNIQUES = (CORRECTION, *TECHNIQUES)
ADA = BuildOptions(
    targets=("sm_89",), profiles=(BatchRange(1, 2, 4),), profiling=Profiling.DETAILED
)
Images = npt.NDArray[np.float32]


def cases() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the rows: scale methods alone, cumulative techniques, and all techniques but one."""
    methods = ("minmax", "percentile", "mse")
    rows = {f"{method} scales alone": (method, tuple[str, ...]()) for method in methods}
    for count, technique in enumerate(ALL_TECHNIQUES, 1):
        rows[f"+ {technique}"] = ("mse", ALL_TECHNIQUES[:count])
    for technique in ALL_TECHNIQUES[:-1]:
        rows[f"all but {technique}"] = ("mse", tuple(t for t in ALL_TECHNIQUES if t != technique))
    return rows


class Network:
    """A trained network with its ranges, and images for bias correction and evaluation."""

    def __init__(self, loaded: LoadedVan, calibration: ImageSet, evaluation: ImageSet) -> None:
        """Export the network, record its ranges and read the images."""
        self.loaded = loaded
        correction = subsample(calibration, CORRECTION_IMAGES)
        self.correction, self.evaluation = (
            np.concatenate(list(self._batches(images))) for images in (correction, evaluation)
        )
        size = loaded.preprocessing.image_size
        folded = fold_van(loaded.model, torch.from_numpy(self.correction[:2])).model
        self.model = onnx_from_van(folded, size, loaded.config.in_chans)
        self.network = van_from_onnx(self.model, loaded.config)
        self.layers = layers_in_scope(self.network.model, ("pointwise",))
        inputs = {self.network.reads[name] for name in self.layers}
        self.ranges = observe_ranges(self.network, self._batches(calibration), inputs)
        self.expected = logits(QuantizationPlan(self.network), self.evaluation)

    def _batches(self, images: ImageSet) -> Iterator[Images]:
        for batch in decoded_batches(images.items, self.loaded.preprocessing, 16):
            yield batch.inputs

    def plan(self, method: Any, techniques: Collection[str]) -> QuantizationPlan:
        """Return the plan of one row."""
        equalized = equalize(self.network, self.ranges, self.layers, techniques)
        plan = make_plan(equalized, self.ranges, self.layers, method=method)
        return correct_biases(plan, self.correction) if CORRECTION in techniques else plan

    def cells(self, method: str, techniques: Collection[str]) -> tuple[str, str]:
        """Return the SQNR of one row in dB, and the agreement in percent."""
        actual = logits(self.plan(method, techniques), self.evaluation)
        metrics = compare(self.expected, actual)
        return f"{metrics.sqnr_db:.2f}", f"{100 * (metrics.top1_agreement or 0.0):.2f}"

    def kernel_notes(self) -> Iterator[str]:
        """Yield the number of kernels of a block in FP16 and in INT8, one sentence each."""
        fp32_nodes, blocks = default_fp32_nodes(self.model), sum(self.loaded.config.depths)
        graphs = {"FP16": fp16_from_fp32(self.model, fp32_nodes)}
        for name, techniques in {"INT8 plain": (), "INT8": TECHNIQUES}.items():
            plan = self.plan("mse", techniques)
            graphs[name] = qdq_for_tensorrt(self.model, plan, kept=fp32_nodes)
        for name, graph in graphs.items():
            counts = count_kernels(graph)
            yield (
                f"Kernels in a plan, {self.loaded.name}: {name}: {counts['block2.0']} kernels for "
                f"block2.0, {counts['total']} for all {blocks} blocks and the layers between them."
            )


def count_kernels(model: onnx.ModelProto) -> Counter[str]:
    """Return the kernels of each block in a plan of TensorRT for RTX, and ``total``."""
    with tempfile.TemporaryDirectory() as folder:
        source, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        onnx.save(model, source)
        backend = load_backend(RTX)
        engine_from_onnx(source, plan, backend=backend, options=ADA, precision="fp32")
        log = log_path(plan).read_text(encoding="utf-8")
    counts: Counter[str] = Counter()
    for line in re.findall(r"(?m)^(?:\[V\] )?Name: \S+, LayerType: .*", log):
        counts.update({*re.findall(r"\[ONNX Layer: (block\d\.\d+)", line), "total"})
    return counts


def main() -> int:
    """Measure every row on both networks, and count the kernels."""
    options = parse_options(__doc__, checkpoint="", calib="", eval="")
    digits, _ = split(choose_images(ImageSelection(source="digits")), 0.2, 0)
    networks = {"van_digits": Network(load_van(EMBEDDED_NAME), digits, digits_set("heldout"))}
    if options.checkpoint:
        calib, _ = split(choose_images(ImageSelection(), Path(options.calib)), 0.2, 0)
        loaded = load_van(options.checkpoint)
        networks["van_b0"] = Network(loaded, calib, image_set(Path(options.eval)))
    table = Table(COLUMNS[: 1 + 2 * len(networks)])
    for name, (method, techniques) in cases().items():
        pairs = [network.cells(method, techniques) for network in networks.values()]
        table.row(name, *(cell for pair in pairs for cell in pair))
    table.notes += [*networks.values()][-1].kernel_notes()
    return table.print_json()


if __name__ == "__main__":
    raise SystemExit(main())
