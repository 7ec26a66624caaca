r"""What each technique of INT8 brings, and what its added nodes cost in a plan.

    python -m benchmarks.ablation --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.ablation          # van_digits alone, with the images inside the package

Every line is the whole network in scope ``pointwise``, rounded as TensorRT's graph rounds
(without FP16), on images it was not calibrated on. Kernels are those of the plan that
TensorRT for RTX builds for an Ada GPU, as its builder's log lists them: no GPU is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from benchmarks.kinds import build_plan, input_shape
from benchmarks.table import Table, parse_options
from van_deploy.data.images import ImageSet, decoded_batches, image_set
from van_deploy.data.samples import digits_set
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

COLUMNS = ("what", "van_digits, dB", "agreement %", "van_b0 on CIFAR-10, dB", "agreement %")
CORRECTION = "bias correction"
EVERY = (CORRECTION, *TECHNIQUES)
Images = npt.NDArray[np.float32]


def cases() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return every line: scales alone, one technique after the other, and each left out."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {
        f"{method} scales alone": (method, ()) for method in ("minmax", "percentile", "mse")
    }
    for count, technique in enumerate(EVERY, 1):
        found[f"+ {technique}"] = ("mse", EVERY[:count])
    for technique in EVERY[:-1]:
        found[f"all but {technique}"] = ("mse", tuple(t for t in EVERY if t != technique))
    return found


class Network:
    """A trained network with its ranges, and images to correct and to judge on."""

    def __init__(self, loaded: LoadedVan, calibration: ImageSet, judging: ImageSet) -> None:
        """Export the network, record its ranges and read the images."""
        self.loaded = loaded
        correcting = subsample(calibration, CORRECTION_IMAGES)
        self.correcting, self.judging = (
            np.concatenate(list(self._read(images))) for images in (correcting, judging)
        )
        size = loaded.preprocessing.image_size
        folded = fold_van(loaded.model, torch.from_numpy(self.correcting[:2])).model
        self.model = onnx_from_van(folded, size, loaded.config.in_chans)
        self.network = van_from_onnx(self.model, loaded.config)
        self.layers = layers_in_scope(self.network.model, ("pointwise",))
        read = {self.network.reads[name] for name in self.layers}
        self.ranges = observe_ranges(self.network, self._read(calibration), read)
        self.expected = logits(QuantizationPlan(self.network), self.judging)

    def _read(self, images: ImageSet) -> Iterator[Images]:
        for batch in decoded_batches(images.items, self.loaded.preprocessing, 16):
            yield batch.inputs

    def plan(self, method: Any, techniques: Collection[str]) -> QuantizationPlan:
        """Return the plan of one line."""
        changed = equalize(self.network, self.ranges, self.layers, techniques)
        plan = make_plan(changed, self.ranges, self.layers, method=method)
        return correct_biases(plan, self.correcting) if CORRECTION in techniques else plan

    def figures(self, method: str, techniques: Collection[str]) -> tuple[str, str]:
        """Return the SQNR of a line in dB, and the agreement in percent."""
        found = compare(self.expected, logits(self.plan(method, techniques), self.judging))
        return f"{found.sqnr_db:.2f}", f"{100 * (found.top1_agreement or 0.0):.2f}"

    def kernels(self) -> Iterator[str]:
        """Yield, one sentence each, how many kernels a block takes in FP16 and in INT8."""
        kept = default_fp32_nodes(self.model)
        plain, usual = (
            qdq_for_tensorrt(self.model, self.plan("mse", techniques), kept=kept)
            for techniques in ((), TECHNIQUES)
        )
        half = fp16_from_fp32(self.model, kept)
        for name, graph in {"FP16": half, "INT8 plain": plain, "INT8": usual}.items():
            counts, blocks = plan_kernels(graph), sum(self.loaded.config.depths)
            yield (
                f"Kernels in a plan, {self.loaded.name}: {name}: {counts['block2.0']} kernels for "
                f"block2.0, {counts['total']} for all {blocks} blocks and what stands between them."
            )


def plan_kernels(model: ModelProto) -> Counter[str]:
    """Return the kernels of each block in the plan of TensorRT for RTX, and ``total``."""
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    build_plan(Logger(), model, [input_shape(model, batch) for batch in (1, 2, 4)])
    found: Counter[str] = Counter()
    for line in lines:
        if re.match(r"Name: \S+, LayerType: ", line):
            found.update({*re.findall(r"\[ONNX Layer: (block\d\.\d+)", line), "total"})
    return found


def main() -> int:
    """Measure every line on both networks, and count the kernels."""
    given = parse_options(__doc__, checkpoint="", calib="", eval="")
    digits, _ = split(choose_images(ImageSelection(source="digits")), 0.2, 0)
    networks = {"van_digits": Network(load_van(EMBEDDED_NAME), digits, digits_set("heldout"))}
    if given.checkpoint:
        calib, _ = split(choose_images(ImageSelection(), Path(given.calib)), 0.2, 0)
        loaded = load_van(given.checkpoint)
        networks["van_b0"] = Network(loaded, calib, image_set(Path(given.eval)))
    table = Table(COLUMNS[: 1 + 2 * len(networks)])
    for what, (method, techniques) in cases().items():
        figures = [network.figures(method, techniques) for network in networks.values()]
        table.row(what, *(cell for pair in figures for cell in pair))
    table.notes += [*networks.values()][-1].kernels()
    return table.print_json()


if __name__ == "__main__":
    raise SystemExit(main())
