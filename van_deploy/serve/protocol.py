"""The v2 inference protocol: what a request's bytes mean, and the bytes of its answer.

KServe's "open inference protocol" over HTTP, with Triton's binary tensor and
classification extensions, as ``tritonclient.http`` speaks it. Pure functions of
bytes; nothing here knows of a network or a socket.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.errors import InputError
from van_deploy.runners.network import TensorSpec

__all__ = [
    "DATATYPES",
    "InferRequest",
    "RequestError",
    "WantedOutput",
    "encode_response",
    "parse_request",
    "tensor_metadata",
]

DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
"""NumPy's names of types, and the protocol's."""

MAX_ROWS_NOTE = "Send smaller batches: the server fills batches across requests itself."


class RequestError(InputError):
    """A request that the protocol or the model does not allow; HTTP status 400."""


@dataclass(frozen=True)
class WantedOutput:
    """One output a client asked for.

    Attributes:
        name: of the tensor.
        binary: as raw bytes behind the JSON rather than as numbers in it.
        classes: the first so many classes as ``value:index:label`` text; 0 for the tensor.
    """

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True)
class InferRequest:
    """One request, checked against the model it is for.

    Attributes:
        id: the client's, to be repeated in the answer.
        batch: ``(n, ...)``, what the model's input wants.
        outputs: what the client wants back.
    """

    id: str
    batch: npt.NDArray[Any]
    outputs: tuple[WantedOutput, ...]


def parse_request(
    body: bytes,
    json_length: int | None,
    given: TensorSpec,
    outputs: Sequence[TensorSpec],
    max_batch: int,
) -> InferRequest:
    """Return the request in ``body``.

    Args:
        body: JSON, followed by the binary tensors if there are any.
        json_length: the header ``Inference-Header-Content-Length``, or None if all is JSON.
        given: the model's input.
        outputs: what the model gives.
        max_batch: rows a request may have.

    Raises:
        RequestError: says which rule was broken.
    """
    if json_length is not None and not 0 <= json_length <= len(body):
        raise RequestError(f"The JSON is said to be {json_length} bytes; the body has {len(body)}.")
    end = len(body) if json_length is None else json_length
    document = _json(body[:end])
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], Mapping):
        count = len(inputs) if isinstance(inputs, list) else 0
        raise RequestError(f"The model has one input, '{given.name}'; the request gives {count}.")
    batch = _tensor(inputs[0], memoryview(body)[end:], given, max_batch)
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise RequestError("The request's 'id' must be text.")
    return InferRequest(identity, batch, _wanted(document, outputs))


def encode_response(
    request: InferRequest,
    outputs: Mapping[str, npt.NDArray[Any]],
    model: str,
    labels: Sequence[str] | None = None,
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of its JSON if binary tensors follow it."""
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for wanted in request.outputs:
        values = outputs[wanted.name]
        if wanted.classes:
            values = _classification(values, wanted.classes, labels)
        entry: dict[str, Any] = {
            "name": wanted.name,
            "datatype": "BYTES" if wanted.classes else DATATYPES[str(values.dtype)],
            "shape": list(values.shape),
        }
        if wanted.binary:
            raw = _length_prefixed(values) if wanted.classes else values.tobytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    document = {"model_name": model, "model_version": "1", "outputs": entries}
    if request.id:
        document["id"] = request.id
    head = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def tensor_metadata(spec: TensorSpec) -> dict[str, Any]:
    """Return how the protocol describes a tensor; -1 is the free batch."""
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": [-1, *spec.shape]}


def _json(text: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The request is not JSON: {error}.") from None
    if not isinstance(document, Mapping):
        raise RequestError("The request must be a JSON object.")
    return document


def _tensor(
    entry: Mapping[str, Any], tail: memoryview, given: TensorSpec, max_batch: int
) -> npt.NDArray[Any]:
    name, datatype = entry.get("name"), entry.get("datatype")
    wanted = DATATYPES[given.dtype]
    if name != given.name:
        raise RequestError(f"There is no input '{name}'; the model's input is '{given.name}'.")
    if datatype != wanted:
        raise RequestError(f"The input '{given.name}' is {wanted}, not {datatype}.")
    shape = _shape(entry.get("shape"), given, max_batch)
    parameters = entry.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, Mapping) else None
    if size is None:
        values = _numbers(entry.get("data"), given, shape)
    else:
        expected = math.prod(shape) * np.dtype(given.dtype).itemsize
        if size != expected or len(tail) != expected:
            raise RequestError(
                f"The input '{given.name}' of shape {list(shape)} takes {expected} bytes; "
                f"{size} were announced and {len(tail)} sent."
            )
        values = np.frombuffer(tail, dtype=given.dtype).reshape(shape)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RequestError(f"The input '{given.name}' holds values that are not finite.")
    return values


def _shape(shape: object, given: TensorSpec, max_batch: int) -> tuple[int, ...]:
    wanted = f"[1..{max_batch}, {', '.join(map(str, given.shape))}]"
    plain = isinstance(shape, list) and all(type(size) is int for size in shape)
    if not plain or tuple(shape[1:]) != given.shape:  # type: ignore[index]
        raise RequestError(f"The input '{given.name}' has shape {shape}; the model takes {wanted}.")
    rows = shape[0]  # type: ignore[index]
    if not 1 <= rows <= max_batch:
        raise RequestError(
            f"The input '{given.name}' has {rows} rows; the model takes 1 to {max_batch}.",
            MAX_ROWS_NOTE,
        )
    return rows, *given.shape


def _numbers(data: object, given: TensorSpec, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return numbers from JSON, flat or nested."""
    try:
        values = np.asarray(data)
        if values.dtype.kind not in "iuf" or values.size != math.prod(shape):
            raise ValueError(f"{values.size} numbers")  # noqa: TRY301 - one message for all
        if given.dtype == "uint8" and (values.min() < 0 or values.max() > 255):
            raise RequestError(f"The input '{given.name}' holds values outside 0 to 255.")
        if given.dtype == "uint8" and values.dtype.kind == "f":
            raise RequestError(f"The input '{given.name}' holds fractions; it is UINT8.")
        return values.astype(given.dtype).reshape(shape)
    except (ValueError, TypeError, OverflowError):
        raise RequestError(
            f"The input '{given.name}' has no data of shape {list(shape)}: give "
            f"{math.prod(shape)} numbers, or binary_data_size and the bytes."
        ) from None


def _wanted(document: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> tuple[WantedOutput, ...]:
    parameters = document.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise RequestError("The request's 'parameters' must be a JSON object.")
    binary = bool(parameters.get("binary_data_output", False))
    asked = document.get("outputs") or [{"name": spec.name} for spec in outputs]
    if not isinstance(asked, list) or not all(isinstance(entry, Mapping) for entry in asked):
        raise RequestError("The request's 'outputs' must be a list of JSON objects.")
    return tuple(_wanted_output(entry, outputs, binary) for entry in asked)


def _wanted_output(
    entry: Mapping[str, Any], outputs: Sequence[TensorSpec], binary: bool
) -> WantedOutput:
    known = {spec.name: spec for spec in outputs}
    name = entry.get("name")
    if not isinstance(name, str) or name not in known:
        raise RequestError(f"There is no output '{name}'; the model gives {', '.join(known)}.")
    options = entry.get("parameters") or {}
    if not isinstance(options, Mapping):
        raise RequestError(f"The parameters of '{name}' must be a JSON object.")
    classes = options.get("classification", 0)
    if type(classes) is not int or classes < 0 or (classes and known[name].dtype != "float32"):
        raise RequestError(f"'{name}' has no classification of {classes!r} classes.")
    return WantedOutput(name, bool(options.get("binary_data", binary)), classes)


def _classification(
    values: npt.NDArray[Any], count: int, labels: Sequence[str] | None
) -> npt.NDArray[Any]:
    """Return ``value:index:label`` of the largest columns, as Triton writes them."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    known = labels if labels is not None and len(labels) == values.shape[1] else None
    rows = [
        [f"{values[row, c]:f}:{c}" + (f":{known[c]}" if known else "") for c in columns.tolist()]
        for row, columns in enumerate(order)
    ]
    return np.array(rows, dtype=object)


def _length_prefixed(texts: npt.NDArray[Any]) -> bytes:
    """Return texts as the protocol's BYTES: each behind its length in four bytes."""
    encoded = [str(text).encode() for text in texts.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
