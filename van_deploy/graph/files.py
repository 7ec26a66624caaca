"""ONNX files on disk (one below 2 GB, weights beside it above), and what is in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from van_deploy.documents import DocumentError, json_from, require_regular_file
from van_deploy.errors import InputError
from van_deploy.graph.simplify import EXTERNAL_LIMIT_BYTES, operator_counts, tensor_bytes
from van_deploy.manifest import GraphFacts, TensorFacts

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class TypedWeights:
    """The weights of one type.

    Attributes:
        values: how many.
        bytes: their size.
    """

    values: int
    bytes: int


@dataclass(frozen=True)
class OnnxDescription:
    """What a deployer wants to know of an ONNX file.

    Attributes:
        file: where it is.
        bytes: on disk, without the files beside it.
        graph: operators, inputs and outputs.
        weights: by ONNX's name of their type.
        parameters: values of all weights.
        external_files: files beside it that hold weights.
        producer: name and version of what wrote it.
        metadata: its own entries; those that are JSON (``van_deploy.*``) as the values they are.
        kind: says what this describes.
    """

    file: Path
    bytes: int
    graph: GraphFacts
    weights: Mapping[str, TypedWeights]
    parameters: int
    external_files: tuple[str, ...]
    producer: str
    metadata: Mapping[str, Any]
    kind: Literal["onnx"] = "onnx"


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

    Shapes hold numbers, and names where a dimension is dynamic.
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


def describe_onnx(path: Path) -> OnnxDescription:
    """Return what a deployer wants to know of an ONNX file.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        require_regular_file(path)
        model = onnx.load_model(path, load_external_data=False)
        if not model.opset_import or not model.graph.node:
            raise DecodeError("it holds no graph")  # noqa: TRY301 - told as protobuf's own is
        return _described(model, path)
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}' cannot be read: {reason}.", "Check the path.") from error
    except (DecodeError, ValueError, TypeError, KeyError, OverflowError, StopIteration) as error:
        raise InputError(
            f"'{path}' is not an ONNX file, or is damaged: {error}.",
            "Export it again with `van-deploy export`.",
        ) from error


def _described(model: ModelProto, path: Path) -> OnnxDescription:
    from onnx import TensorProto

    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    others = set()
    for tensor in model.graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type).lower()
        entries = {entry.key: entry.value for entry in tensor.external_data}
        counts[kind] += math.prod(tensor.dims)
        sizes[kind] += int(entries.get("length", 0)) or len(tensor.raw_data)
        if "location" in entries:
            others.add(entries["location"])
    return OnnxDescription(
        file=path,
        bytes=path.stat().st_size,
        graph=graph_facts(model),
        weights={kind: TypedWeights(counts[kind], sizes[kind]) for kind in counts},
        parameters=sum(counts.values()),
        external_files=tuple(sorted(others)),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata={entry.key: _read(entry.value) for entry in model.metadata_props},
    )


def _read(text: str) -> Any:
    """Return a metadata value as the JSON it may be, else as it stands."""
    if not text.startswith(("{", "[")):
        return text
    try:
        return json_from(text)
    except ValueError:
        return text
