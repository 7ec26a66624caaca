"""Plans of TensorRT for RTX for an Ada GPU, built without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import ModelProto

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
