"""Simplify, save and describe ONNX graphs (external weights above 2 GB)."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto, ValueInfoProto
from onnx.helper import tensor_dtype_to_np_dtype

from van_deploy.documents import DocumentError, parse_json, require_regular_file
from van_deploy.errors import InputError
from van_deploy.files import external_files_in
from van_deploy.graph.names import fixed_batch
from van_deploy.manifest import GraphInfo, TensorInfo
from van_deploy.metrics import compare

# Largest relative difference between a graph and its simplification, in float32. Constant folding
# changes the order of additions, which alone changes the logits of the trained van_b0 by about
# 1e-6 of their size.
SIMPLIFY_TOLERANCE = 1e-5
# Larger weights are saved as external data: protobuf is limited to 2 GiB.
EXTERNAL_LIMIT_BYTES = 2_000_000_000

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TypedWeights:
    """Number and size of the weights of one type.

    Attributes:
        values: number of values.
        bytes: their size.
    """

    values: int
    bytes: int


@dataclass(frozen=True)
class OnnxDescription:
    """Description of an ONNX file.

    Attributes:
        file: its path.
        bytes: size on disk, without external data.
        graph: operators, inputs and outputs.
        weights: by the ONNX name of their type.
        parameters: number of values of all weights.
        external_files: files in the same folder that contain weights.
        producer: name and version of the program that wrote it.
        metadata: its ``metadata_props``; JSON entries (``van_deploy.*``) are parsed.
        kind: type of the description.
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
    """Return the number of nodes of each operator, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def opset_of(model: ModelProto) -> int:
    """Return the version of the ONNX operator set that a graph uses."""
    return next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"})


def tensor_bytes(model: ModelProto) -> int:
    """Return the size in bytes of all initialisers, also of those in external files."""
    return sum(map(_weight_bytes, model.graph.initializer))


def _weight_bytes(tensor: TensorProto) -> int:
    packed = re.search(r"(?:INT|FLOAT)([246])(?!\d)", TensorProto.DataType.Name(tensor.data_type))
    bits = int(packed[1]) if packed else 8 * tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.ceil(math.prod(tensor.dims) * bits / 8)


def simplify_onnx(
    model: ModelProto,
    images: Floats,
    run: Callable[[ModelProto, Floats], Mapping[str, Floats]],
) -> tuple[ModelProto, dict[str, Any]]:
    """Return ``model`` simplified with onnxsim if the result is equivalent, and the facts.

    After the rewrites of :mod:`van_deploy.graph.fold` there is often nothing left to simplify,
    and the graph is returned unchanged; an export without rewrites loses some nodes.

    The facts, ready for JSON: whether the graph is ``changed``, and the ``reason``; its nodes
    before and after, and the ``removed`` operators by type; the ``relative_error``
    ``max|difference| / max|logit|``, or None if nothing was compared; the ``tolerance``.

    Args:
        model: an FP32 graph, which stays unchanged.
        images: ``(N, C, H, W)`` float32 to compare both graphs on, at batch N and 1; a static
            graph is compared at its batch size.
        run: returns a graph's outputs by name.
    """
    import onnxsim  # slow to import, and not installed on hosts without PyTorch

    def relative_error(simplified: ModelProto) -> float:
        fixed, errors = fixed_batch(model), []
        for count in (fixed,) if fixed else (len(images), 1):
            batch = np.resize(images, (count, *images.shape[1:]))  # repeats images if necessary
            expected, actual = run(model, batch), run(simplified, batch)
            for name, value in expected.items():
                flat = value.reshape(len(value), -1)
                errors.append(compare(flat, actual[name].reshape(flat.shape), None).relative)
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
                if error <= SIMPLIFY_TOLERANCE:  # False for NaN
                    result, reason = simplified, "simplified"
        except Exception as failure:  # onnxsim raises plain C++ errors; simplification is optional
            reason = f"kept as exported: onnxsim failed, or its result does not run ({failure})"
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

    Weights larger than ``external_limit_bytes`` are written to ``NAME.data`` in the same
    folder, and removed from ``model``.
    """
    large, data = tensor_bytes(model) > external_limit_bytes, f"{path.name}.data"
    onnx.save_model(model, path, save_as_external_data=large, location=data if large else None)
    return [path.name, data] if large else [path.name]


def graph_facts(model: ModelProto) -> GraphInfo:
    """Return the operators, weights, inputs and outputs of a graph.

    Dynamic dimensions in a shape are names, "?" for one without a name.

    Raises:
        ValueError: an input or output has no dimensions.
    """

    def facts(value: ValueInfoProto) -> TensorInfo:
        tensor = value.type.tensor_type
        dims = tensor.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
        if not shape:
            raise ValueError(f"'{value.name}' is not a tensor with dimensions")
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
    """Return the description of an ONNX file.

    Raises:
        InputError: the file cannot be read, or is not ONNX.
    """
    try:
        require_regular_file(path)
        model = onnx.load_model(path, load_external_data=False)
        if not model.graph.node or not any(o.domain in {"", "ai.onnx"} for o in model.opset_import):
            raise DecodeError("it has no standard operators")  # noqa: TRY301 - like protobuf's
        return _describe_model(model, path)
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"'{path}' cannot be read: {reason}.", "Check the path.") from error
    except (DecodeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise InputError(
            f"'{path}' is not the ONNX file of a network, or is damaged: {error}.",
            "Export it again with `van-deploy export`.",
        ) from error


def _describe_model(model: ModelProto, path: Path) -> OnnxDescription:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype = TensorProto.DataType.Name(tensor.data_type).lower()
        counts[dtype] += math.prod(tensor.dims)
        sizes[dtype] += _weight_bytes(tensor)
    metadata: dict[str, Any] = {entry.key: entry.value for entry in model.metadata_props}
    for key, text in metadata.items():
        with contextlib.suppress(ValueError):  # keeps text that only looks like JSON
            metadata[key] = parse_json(text) if text.startswith(("{", "[")) else text
    return OnnxDescription(
        file=path,
        bytes=path.stat().st_size,
        graph=graph_facts(model),
        weights={dtype: TypedWeights(counts[dtype], sizes[dtype]) for dtype in counts},
        parameters=sum(counts.values()),
        external_files=external_files_in(model),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata=metadata,
    )
