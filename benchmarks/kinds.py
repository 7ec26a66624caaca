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
from collections.abc import Sequence
from typing import Any

import torch
from onnx import ModelProto

from van_deploy.config.sizes import SizeRange, height_width
from van_deploy.graph.export import onnx_from_van
from van_deploy.graph.fold import fold_van
from van_deploy.model.checkpoint import ALL_STAGES, load_van
from van_deploy.precision.fp16 import bf16_from_fp32, default_fp32_nodes, fp16_from_fp32

ROUNDS = 3
SIZES = SizeRange(64, (64, 96), (128, 160))
SHAPES = tuple(zip((1, 2, 4), (SIZES.min, SIZES.opt, SIZES.max), strict=True))
Shape = tuple[int, ...]


def build_plan(logger: Any, model: ModelProto, shapes: Sequence[Shape]) -> None:
    """Build a plan and throw it away; ``logger`` is told its kernels.

    Args:
        logger: a ``tensorrt_rtx.ILogger``.
        model: the graph.
        shapes: of its input: smallest, usual and largest.

    Raises:
        RuntimeError: the graph is refused, or nothing is built.
    """
    import tensorrt_rtx as trt

    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(f"TensorRT refuses a graph: {parser.get_error(0).desc()}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile.set_shape(model.graph.input[0].name, *shapes)
    config.add_optimization_profile(profile)
    if builder.build_serialized_network(network, config) is None:
        raise RuntimeError("TensorRT for RTX built nothing")


def input_shape(model: ModelProto, batch: int, sides: tuple[int, int] = (0, 0)) -> Shape:
    """Return the shape of the input ``(N, C, H, W)`` with its dynamic dimensions filled in."""
    wanted = (batch, 0, *sides)
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    return tuple(d.dim_value or w for d, w in zip(dimensions, wanted, strict=True))


def graphs_of(spec: str) -> dict[tuple[str, ...], ModelProto]:
    """Return every kind of graph of a network."""
    found: dict[tuple[str, ...], ModelProto] = {}
    for what, indices in (("classifier", None), ("feature maps", ALL_STAGES)):
        network = load_van(spec, out_indices=indices).model
        folded = fold_van(network, torch.zeros(1, network.config.in_chans, 64, 96)).model
        for batch, sizes in itertools.product((None, 2), (None, SIZES)):
            fp32 = onnx_from_van(folded, (64, 96), batch=batch, sizes=sizes)
            kept = default_fp32_nodes(fp32)
            kind = (what, f"batch {batch}" if batch else "dynamic batch", str(sizes or "64x96"))
            found |= {
                (*kind, "fp32"): fp32,
                (*kind, "fp16"): fp16_from_fp32(fp32, kept),
                (*kind, "bf16"): bf16_from_fp32(fp32, kept),
            }
    return found


def main() -> None:
    """Print one line a kind."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    graphs = graphs_of(sys.argv[1] if len(sys.argv) > 1 else "van_digits")
    seconds: dict[tuple[str, ...], list[float]] = {kind: [] for kind in graphs}
    for _, (kind, graph) in itertools.product(range(ROUNDS), graphs.items()):
        shapes = [input_shape(graph, batch, height_width(size)) for batch, size in SHAPES]
        start = time.process_time()
        build_plan(logger, graph, shapes)
        seconds[kind].append(time.process_time() - start)
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    for kind, value in median.items():
        plain = median["classifier", "dynamic batch", "64x96", kind[-1]]
        print(f"{', '.join(kind):55} {value:6.2f} s {value / plain:6.2f}")


if __name__ == "__main__":
    main()
