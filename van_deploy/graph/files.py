"""ONNX graphs on disk (one file below 2 GB, weights beside it above), simplified, and described."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, ValueInfoProto
from onnx.helper import tensor_dtype_to_np_dtype

from van_deploy.documents import DocumentError, parse_json, require_regular_file
from van_deploy.errors import InputError
from van_deploy.graph.names import fixed_batch
from van_deploy.manifest import GraphInfo, TensorInfo
from van_deploy.metrics import compare

# Largest relative difference between a graph and its simplification, in float32. Folding a
# constant changes the order of additions; on the trained van_b0 that alone moves the logits by
# about 1e-6 of their size.
SIMPLIFY_TOLERANCE = 1e-5
# Weights past this go into a file of their own: protobuf ends at 2 GiB.
EXTERNAL_LIMIT_BYTES = 2_000_000_000

Floats = npt.NDArray[np.float32]


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
    graph: GraphInfo
    weights: Mapping[str, TypedWeights]
    parameters: int
    external_files: tuple[str, ...]
    producer: str
    metadata: Mapping[str, Any]
    kind: Literal["onnx"] = "onnx"


def operator_counts(model: ModelProto) -> dict[str, int]:
    """Return how many nodes of each operator a graph has, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def opset_of(model: ModelProto) -> int:
    """Return the version of ONNX's own operator set that a graph uses."""
    return next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})


def tensor_bytes(model: ModelProto) -> int:
    """Return the bytes of all initialisers that are held in memory."""
    return sum(len(tensor.raw_data) for tensor in model.graph.initializer)


def simplify_onnx(
    model: ModelProto,
    images: Floats,
    run: Callable[[ModelProto, Floats], Mapping[str, Floats]],
) -> tuple[ModelProto, dict[str, Any]]:
    """Return ``model`` simplified, if that helps and changes nothing but the size; and the facts.

    The work is onnxsim's. After the rewrites of :mod:`van_deploy.graph.fold` there is often
    nothing left for it to do, and then the graph is left alone; a plain export loses some nodes.

    The facts, ready for JSON: whether the graph is ``changed``, and the ``reason``; its nodes
    before and after, and the operators that were ``removed``, by type; the ``relative_error``
    ``max|difference| / max|logit|``, or None if there was nothing to compare; the ``tolerance``.

    Args:
        model: an FP32 graph; it is not changed.
        images: ``(N, C, H, W)`` float32 to compare both graphs on, at batch N and 1; of a
            static graph at its batch.
        run: gives a graph's outputs by name for ``n`` images.
    """
    import onnxsim  # which takes a second, and hosts without PyTorch do not have

    def relative_error(simplified: ModelProto) -> float:
        fixed, errors = fixed_batch(model), []
        for count in (fixed,) if fixed else (len(images), 1):
            batch = np.resize(images, (count, *images.shape[1:]))  # repeats them where they are few
            expected, found = run(model, batch), run(simplified, batch)
            for name, value in expected.items():
                flat = value.reshape(len(value), -1)
                same = compare(flat, found[name].reshape(flat.shape), classes=False)
                errors.append(same.relative)
        return float(np.max(errors))

    before, result, error = Counter(operator_counts(model)), model, None
    reason = "skipped: larger than 2 GB"
    if tensor_bytes(model) <= EXTERNAL_LIMIT_BYTES:
        try:
            simplified, _ = onnxsim.simplify(model)
            reason = "nothing to remove"
            if operator_counts(simplified) != before:
                error = relative_error(simplified)
                reason = f"kept as exported: the simplified graph differs by {error:.1e}"
                if error <= SIMPLIFY_TOLERANCE:  # not for NaN
                    result, reason = simplified, "simplified"
        except Exception as failure:  # onnxsim raises bare C++ errors; the graph is good without it
            reason = f"kept as exported: onnxsim failed, or what it made does not run ({failure})"
    after = Counter(operator_counts(result))
    return result, {
        "changed": result is not model,
        "reason": reason,
        "nodes_before": before.total(),
        "nodes_after": after.total(),
        "removed": dict(before - after),
        "relative_error": error,
        "tolerance": SIMPLIFY_TOLERANCE,
    }


def save_onnx(
    model: ModelProto, path: Path, external_limit_bytes: int = EXTERNAL_LIMIT_BYTES
) -> list[str]:
    """Write ``model`` to ``path`` and return the names of the files written.

    Past ``external_limit_bytes`` of weights, they go to ``NAME.data`` beside
    it, and the weights of ``model`` are emptied as they are written.
    """
    large, data = tensor_bytes(model) > external_limit_bytes, f"{path.name}.data"
    onnx.save_model(model, path, save_as_external_data=large, location=data if large else None)
    return [path.name, data] if large else [path.name]


def graph_facts(model: ModelProto) -> GraphInfo:
    """Return what is worth knowing of a graph: operators, weights, inputs and outputs.

    Shapes hold numbers, and names where a dimension is dynamic.
    """

    def facts(value: ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
        return TensorInfo(dtype=str(tensor_dtype_to_np_dtype(tensor.elem_type)), shape=shape)

    counts = operator_counts(model)
    return GraphInfo(
        opset=opset_of(model),
        ir_version=model.ir_version,
        nodes=sum(counts.values()),
        operators=counts,
        weight_bytes=tensor_bytes(model),
        inputs={value.name: facts(value) for value in model.graph.input},
        outputs={value.name: facts(value) for value in model.graph.output},
    )


def describe_onnx(path: Path) -> OnnxDescription:
    """Return what a deployer wants to know of an ONNX file.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
    """
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
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    others = set()
    for tensor in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        entries = {entry.key: entry.value for entry in tensor.external_data}
        counts[kind] += math.prod(tensor.dims)
        sizes[kind] += int(entries.get("length", 0)) or len(tensor.raw_data)
        others |= {entries["location"]} if "location" in entries else set()
    metadata: dict[str, Any] = {entry.key: entry.value for entry in model.metadata_props}
    for key, text in metadata.items():
        with contextlib.suppress(ValueError):  # text that only looks like JSON stays as it is
            metadata[key] = parse_json(text) if text.startswith(("{", "[")) else text
    return OnnxDescription(
        file=path,
        bytes=path.stat().st_size,
        graph=graph_facts(model),
        weights={kind: TypedWeights(counts[kind], sizes[kind]) for kind in counts},
        parameters=sum(counts.values()),
        external_files=tuple(sorted(others)),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata=metadata,
    )
