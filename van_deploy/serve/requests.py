"""Requests: what is refused, how much is held at once, where heavy work goes, what bytes mean.

Heads and bodies are never larger than the limits and never slower than the deadline. Nothing copies
a large body in one piece while it holds Python's lock: large JSON is parsed in another process;
joining and decoding release the lock, so threads do.

What the bytes mean is the v2 inference protocol: KServe's "open inference protocol" over HTTP, with
Triton's binary tensor extension, as ``tritonclient.http`` speaks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import multiprocessing
import os
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
from van_deploy.errors import InputError
from van_deploy.runners.network import TensorSpec
from van_deploy.schema import OpenSchema, validate
from van_deploy.serve.triton import DATATYPES

MIB = 2**20
HELD_FULL = "The requests that are being received hold all the memory they may."
SEND_LESS = "Send fewer or smaller images, or start the server with a higher --max-body-mib."
SEND_BYTES = "Send binary tensors, or start the server with a higher --max-json-mib."

MAX_HEAD_BYTES, MAX_HEADERS = 16 * 2**10, 100  # of a request; both with its request line
MAX_PIPELINED = 16  # requests of one connection that wait for each other
FREE_CHUNKS, LEAST_CHUNK_BYTES = 200, 64  # each chunk of a body costs a call, whatever its size

T = TypeVar("T")
Where = Literal["here", "thread", "process"]
Count = Annotated[int, pydantic.Field(strict=True, ge=0)]
Values = npt.NDArray[Any]


@dataclass
class Request:
    """One request, as far as its head says.

    Attributes:
        method: HEAD counts as GET; its answer's body is not sent.
        path: decoded.
        query: last value of each parameter.
        headers: by their names in lower case.
        receive: ASGI's, for the body.
        route: of the path, for the metrics; "" until one is found.
        model: in the path or the query; likewise.
        version: of the model, in the path.
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
    """A request that is not answered; ``status`` is HTTP's."""

    def __init__(self, message: str, remedy: str = "", status: int = 400) -> None:
        super().__init__(message, remedy)
        self.args = (message, remedy, status)  # how it is made anew in another process
        self.status = status


class Allowance:
    """So many of something for all requests together; one that would exceed it is refused.

    Args:
        limit: how many.
        message: what a client is told that is refused.
        status: HTTP's, with which it is refused.

    Attributes:
        used: how many are taken now.
    """

    def __init__(self, limit: int, message: str, status: int) -> None:
        self.limit, self.message, self.status, self.used = limit, message, status, 0

    def take(self, held: contextlib.ExitStack, count: int) -> None:
        """Take some more, until ``held`` is closed.

        Raises:
            RequestError: not as many are left.
        """
        if self.used + count > self.limit:
            raise RequestError(self.message, status=self.status)
        self.used += count
        held.callback(self._give, count)

    def _give(self, count: int) -> None:
        self.used -= count


class Intake:
    """Takes in the bodies of all requests, under one limit of bytes, and runs what is heavy.

    Args:
        settings: of the server.

    Attributes:
        held: bytes of bodies.
        draining: whether the server is being stopped; no body is taken any more.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings, self._pool, self.draining = settings, _new_pool(), False
        self.held = Allowance(round(MIB * settings.max_held_mib), HELD_FULL, 503)

    async def body(
        self, request: Request, held: contextlib.ExitStack, *, is_json: bool = False
    ) -> bytes:
        """Return a request's body.

        Args:
            request: whose head has come.
            held: gives the bytes back, which count until it is closed.
            is_json: whether all of it is JSON, which has a limit of its own.

        Raises:
            RequestError: too large, too slow, too late, too much for all, compressed, or never
                to be complete, because the client has closed its connection.
        """
        if self.draining:
            raise RequestError("The server is shutting down.", status=503)
        settings, pieces = self._settings, list[bytes]()
        limit = round(MIB * (settings.max_json_mib if is_json else settings.max_body_mib))
        size, complete = int(request.headers.get("content-length", "0")), False

        async def collect() -> None:
            """Read even what is too large to its end, so that the client reads the answer."""
            nonlocal size
            received, more = 0, True
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise RequestError("The client has gone.", status=499)
                piece, more = message["body"], message["more_body"]
                received += len(piece)
                size = max(size, received)
                if size <= limit:
                    self.held.take(held, len(piece))
                    pieces.append(piece)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(collect(), settings.read_timeout_s)
            complete = True
        if size > limit:
            remedy = SEND_BYTES if is_json else SEND_LESS
            raise RequestError(f"The request is larger than {limit:,} bytes.", remedy, 413)
        if not complete:
            text = f"The request was not complete after {settings.read_timeout_s:g} s."
            raise RequestError(text, status=408)
        kind = request.headers.get("content-type", "").lower()
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding != "identity" or kind.startswith("multipart/"):
            text = "Bodies are taken as they are: no form, and no Content-Encoding."
            raise RequestError(text, "Send the file itself: curl --data-binary @FILE.", 415)
        # A large join releases Python's lock.
        return await self.run("thread" if size > MIB else "here", b"".join, pieces)

    async def run(self, where: Where, function: Callable[..., T], *given: Any) -> T:
        """Return ``function(*given)``; for a process, all must be picklable.

        Raises:
            RequestError: the process died; there will be another one.
        """
        if where == "here":
            return function(*given)
        if where == "thread":
            return await asyncio.to_thread(function, *given)
        pool, loop = self._pool, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(pool, function, *given)
        except BrokenExecutor:
            if self._pool is pool:
                self._pool = _new_pool()
            raise RequestError("The process that parses JSON ended.", status=503) from None

    def close(self) -> None:
        """End the other process once what it was asked for is done."""
        self._pool.shutdown()


def _new_pool() -> ProcessPoolExecutor:
    """Return one process, which starts when it is first needed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_follow_the_server)


def _follow_the_server() -> None:
    """Give way to the server, leave signals to it, and end when it does, however it does."""
    os.nice(5)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def limited_protocol(timeout_s: float) -> Any:
    """Return uvicorn's HTTP protocol, with limits on what it takes without end by itself.

    The head of a request must be complete in time and within a size. Headers and the chunks of
    a body cost a call each, whatever their size: a megabyte in chunks of one byte would hold the
    event loop for seconds.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        head = chunks = size = 0  # bytes of a head that is not complete, -1 in a body; of a body
        timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

        def wait_for_head(self) -> None:
            self.head = self.chunks = self.size = 0
            self.timer = self.loop.call_later(timeout_s, self.transport.close)

        def data_received(self, data: bytes) -> None:
            while data and self.parser is not None and not self.transport.is_closing():
                room = MAX_HEAD_BYTES - self.head if self.head >= 0 else len(data)
                piece, data = data[:room], data[room:]
                self.head += len(piece) if self.head >= 0 else 0
                super().data_received(piece)
                if self.head >= MAX_HEAD_BYTES:
                    self.send_400_response("The head of the request is too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self.head < 0:
                self.wait_for_head()

        def on_headers_complete(self) -> None:
            self.head = -1
            self.timer.cancel()
            if len(self.headers) > MAX_HEADERS or len(self.pipeline) == MAX_PIPELINED:
                raise ValueError("too many")  # answered with 400 by uvicorn
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.size += len(body)
            super().on_body(body)

        def on_chunk_header(self) -> None:
            self.chunks += 1
            if self.chunks > FREE_CHUNKS + self.size // LEAST_CHUNK_BYTES:
                raise ValueError("the chunks are too small")

    return Limited


class _Parameters(OpenSchema):
    """What the extensions add to a request or to one of its tensors."""

    binary_data: pydantic.StrictBool | None = None
    binary_data_size: Count | None = None
    binary_data_output: pydantic.StrictBool = False
    classification: Literal[0] = 0  # of Triton's extensions the one that is not here


class _Output(OpenSchema):
    """One output a client asked for."""

    name: str
    parameters: _Parameters = _Parameters()


class _Input(_Output):
    """One input as a client describes it; its values are in ``data`` or behind the JSON."""

    datatype: str
    shape: list[Count]
    data: Any = None


class InferRequest(OpenSchema):
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
    body: bytes, json_length: int, given: TensorSpec, gives: Sequence[TensorSpec], max_batch: int
) -> tuple[Values, InferRequest]:
    """Return the rows in ``body`` as the model takes them, and the rest of the request.

    Args:
        body: JSON, followed by the binary tensors if there are any.
        json_length: bytes of the JSON.
        given: the model's input.
        gives: its outputs.
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
    request = validate(InferRequest, document, where="The request", error=RequestError)
    if [entry.name for entry in request.inputs] != [given.name]:
        raise RequestError(f"The model has one input, '{given.name}'; give that one.")
    names = [output.name for output in gives]
    if unknown := [wanted.name for wanted in request.outputs if wanted.name not in names]:
        text = f"There is no output {unknown[0][:99]!r}; the model gives {', '.join(names)}."
        raise RequestError(text)
    every = request.outputs or tuple(_Output(name=name) for name in names)
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
    document |= {"id": request.id} if request.id else {}
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
        sent = f"{size} were announced and {len(tail)} sent"
        raise RequestError(f"{called} of shape {list(shape)} takes {expected} bytes; {sent}.")
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
        wanted = f"give {math.prod(shape)} numbers, or binary_data_size and the bytes"
        raise RequestError(f"The input '{given.name}' of shape {list(shape)} lacks data: {wanted}.")
    try:
        values = np.array(data, np.float64)
    except OverflowError:
        raise RequestError(f"The input '{given.name}' holds a number that is too large.") from None
    if given.dtype == "uint8" and not ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        raise RequestError(f"The input '{given.name}' is UINT8: whole numbers from 0 to 255.")
    with np.errstate(over="ignore"):  # what float16 cannot hold is told as not finite
        return values.astype(given.dtype).reshape(shape)
