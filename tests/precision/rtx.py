"""The kernels of a plan, listed without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from onnx import ModelProto


def kernels_by_block(model: ModelProto, target: str = "SM89") -> Counter[str]:
    """Return how many kernels TensorRT for RTX runs for each block of a graph, and ``total``.

    The builder's verbose log lists them with the nodes each one computes.
    """
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
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
    assert parser.parse(model.SerializeToString()), parser.get_error(0)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    entry = model.graph.input[0]
    shape = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    profile.set_shape(entry.name, *((batch, *shape) for batch in (1, 2, 4)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    found: Counter[str] = Counter()
    for line in lines:
        if re.match(r"Name: \S+, LayerType: ", line):
            nodes = re.findall(r"\[ONNX Layer: (block\d\.\d+)", line)
            found.update({*nodes, "total"})
    return found
