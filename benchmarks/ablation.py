r"""What each technique of INT8 brings, and what its added nodes cost in a plan.

    python -m benchmarks.ablation --checkpoint ../shared/checkpoints/van_b0_cifar10.pth.tar \
        --calib ../shared/data/cifar10/calib --eval ../shared/data/cifar10/eval
    python -m benchmarks.ablation          # van_digits alone, with the images inside the package

Every line is the whole network in scope ``pointwise``, rounded as TensorRT's graph rounds
(without FP16), on images it was not calibrated on. Kernels are those of the plan that
TensorRT for RTX builds for an Ada GPU, as its builder's log lists them: no GPU is needed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from benchmarks.table import Table
from van_deploy.calibration_set import ImageSelection
from van_deploy.data import ImageSet, decoded_batches, image_set
from van_deploy.data.calibration import digits_set, split
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.graph.rebuilt import RebuiltVan, van_from_onnx
from van_deploy.metrics import compare
from van_deploy.model.checkpoint import LoadedVan, load_van
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.precision.equalize import TECHNIQUES, Equalization, equalize
from van_deploy.precision.fp16 import DEFAULT_KEEP, fp16_from_fp32, kept_nodes
from van_deploy.precision.job_images import choose_images, spread_over
from van_deploy.precision.observers import ChannelRange, observe
from van_deploy.precision.plan import (
    QuantizationPlan,
    counted_tensors,
    layers_in_scope,
    make_plan,
)
from van_deploy.precision.qdq import qdq_for_tensorrt
from van_deploy.precision.scales import Method
from van_deploy.precision.simulate import CORRECTION_IMAGES, bias_corrected, logits

ASKED_DB = {"van_digits": 40.0, "van_b0": 36.0}
COLUMNS = ("what", "van_digits, dB", "agreement %", "van_b0 on CIFAR-10, dB", "agreement %")
Images = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One line: which techniques, and how scales are read."""

    name: str
    techniques: tuple[str, ...] = TECHNIQUES
    corrected: bool = True
    method: Method = Method.MSE


def cases() -> list[Case]:
    """Return every line: scales alone, one technique after the other, and each left out."""
    found = [Case(f"{m.value} scales alone", (), False, m) for m in Method]
    found.append(Case("mse + bias correction", ()))
    for count, technique in enumerate(TECHNIQUES, 1):
        found.append(Case(f"+ {technique}", TECHNIQUES[:count]))
    for technique in TECHNIQUES[:-1]:
        left = tuple(name for name in TECHNIQUES if name != technique)
        found.append(Case(f"all but {technique}", left))
    return [*found, Case("all but bias correction", corrected=False)]


class Network:
    """A trained network with its ranges, and images to correct and to judge on."""

    def __init__(self, loaded: LoadedVan, calibration: ImageSet, judging: ImageSet) -> None:
        """Export the network, record its ranges and read the images."""
        self.loaded = loaded
        correcting = spread_over(calibration, CORRECTION_IMAGES)
        self.correcting, self.judging = (
            np.concatenate(list(self._read(images))) for images in (correcting, judging)
        )
        size = loaded.preprocessing.image_size
        folded = fold_van(loaded.model, _tensor(self.correcting[:2])).model
        self.model: ModelProto = onnx_from_van(folded, size, loaded.config.in_chans)
        self.network: RebuiltVan = van_from_onnx(self.model, loaded.config)
        self.layers = layers_in_scope(self.network.model, ("pointwise",))
        counted = counted_tensors(self.network, self.layers, "tensorrt")
        self.ranges: Mapping[str, ChannelRange] = observe(
            self.network, self._read(calibration), counted
        )
        self.expected = logits(QuantizationPlan(self.network), self.judging)

    def _read(self, images: ImageSet) -> Iterator[Images]:
        for batch in decoded_batches(images.items, self.loaded.preprocessing, 16):
            yield batch.inputs

    def plan(self, case: Case) -> QuantizationPlan:
        """Return the plan of one line."""
        changed = Equalization(self.network)
        if case.techniques:
            changed = equalize(self.network, self.ranges, self.layers, case.techniques)
        plan = make_plan(changed, self.ranges, self.layers, method=case.method)
        return bias_corrected(plan, self.correcting) if case.corrected else plan

    def figures(self, case: Case) -> tuple[str, str]:
        """Return the SQNR of a line in dB, and the agreement in percent."""
        found = compare(self.expected, logits(self.plan(case), self.judging))
        return f"{found.sqnr_db:.2f}", f"{100 * (found.top1_agreement or 0.0):.2f}"


def _tensor(images: Images) -> Any:
    import torch

    return torch.from_numpy(images)


def kernels(network: Network) -> list[str]:
    """Return, one sentence each, how many kernels a block takes in FP16 and in INT8."""
    model, kept = network.model, kept_nodes(network.model, DEFAULT_KEEP)
    usual = network.plan(Case("all", corrected=False))
    plain = network.plan(Case("plain", (), corrected=False))
    graphs = {
        "FP16": fp16_from_fp32(model, kept),
        "INT8 plain": qdq_for_tensorrt(model, plain, kept=kept),
        "INT8 with the Mul": _with_only(model, usual, kept, multiply=True),
        "INT8 with the Add": _with_only(model, usual, kept, multiply=False),
        "INT8 with both": qdq_for_tensorrt(model, usual, kept=kept),
    }
    blocks = network.loaded.config.blocks
    found = {name: plan_kernels(graph) for name, graph in graphs.items()}
    return [
        f"{name}: {counts['block2.0']} kernels for block2.0, {counts['total']} for all {blocks} "
        "blocks and what stands between them"
        for name, counts in found.items()
    ]


def _with_only(
    model: ModelProto, plan: QuantizationPlan, kept: Mapping[str, str], *, multiply: bool
) -> ModelProto:
    """Return the graph with one of the two inserted nodes; its numbers are not the network's."""
    graph = qdq_for_tensorrt(model, replace(plan), kept=kept)
    gone = "Add" if multiply else "Mul"
    for node in [n for n in graph.graph.node if n.name.endswith(f"/{gone}")]:
        for reader in graph.graph.node:
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = node.input[0]
        graph.graph.node.remove(node)
    return graph


def plan_kernels(model: ModelProto) -> Counter[str]:
    """Return the kernels of each block in the plan of TensorRT for RTX, and ``total``."""
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, _severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(str(parser.get_error(0)))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile, entry = builder.create_optimization_profile(), model.graph.input[0]
    shape = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    profile.set_shape(entry.name, *((batch, *shape) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise RuntimeError("TensorRT for RTX built nothing")
    found: Counter[str] = Counter()
    for line in lines:
        if re.match(r"Name: \S+, LayerType: ", line):
            found.update({*re.findall(r"\[ONNX Layer: (block\d\.\d+)", line), "total"})
    return found


def main() -> int:
    """Measure every line on both networks, and count the kernels."""
    arguments = _arguments()
    parts = split(choose_images(ImageSelection(source="digits")), 0.2, 0)
    networks = {"van_digits": Network(load_van(EMBEDDED_NAME), parts[0], digits_set("heldout"))}
    if arguments.checkpoint:
        parts = split(choose_images(ImageSelection(), arguments.calib), 0.2, 0)
        loaded = load_van(arguments.checkpoint)
        networks["van_b0"] = Network(loaded, parts[0], image_set(arguments.eval))
    table = Table(COLUMNS[: 1 + 2 * len(networks)])
    for case in cases():
        figures = [network.figures(case) for network in networks.values()]
        table.row(case.name, *(cell for pair in figures for cell in pair))
        if case.name == f"+ {TECHNIQUES[-1]}":
            for name, (found, _) in zip(networks, figures, strict=True):
                text = f"{name}: all techniques >= {ASKED_DB[name]:g} dB"
                table.claim(text, f"{found} dB", float(found) >= ASKED_DB[name])
    last = list(networks.values())[-1]
    table.notes += [f"Kernels in a plan, {last.loaded.name}: {line}." for line in kernels(last)]
    return table.printed()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", help="a trained network beside van_digits")
    parser.add_argument("--calib", type=Path, help="images to calibrate on, in class folders")
    parser.add_argument("--eval", type=Path, help="images to judge on, in class folders")
    arguments = parser.parse_args()
    if arguments.checkpoint and not (arguments.calib and arguments.eval):
        parser.error("--checkpoint needs --calib and --eval")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
