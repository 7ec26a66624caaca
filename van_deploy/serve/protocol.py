"""The v2 inference protocol: what a request's bytes mean, and the bytes of its answer.

KServe's "open inference protocol" over HTTP, with Triton's binary tensor extension, as
``tritonclient.http`` speaks it. Pure functions of bytes; nothing here knows of a network or a
socket.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic_core import from_json

from van_deploy.runners.network import TensorSpec
from van_deploy.schema import Open, validated
from van_deploy.serve.intake import RequestError
from van_deploy.serve.triton import DATATYPES

Count = Annotated[int, pydantic.Field(strict=True, ge=0)]
Values = npt.NDArray[Any]


class _Parameters(Open):
    """What the extensions add to a request or to one of its tensors."""

    binary_data: pydantic.StrictBool | None = None
    binary_data_size: Count | None = None
    binary_data_output: pydantic.StrictBool = False
    classification: Literal[0] = 0  # of Triton's extensions the one that is not here


class _Output(Open):
    """One output a client asked for."""

    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    """One input as a client describes it; its values are in ``data`` or behind the JSON."""

    datatype: str
    shape: list[Count]
    data: Any = None


class InferRequest(Open):
    """The JSON of a request."""

    id: str = ""
    inputs: tuple[_Input, ...]
    outputs: tuple[_Output, ...] = ()
    parameters: _Parameters = _Parameters()

    def in_bytes(self, wanted: _Output) -> bool:
        """Return whether an output is wanted as bytes behind the JSON."""
        own = wanted.parameters.binary_data
        return self.parameters.binary_data_output if own is None else own


def parse_request(
    body: bytes, json_length: int, given: TensorSpec, outputs: Sequence[str], max_batch: int
) -> tuple[Values, InferRequest]:
    """Return the rows in ``body`` as the model takes them, and the rest of the request.

    Args:
        body: JSON, followed by the binary tensors if there are any.
        json_length: bytes of the JSON.
        given: the model's input.
        outputs: names of what the model gives.
        max_batch: rows a request may have.

    Raises:
        RequestError: says which rule was broken.
    """
    if json_length > len(body):
        raise RequestError(f"The JSON is said to be {json_length} bytes; the body has {len(body)}.")
    try:
        document = from_json(body[:json_length])
    except ValueError as error:
        raise RequestError(f"The request is not JSON: {error}.") from None
    request = validated(InferRequest, document, where="The request", error=RequestError)
    if [entry.name for entry in request.inputs] != [given.name]:
        raise RequestError(f"The model has one input, '{given.name}'; give that one.")
    unknown = [wanted.name for wanted in request.outputs if wanted.name not in outputs]
    if unknown:
        names = ", ".join(outputs)
        raise RequestError(f"There is no output {unknown[0][:99]!r}; the model gives {names}.")
    every = request.outputs or tuple(_Output(name=name) for name in outputs)
    rows = _tensor(request.inputs[0], memoryview(body)[json_length:], given, max_batch)
    return rows, request.model_copy(update={"inputs": (), "outputs": every})


def encode_response(
    request: InferRequest, outputs: Mapping[str, Values], model: str
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of its JSON if binary tensors follow it."""
    entries, tail = list[dict[str, Any]](), list[bytes]()
    for wanted in request.outputs:
        values = outputs[wanted.name]
        kind, shape = DATATYPES[str(values.dtype)], list(values.shape)
        entry: dict[str, Any] = {"name": wanted.name, "datatype": kind, "shape": shape}
        if request.in_bytes(wanted):
            tail.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": values.nbytes}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": entries}
    if request.id:
        document["id"] = request.id
    head = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([head, *tail]), len(head) if tail else None


def _tensor(entry: _Input, tail: memoryview, given: TensorSpec, max_batch: int) -> Values:
    wanted, shape, called = DATATYPES[given.dtype], tuple(entry.shape), f"The input '{given.name}'"
    if entry.datatype != wanted:
        raise RequestError(f"{called} is {wanted}, not {entry.datatype[:20]!r}.")
    if shape[1:] != given.shape or not 1 <= shape[0] <= max_batch:
        takes = f"[1..{max_batch}, {', '.join(map(str, given.shape))}]"
        raise RequestError(
            f"{called} has shape {list(shape[:8])}; the model takes {takes}.",
            "Send smaller batches: the server fills batches across requests itself.",
        )
    expected = math.prod(shape) * np.dtype(given.dtype).itemsize
    size = entry.parameters.binary_data_size
    if size is None:
        values = _numbers(entry.data, given, shape)
    elif size == len(tail) == expected:
        values = np.frombuffer(tail, dtype=given.dtype).reshape(shape)
    else:
        raise RequestError(
            f"{called} of shape {list(shape)} takes {expected} bytes; {size} were announced and "
            f"{len(tail)} sent."
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RequestError(f"{called} holds values that are not finite.")
    return values


def _numbers(data: Any, given: TensorSpec, shape: tuple[int, ...]) -> Values:
    """Return numbers from JSON, flat or nested, without making an array of anything else."""
    for size in shape[1:]:
        nested = type(data) is list and {type(item) for item in data} == {list}
        if nested and set(map(len, data)) == {size}:
            data = list(chain.from_iterable(data))
    numbers = type(data) is list and {type(item) for item in data} <= {int, float}
    if not numbers or len(data) != math.prod(shape):
        raise RequestError(
            f"The input '{given.name}' has no data of shape {list(shape)}: give "
            f"{math.prod(shape)} numbers, or binary_data_size and the bytes."
        )
    try:
        values = np.array(data, np.float64)
    except OverflowError:
        raise RequestError(f"The input '{given.name}' holds a number that is too large.") from None
    if given.dtype == "uint8" and not ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        raise RequestError(f"The input '{given.name}' is UINT8: whole numbers from 0 to 255.")
    with np.errstate(over="ignore"):  # what float16 cannot hold is told as not finite
        return values.astype(given.dtype).reshape(shape)
