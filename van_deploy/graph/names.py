"""Names of a graph's inputs and outputs, and its batch size."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import ModelProto

INPUT_NAME = "images"
OUTPUT_NAME = "logits"  # of a classifier; a backbone's are stage1 to stage4


def module_of(tensor: str) -> str:
    """Return the path of the module that computes a tensor.

    >>> module_of("logits"), module_of("stage2"), module_of("block1.0.mlp")
    ('head', 'norm2', 'block1.0.mlp')
    """
    if tensor == OUTPUT_NAME:
        return "head"
    return tensor.replace("stage", "norm") if tensor[:-1] == "stage" else tensor


def fixed_batch(model: ModelProto) -> int | None:
    """Return the static batch size of a graph; None if its batch is dynamic."""
    return int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value) or None


def make_batch_dynamic_(model: ModelProto) -> None:
    """Make a static batch dynamic and remove the shapes inferred from it."""
    if fixed_batch(model) is not None:
        model.graph.ClearField("value_info")
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
