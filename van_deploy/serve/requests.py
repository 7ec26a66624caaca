"""Requests of the server: limits, reading of bodies, and the v2 inference protocol.

Heads and bodies have limits of size and time. A large body is never copied in one piece while the
global interpreter lock is held: large JSON is parsed in another process; joining and decoding
release the lock, so threads do it.

The protocol is KServe's "open inference protocol" (v2) over HTTP with Triton's binary tensor
extension, as ``tritonclient.http`` implements it.
"""

import asyncio
import contextlib
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic_core import from_json

from van_deploy.config import ServiceSettings
from van_deploy.errors import ConversionError, InputError
from van_deploy.runners.network import TensorSpec
from van_deploy.schema import OpenSchema, validate
from van_deploy.serve.triton import DATATYPES

MIB = 2**20
BODIES_FULL = "The requests that are being received use all the memory they may."
SEND_LESS = "Send fewer or smaller images, or start the server with a higher --max-body-mib"
SEND_BYTES = "Send binary tensors, or start the server with a higher --max-json-mib"

MAX_HEAD_BYTES, MAX_HEADERS = 16 * 2**10, 100  # of one request, request line included
MAX_PIPELINED = 16  # waiting requests of one connection
# Each chunk of a body costs a call, independent of its size: after so many, chunks must have
# this size on average.
FREE_CHUNKS, MIN_CHUNK_BYTES = 200, 64

# httptools drops the body of a request with this header, which Java's client sends by default to
# offer HTTP/2. The server may ignore the offer (RFC 9110, section 7.8).
UPGRADE = re.compile(rb"(?i)\r\nupgrade:")

T = TypeVar("T")
Executor = Literal["here", "thread", "process"]
Count = Annotated[int, pydantic.Field(strict=True, ge=0)]
Values = npt.NDArray[Any]
FIRST_ERROR = pydantic.FailFast()  # a list of every error would use a kilobyte for each


@dataclass
class Request:
    """The head of one request.

    Attributes:
        method: HTTP method. HEAD is handled as GET; uvicorn omits the body of the response.
        path: decoded path.
        query: last value of each parameter.
        headers: header values by lower-case name.
        receive: ASGI's function that reads the body.
        route: route of the path, for the metrics; "" if there is none.
        model: model name in the path or the query; "" if there is none.
        version: model version in the path.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    receive: Callable[[], Awaitable[Mapping[str, Any]]]
    route: str = ""
    model: str = ""
    version: str = "1"


class RequestError(InputError):
    """Raised for a refused request; ``status`` is the HTTP status."""

    def __init__(self, message: str, remedy: str = "", status: int = 400) -> None:
        super().__init__(message, remedy)
        self.status = status


class Quota:
    """A limit for all requests together; a request that would exceed it is refused.

    Args:
        limit: largest sum.
        message: error message of a refused request.
        status: HTTP status of a refused request.

    Attributes:
        used: amount in use.
    """

    def __init__(self, limit: int, message: str, status: int) -> None:
        self.limit, self.message, self.status, self.used = limit, message, status, 0

    def acquire(self, stack: contextlib.ExitStack, count: int) -> None:
        """Acquire some of the quota until ``stack`` is closed.

        Raises:
            RequestError: the quota would be exceeded.
        """
        if self.used + count > self.limit:
            raise RequestError(self.message, status=self.status)
        self.used += count
        stack.callback(self._release, count)

    def _release(self, count: int) -> None:
        self.used -= count


class BodyReader:
    """Reads the bodies of all requests under one limit of bytes, and runs expensive functions.

    Args:
        settings: settings of the server.

    Attributes:
        quota: bytes of all bodies in memory.
        max_body: bytes of the largest body.
        max_json: bytes of the largest body of JSON.
        draining: whether the server is shutting down; further bodies are refused.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._timeout_s, self._pool, self.draining = settings.read_timeout_s, _create_pool(), False
        self.quota = Quota(round(MIB * settings.max_held_mib), BODIES_FULL, 503)
        self.max_body = min(round(MIB * settings.max_body_mib), self.quota.limit)
        self.max_json = min(round(MIB * settings.max_json_mib), self.quota.limit)

    async def read(
        self, request: Request, stack: contextlib.ExitStack, *, is_json: bool = False
    ) -> bytes:
        """Return the body of a request.

        Args:
            request: the head of the request.
            stack: releases the bytes from the quota when it is closed.
            is_json: whether the whole body is JSON, which has a limit of its own.

        Raises:
            RequestError: the body is too large, too slow, compressed or incomplete, exceeds the
                quota, or the server is shutting down.
        """
        if self.draining:
            raise RequestError("The server is shutting down.", status=503)
        chunks, limit = list[bytes](), self.max_json if is_json else self.max_body
        size, complete = int(request.headers.get("content-length", "0")), False

        async def collect() -> None:
            """Read also too large bodies to their end, so that the client reads the response."""
            nonlocal size
            received, more = 0, True
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise RequestError("The client closed the connection.", status=499)
                chunk, more = message["body"], message["more_body"]
                received += len(chunk)
                size = max(size, received)
                if size <= limit:
                    self.quota.acquire(stack, len(chunk))
                    chunks.append(chunk)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(collect(), self._timeout_s)
            complete = True
        if size > limit:
            remedy = SEND_BYTES if is_json else SEND_LESS
            remedy += " and --max-held-mib." if limit == self.quota.limit else "."
            raise RequestError(f"The request is larger than {limit:,} bytes.", remedy, 413)
        if not complete:
            text = f"The request was not complete after {self._timeout_s:g} s."
            raise RequestError(text, status=408)
        kind = request.headers.get("content-type", "").lower()
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding != "identity" or kind.startswith("multipart/"):
            text = "Forms and Content-Encoding are not supported."
            raise RequestError(text, "Send the file itself: curl --data-binary @FILE.", 415)
        # A large join releases Python's lock.
        return await self.run("thread" if size > MIB else "here", b"".join, chunks)

    async def run(self, executor: Executor, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``; for a process, everything must be picklable.

        Raises:
            RequestError: the process ended; the next call starts another one.
        """
        if executor == "here":
            return function(*args)
        if executor == "thread":
            return await asyncio.to_thread(function, *args)
        pool, loop = self._pool, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(pool, function, *args)
        except BrokenExecutor:
            if self._pool is pool:
                self._pool = _create_pool()
            raise RequestError("The process that parses JSON ended.", status=503) from None

    def close(self) -> None:
        """End the other process after its pending work."""
        self._pool.shutdown()


def _create_pool() -> ProcessPoolExecutor:
    """Return a pool of one process, which starts on first use."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_initialise_worker)


def _initialise_worker() -> None:
    """Lower the priority, ignore signals, and end with the server, even if that is killed."""
    os.nice(5)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def wait_for_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def limited_protocol(timeout_s: float) -> Any:
    """Return uvicorn's HTTP protocol class, without upgrades and with limits that it does not have.

    The head of a request has a limit of time and of size. uvicorn's time for idle connections also
    limits the time in which a client reads a response and ends the body of an answered request.
    Each header and each chunk of a body costs a call: a megabyte in chunks of one byte would block
    the event loop for seconds.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        # Bytes of an incomplete head (-1 in a body); chunks and bytes of a body.
        head = chunks = size = 0
        timer: Any = None  # for the client to send
        write_timer: Any = None  # for the client to read

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.abort_after(timeout_s)

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

        def abort_after(self, seconds: float) -> None:
            if self.timer:
                self.timer.cancel()
            self.timer = self.loop.call_later(seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self.write_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self.write_timer.cancel()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete or self.transport.is_closing():
                self.abort_after(self.timeout_keep_alive)

        def data_received(self, data: bytes) -> None:
            while data and self.parser is not None and not self.transport.is_closing():
                room = MAX_HEAD_BYTES - self.head if self.head >= 0 else len(data)
                piece, data = data[:room], data[room:]
                self.head += len(piece) if self.head >= 0 else 0
                if self.head >= 0:
                    head, end, body = piece.partition(b"\r\n\r\n")
                    piece = UPGRADE.sub(b"\r\nIgnored:", head) + end + body
                super().data_received(piece)
                if self.head >= MAX_HEAD_BYTES:
                    self.send_400_response("The head of the request is too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.abort_after(timeout_s)

        def on_headers_complete(self) -> None:
            self.head = -1
            if len(self.headers) > MAX_HEADERS or len(self.pipeline) == MAX_PIPELINED:
                raise ValueError("too many")  # answered with 400 by uvicorn
            self.timer.cancel()
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self.head = self.chunks = self.size = 0

        def on_body(self, body: bytes) -> None:
            self.size += len(body)
            super().on_body(body)

        def on_chunk_header(self) -> None:
            self.chunks += 1
            if self.chunks > FREE_CHUNKS + self.size // MIN_CHUNK_BYTES:
                raise ValueError("the chunks are too small")

    return Limited


class _Parameters(OpenSchema):
    """Protocol extensions in a request or one of its tensors."""

    binary_data: pydantic.StrictBool | None = None
    binary_data_size: Count | None = None
    binary_data_output: pydantic.StrictBool = False
    classification: Literal[0] = 0  # Triton's extension that is not supported


class _Output(OpenSchema):
    """One requested output."""

    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    """One input; its values are in ``data`` or follow the JSON as bytes."""

    datatype: str
    shape: Annotated[list[Count], FIRST_ERROR]
    data: Any = None


class InferRequest(OpenSchema):
    """The JSON of an inference request."""

    id: str = ""
    inputs: Annotated[tuple[_Input, ...], FIRST_ERROR]
    outputs: Annotated[tuple[_Output, ...], FIRST_ERROR] = ()
    parameters: _Parameters = _Parameters()

    def is_binary(self, output: _Output) -> bool:
        """Return whether an output is requested as bytes after the JSON."""
        binary = output.parameters.binary_data
        return self.parameters.binary_data_output if binary is None else binary


def parse_request(
    body: bytes, json_length: int, spec: TensorSpec, outputs: Sequence[TensorSpec], max_batch: int
) -> tuple[Values, InferRequest]:
    """Return the input rows of a request in the model's type, and the rest of the request.

    Args:
        body: JSON, followed by binary tensors if there are any.
        json_length: bytes of the JSON.
        spec: the model's input.
        outputs: the model's outputs.
        max_batch: largest number of rows.

    Raises:
        RequestError: the request is invalid.
    """
    if json_length > len(body):
        raise RequestError(f"The JSON should have {json_length} bytes; the body has {len(body)}.")
    try:
        document = from_json(body[:json_length])
    except ValueError as error:
        raise RequestError(f"The request is not JSON: {error}.") from None
    request = validate(InferRequest, document, where="The request", error=RequestError)
    if [entry.name for entry in request.inputs] != [spec.name]:
        raise RequestError(f"Send exactly one input, '{spec.name}'.")
    names = [output.name for output in outputs]
    if unknown := [output.name for output in request.outputs if output.name not in names]:
        text = f"There is no output {unknown[0][:99]!r}; the model has {', '.join(names)}."
        raise RequestError(text)
    requested = request.outputs or tuple(_Output(name=name) for name in names)
    if len({output.name for output in request.outputs}) < len(request.outputs):
        raise RequestError("The request has an output twice.")
    rows = _read_tensor(request.inputs[0], memoryview(body)[json_length:], spec, max_batch)
    return rows, request.model_copy(update={"inputs": (), "outputs": requested})


def encode_response(
    request: InferRequest, outputs: Mapping[str, Values], model: str
) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a response: JSON, and binary tensors if requested.

    Raises:
        ConversionError: a requested output is NaN or infinite.
    """
    entries, tail = list[dict[str, Any]](), list[bytes]()
    for output in request.outputs:
        values = outputs[output.name]
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            text = f"'{model}' computed NaN or infinite values of '{output.name}'."
            raise ConversionError(text, "Check the artifact with `van-deploy verify`.")
        kind, shape = DATATYPES[str(values.dtype)], list(values.shape)
        entry: dict[str, Any] = {"name": output.name, "datatype": kind, "shape": shape}
        if request.is_binary(output):
            tail.append(values.tobytes())
            entry["parameters"] = {"binary_data_size": values.nbytes}
        else:
            entry["data"] = values.ravel().tolist()
        entries.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": "1", "outputs": entries}
    document |= {"id": request.id} if request.id else {}
    head = json.dumps(document, separators=(",", ":")).encode()
    headers = {"content-type": "application/octet-stream" if tail else "application/json"}
    headers |= {"inference-header-content-length": str(len(head))} if tail else {}
    return b"".join([head, *tail]), headers


def _read_tensor(entry: _Input, tail: memoryview, spec: TensorSpec, max_batch: int) -> Values:
    datatype, shape, label = DATATYPES[spec.dtype], tuple(entry.shape), f"The input '{spec.name}'"
    if entry.datatype != datatype:
        raise RequestError(f"{label} is {datatype}, not {entry.datatype[:20]!r}.")
    if shape[1:] != spec.shape or not 1 <= shape[0] <= max_batch:
        expected_shape = f"[1..{max_batch}, {', '.join(map(str, spec.shape))}]"
        raise RequestError(
            f"{label} has shape {list(shape[:8])}; the model takes {expected_shape}.",
            "Send smaller batches: the server combines requests into batches itself.",
        )
    expected = math.prod(shape) * np.dtype(spec.dtype).itemsize
    size = entry.parameters.binary_data_size
    if size is None and not tail:
        values = _array_from_json(entry.data, spec, shape)
    elif size == len(tail) == expected:
        values = np.frombuffer(tail, dtype=spec.dtype).reshape(shape)
    else:
        actual = f"binary_data_size is {size}, and {len(tail)} were sent"
        raise RequestError(f"{label} of shape {list(shape)} takes {expected} bytes; {actual}.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RequestError(f"{label} contains values that are not finite.")
    return values


def _array_from_json(data: Any, spec: TensorSpec, shape: tuple[int, ...]) -> Values:
    """Return an array of flat or nested JSON numbers; anything else is refused before NumPy."""
    for size in shape[1:]:
        nested = type(data) is list and {type(item) for item in data} == {list}
        if nested and set(map(len, data)) == {size}:
            data = list(chain.from_iterable(data))
    numbers = type(data) is list and {type(item) for item in data} <= {int, float}
    if not numbers or len(data) != math.prod(shape):
        remedy = f"give {math.prod(shape)} numbers, or binary_data_size and the bytes"
        raise RequestError(f"The input '{spec.name}' of shape {list(shape)} lacks data: {remedy}.")
    try:
        values = np.array(data, np.float64)
    except OverflowError:
        raise RequestError(f"The input '{spec.name}' contains too large a number.") from None
    if spec.dtype == "uint8" and not ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        raise RequestError(f"The input '{spec.name}' is UINT8: integers from 0 to 255.")
    with np.errstate(over="ignore"):  # float16 overflow is reported as not finite
        return values.astype(spec.dtype).reshape(shape)
