"""Taking requests in: what is refused, how much is held at once, and where heavy work goes.

Heads and bodies are never larger than the limits and never slower than the deadline. Nothing copies
or searches a large body in one piece while it holds Python's lock: large JSON is parsed in another
process; joining and decoding release the lock, so threads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from email.message import Message
from typing import Any, Literal, TypeVar

from van_deploy.config import ServiceSettings
from van_deploy.errors import InputError

MIB = 2**20
MAX_PARTS = 16  # of a form
WINDOW = 2**18  # bytes searched or copied at once: a millisecond or two with Python's lock
HELD_FULL = "The requests that are being received hold all the memory they may."
SEND_LESS = "Send fewer or smaller images, or start the server with a higher --max-body-mib."
SEND_BYTES = (
    "Send tensors as bytes (the binary tensor extension), or start the server with a higher "
    "--max-json-mib."
)

MAX_HEAD_BYTES, MAX_HEADERS = 16 * 2**10, 100  # of a request; both with its request line
MAX_PIPELINED = 16  # requests of one connection that wait for each other
FREE_CHUNKS, LEAST_CHUNK_BYTES = 200, 64  # each chunk of a body costs a call, whatever its size

T = TypeVar("T")


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


class ClientGoneError(Exception):
    """The client closed its connection before its request was complete."""


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

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Give a function that takes some more; all are given back at the end of the block.

        The function raises RequestError where not as many are left.
        """
        held = 0

        def take(count: int) -> None:
            nonlocal held
            if self.used + count > self.limit:
                raise RequestError(self.message, status=self.status)
            self.used += count
            held += count

        try:
            yield take
        finally:
            self.used -= held


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
        self, request: Request, take: Callable[[int], None], *, json: bool = False
    ) -> bytes:
        """Return a request's body.

        Args:
            request: whose head has come.
            take: of :attr:`held`; called with the bytes that are held from then on.
            json: whether all of it is JSON, which has a limit of its own.

        Raises:
            ClientGoneError: it will never be complete.
            RequestError: too large, too slow, too late, too much for all, or compressed.
        """
        if self.draining:
            raise RequestError("The server is shutting down.", status=503)
        settings, pieces = self._settings, list[bytes]()
        limit = round(MIB * (settings.max_json_mib if json else settings.max_body_mib))
        too_large = RequestError(
            f"The request is larger than {limit:,} bytes.", SEND_BYTES if json else SEND_LESS, 413
        )
        size = int(request.headers.get("content-length", "0"))

        async def collect() -> None:
            """Read even what is too large to its end, so that the client reads the answer."""
            nonlocal size
            received, more = 0, True
            while more:
                message = await request.receive()
                if message["type"] != "http.request":
                    raise ClientGoneError
                piece, more = message["body"], message["more_body"]
                received += len(piece)
                size = max(size, received)
                if size <= limit:
                    take(len(piece))
                    pieces.append(piece)

        try:
            try:
                await asyncio.wait_for(collect(), settings.read_timeout_s)
            except asyncio.TimeoutError:
                text = f"The request was not complete after {settings.read_timeout_s:g} s."
                raise (too_large if size > limit else RequestError(text, status=408)) from None
            if size > limit:
                raise too_large
            if request.headers.get("content-encoding", "identity").lower() != "identity":
                text = "Bodies are taken as they are, without a Content-Encoding."
                raise RequestError(text, "Send it uncompressed.", 415)
            # A large join releases Python's lock.
            return await self.run("thread" if size > MIB else "here", b"".join, pieces)
        finally:
            pieces.clear()  # an error's traceback may keep them for a while

    async def run(
        self, where: Literal["here", "thread", "process"], function: Callable[..., T], *given: Any
    ) -> T:
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


def file_of_form(body: bytes, content_type: str) -> bytes:
    """Return the first file of a ``multipart/form-data`` body (RFC 7578).

    Raises:
        RequestError: the form is broken or has no file.
    """
    message = Message()
    message["content-type"] = content_type
    boundary, place = message.get_boundary("").encode(), 0
    for _ in range(MAX_PARTS if boundary else 0):
        start = _found(b"\r\n\r\n", body, place)
        end = _found(b"\r\n--" + boundary, body, max(start, 0))
        if min(start, end) < 0:
            break
        if b"filename" in body[place : min(start, place + WINDOW)].lower():
            start += 4
            return b"".join([body[i : min(i + WINDOW, end)] for i in range(start, end, WINDOW)])
        place = end
    raise RequestError("The form has no file, or no boundary in its Content-Type.")


def _found(wanted: bytes, body: bytes, start: int) -> int:
    """Return ``body.find(wanted, start)``, letting other threads run in between."""
    for first in range(start, len(body), WINDOW):
        if (place := body.find(wanted, first, first + WINDOW + len(wanted))) >= 0:
            return place
    return -1


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

        def on_header(self, name: bytes, value: bytes) -> None:
            if len(self.headers) == MAX_HEADERS:
                raise ValueError("too many headers")  # answered with 400 by uvicorn
            super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self.head = -1
            self.timer.cancel()
            if len(self.pipeline) == MAX_PIPELINED:
                raise ValueError("too many requests at once")
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self.size += len(body)
            super().on_body(body)

        def on_chunk_header(self) -> None:
            self.chunks += 1
            if self.chunks > FREE_CHUNKS + self.size // LEAST_CHUNK_BYTES:
                raise ValueError("the chunks are too small")

    return Limited
