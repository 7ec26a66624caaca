"""How long TensorRT for RTX takes to build each kind of graph of one network.

``python -m benchmarks.kinds CHECKPOINT``: classifier and feature maps, dynamic and static
batch, fixed and dynamic size, FP32, FP16 and BF16; processor seconds, in turns, medians. No GPU
is needed. ``docs/backbones.md`` shows the table.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from typing import Any

import torch
from onnx import ModelProto

from van_deploy.config.sizes import SizeRange, sides_of
from van_deploy.engine.backend import backend_named
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.model.checkpoint import ALL_STAGES, load_van
from van_deploy.precision.fp16 import bf16_from_fp32, fp16_from_fp32, usually_kept

ROUNDS = 3
SIZES = SizeRange(64, (64, 96), (128, 160))
BATCHES = (1, 2, 4)

Kind = tuple[str, str, str, str]


def graphs_of(spec: str) -> dict[Kind, bytes]:
    """Return every kind of graph of a network, serialised."""
    found: dict[Kind, bytes] = {}
    for what, indices in (("classifier", None), ("feature maps", ALL_STAGES)):
        network = load_van(spec, out_indices=indices).model
        folded = fold_van(network, torch.zeros(1, network.config.in_chans, 64, 96)).model
        for batch, sizes in itertools.product((None, 2), (None, SIZES)):
            fp32 = onnx_from_van(folded, (64, 96), batch=batch, sizes=sizes)
            kept = usually_kept(fp32)
            by_precision: dict[str, ModelProto] = {
                "fp32": fp32,
                "fp16": fp16_from_fp32(fp32, kept),
                "bf16": bf16_from_fp32(fp32, kept),
            }
            place = (f"batch {batch}" if batch else "dynamic batch", str(sizes or "64x96"))
            for precision, graph in by_precision.items():
                found[(what, *place, precision)] = graph.SerializeToString()
    return found


def build_seconds(trt: Any, logger: Any, graph: bytes) -> float:
    """Return the processor seconds of one build for SM89."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        raise SystemExit(f"TensorRT refuses a graph: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    images, profile = network.get_input(0), builder.create_optimization_profile()
    batch, channels, *sides = images.shape
    ends = (SIZES.min, SIZES.opt, SIZES.max)
    shapes = [
        (n if batch == -1 else batch, channels, *(sides_of(size) if sides[0] == -1 else sides))
        for n, size in zip(BATCHES, ends, strict=True)
    ]
    profile.set_shape(images.name, *shapes)
    config.add_optimization_profile(profile)
    start = time.process_time()
    if builder.build_serialized_network(network, config) is None:
        raise SystemExit("TensorRT built no plan.")
    return time.process_time() - start


def main() -> None:
    """Print one line a kind."""
    trt = backend_named("tensorrt-rtx").module
    logger = trt.Logger(trt.Logger.ERROR)
    graphs = graphs_of(sys.argv[1] if len(sys.argv) > 1 else "van_digits")
    seconds: dict[Kind, list[float]] = {kind: [] for kind in graphs}
    for _ in range(ROUNDS):
        for kind, graph in graphs.items():
            seconds[kind].append(build_seconds(trt, logger, graph))
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    for kind, value in median.items():
        plain = median["classifier", "dynamic batch", "64x96", kind[3]]
        print(f"{', '.join(kind):55} {value:6.2f} s {value / plain:6.2f}")


if __name__ == "__main__":
    main()
