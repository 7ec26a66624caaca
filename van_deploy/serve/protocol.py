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
from itertools import chain
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic_core import from_json

from van_deploy.runners.network import TensorSpec
from van_deploy.schema import Open, validated
from van_deploy.serve.refusal import Refusal
from van_deploy.serve.triton_config import DATATYPES

__all__ = ["InferRequest", "WantedOutput", "encode_response", "parse_request"]

Count = Annotated[int, pydantic.Field(strict=True, ge=0)]


class _Parameters(Open):
    binary_data: pydantic.StrictBool | None = None
    binary_data_size: Count | None = None
    classification: Count = 0
    binary_data_output: pydantic.StrictBool = False


class _Output(Open):
    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    datatype: str
    shape: list[Count]
    data: Any = None


class _Request(Open):
    id: str = ""
    inputs: list[_Input]
    outputs: list[_Output] = []
    parameters: _Parameters = _Parameters()


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
        Refusal: says which rule was broken.
    """
    end = len(body) if json_length is None else json_length
    if end > len(body):
        raise Refusal(f"The JSON is said to be {end} bytes; the body has {len(body)}.")
    try:
        document = from_json(body[:end])
    except ValueError as error:
        raise Refusal(f"The request is not JSON: {error}.") from None
    request = validated(_Request, document, where="The request", error=Refusal)
    if [entry.name for entry in request.inputs] != [given.name]:
        raise Refusal(f"The model has one input, '{given.name}'; give that one.")
    batch = _tensor(request.inputs[0], memoryview(body)[end:], given, max_batch)
    known = {spec.name: spec for spec in outputs}
    wanted = request.outputs or [_Output(name=name) for name in known]
    binary = request.parameters.binary_data_output
    return InferRequest(request.id, batch, tuple(_wanted(entry, known, binary) for entry in wanted))


def encode_response(
    identity: str,
    wanted: Sequence[WantedOutput],
    outputs: Mapping[str, npt.NDArray[Any]],
    model: str,
    labels: Sequence[str] | None = None,
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of its JSON if binary tensors follow it."""
    entries: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for output in wanted:
        values, datatype = outputs[output.name], DATATYPES[str(outputs[output.name].dtype)]
        if output.classes:
            values, datatype = _classification(values, output.classes, labels), "BYTES"
        entry = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if output.binary:
            tail.append(_length_prefixed(values) if output.classes else values.tobytes())
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    document = {"model_name": model, "model_version": "1", "outputs": entries}
    if identity:
        document["id"] = identity
    head = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def _tensor(
    entry: _Input, tail: memoryview, given: TensorSpec, max_batch: int
) -> npt.NDArray[Any]:
    wanted, shape = DATATYPES[given.dtype], tuple(entry.shape)
    if entry.datatype != wanted:
        raise Refusal(f"The input '{given.name}' is {wanted}, not {entry.datatype[:20]!r}.")
    if shape[1:] != given.shape or not 1 <= shape[0] <= max_batch:
        takes = f"[1..{max_batch}, {', '.join(map(str, given.shape))}]"
        raise Refusal(
            f"The input '{given.name}' has shape {list(shape[:8])}; the model takes {takes}.",
            "Send smaller batches: the server fills batches across requests itself.",
        )
    expected = math.prod(shape) * np.dtype(given.dtype).itemsize
    size = entry.parameters.binary_data_size
    if size is None:
        values = _numbers(entry.data, given, shape)
    elif size == len(tail) == expected:
        values = np.frombuffer(tail, dtype=given.dtype).reshape(shape)
    else:
        raise Refusal(
            f"The input '{given.name}' of shape {list(shape)} takes {expected} bytes; "
            f"{size} were announced and {len(tail)} sent."
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise Refusal(f"The input '{given.name}' holds values that are not finite.")
    return values


def _numbers(data: Any, given: TensorSpec, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return numbers from JSON, flat or nested, without ever making an array of anything else."""
    wrong = Refusal(
        f"The input '{given.name}' has no data of shape {list(shape)}: give {math.prod(shape)} "
        "numbers, or binary_data_size and the bytes."
    )
    for size in shape[1:]:
        if type(data) is list and data and type(data[0]) is list:
            if set(map(type, data)) != {list} or set(map(len, data)) != {size}:
                raise wrong
            data = list(chain.from_iterable(data))
    if type(data) is not list or len(data) != math.prod(shape):
        raise wrong
    if not set(map(type, data)) <= {int, float}:
        raise wrong
    try:
        values = np.array(data, np.float64)
    except OverflowError:
        raise wrong from None
    if given.dtype == "uint8" and not ((0 <= values) & (values <= 255) & (values % 1 == 0)).all():
        raise Refusal(f"The input '{given.name}' is UINT8: whole numbers from 0 to 255.")
    return values.astype(given.dtype).reshape(shape)


def _wanted(entry: _Output, known: Mapping[str, TensorSpec], binary: bool) -> WantedOutput:
    if entry.name not in known:
        raise Refusal(f"There is no output '{entry.name[:99]}'; the model gives {', '.join(known)}.")
    options = entry.parameters
    if options.classification and known[entry.name].dtype != "float32":
        raise Refusal(f"'{entry.name}' has no classification.")
    as_bytes = binary if options.binary_data is None else options.binary_data
    return WantedOutput(entry.name, as_bytes, options.classification)


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
