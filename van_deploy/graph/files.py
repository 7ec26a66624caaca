"""ONNX files on disk: one file below 2 GB, weights beside it above."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.graph.simplify import EXTERNAL_LIMIT_BYTES, operator_counts, tensor_bytes
from van_deploy.manifest import GraphFacts, TensorFacts

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["graph_facts", "save_onnx"]


def save_onnx(
    model: ModelProto, path: Path, external_limit_bytes: int = EXTERNAL_LIMIT_BYTES
) -> list[str]:
    """Write ``model`` to ``path`` and return the names of the files written.

    Past ``external_limit_bytes`` of weights, they go to ``NAME.data`` beside
    it, and the weights of ``model`` are emptied as they are written.
    """
    import onnx

    if tensor_bytes(model) <= external_limit_bytes:
        onnx.save_model(model, path)
        return [path.name]
    data = f"{path.name}.data"
    onnx.save_model(
        model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data
    )
    return [path.name, data]


def graph_facts(model: ModelProto) -> GraphFacts:
    """Return what is worth knowing of a graph: operators, weights, inputs and outputs.

    Shapes hold numbers, and names where a dimension is free.
    """
    counts = operator_counts(model)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    return GraphFacts(
        opset=opset,
        ir_version=model.ir_version,
        nodes=sum(counts.values()),
        operators=counts,
        weight_bytes=tensor_bytes(model),
        inputs={value.name: _type(value) for value in model.graph.input},
        outputs={value.name: _type(value) for value in model.graph.output},
    )


def _type(value: object) -> TensorFacts:
    from onnx.helper import tensor_dtype_to_np_dtype

    tensor = value.type.tensor_type  # type: ignore[attr-defined]
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return TensorFacts(dtype=str(tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)
