"""The dimensions that a graph leaves open, read and changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto


def fixed_batch(model: ModelProto) -> int | None:
    """Return the one batch size that a graph takes; None where its batch is dynamic."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value) or None


def with_dynamic_batch_(model: ModelProto) -> None:
    """Make a static batch dynamic, and forget the shapes that were inferred from it."""
    if fixed_batch(model) is None:
        return
    graph = model.graph
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
