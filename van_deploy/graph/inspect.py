"""What is in an ONNX file, without running it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from van_deploy.documents import DocumentError, json_from, require_regular_file
from van_deploy.errors import InputError
from van_deploy.graph.files import graph_facts
from van_deploy.manifest import GraphFacts

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["OnnxDescription", "TypedWeights", "describe_onnx", "read_onnx"]


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


def read_onnx(path: Path) -> ModelProto:
    """Return the graph in a file, without the weights it keeps in other files.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        require_regular_file(path)
        model = onnx.load_model(path, load_external_data=False)
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}' cannot be read: {reason}.", "Check the path.") from error
    except DecodeError as error:
        raise InputError(
            f"'{path}' is not an ONNX file, or is cut short: {error}.",
            "Export it again with `van-deploy export`.",
        ) from error
    if not model.opset_import or not model.graph.node:
        raise InputError(
            f"'{path}' is not an ONNX file: it holds no graph.",
            "Export it again with `van-deploy export`.",
        )
    return model


def describe_onnx(path: Path) -> OnnxDescription:
    """Return what a deployer wants to know of an ONNX file.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
    """
    model = read_onnx(path)
    try:
        return _described(model, path)
    except (ValueError, TypeError, KeyError, OverflowError, StopIteration) as error:
        raise InputError(
            f"'{path}' is damaged: its graph holds what ONNX does not know "
            f"({type(error).__name__}: {error}).",
            "Export it again with `van-deploy export`.",
        ) from error


def _described(model: ModelProto, path: Path) -> OnnxDescription:
    import math

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
