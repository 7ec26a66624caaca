"""Taking requests in: what is refused, how much is held at once, and where heavy work goes.

Bodies are never larger than the limit and never slower than the deadline. JSON is parsed
holding Python's lock, so large JSON goes to a process of its own; inflating, decoding and
checks of arrays release it, so threads do.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from email.message import Message
from typing import Any, TypeVar

from van_deploy.errors import InputError

__all__ = [
    "Allowance",
    "ClientGoneError",
    "JsonProcess",
    "Receive",
    "RequestError",
    "file_of_form",
    "read_body",
]

DEFLATE_RATIO = 1032  # the most that a byte of deflate stands for (zlib's technical details)
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
MAX_PARTS = 16  # of a form

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Result = TypeVar("Result")


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


class JsonProcess:
    """Another process for what would hold Python's lock: reading and writing large JSON."""

    def __init__(self) -> None:
        self._pool = _new_pool()

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return ``function(*arguments)`` from the process; both must be picklable.

        Raises:
            RequestError: the process died; there will be another one.
        """
        pool, loop = self._pool, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(pool, function, *arguments)
        except BrokenExecutor:
            if self._pool is pool:
                self._pool = _new_pool()
            raise RequestError("The process that parses JSON ended.", status=503) from None

    def close(self) -> None:
        """End it once what it was asked for is done."""
        self._pool.shutdown()


async def read_body(
    receive: Receive,
    headers: Mapping[str, str],
    limit: int,
    remedy: str,
    timeout_s: float,
    take: Callable[[int], None],
) -> bytes | bytearray:
    """Return a request's body, decompressed.

    Args:
        receive: ASGI's.
        headers: by their names in lower case.
        limit: bytes the body may have, before and after decompression.
        remedy: what to do about a body that is larger.
        timeout_s: in which it must be complete.
        take: called with the bytes that are held from then on; may refuse them.

    Raises:
        ClientGoneError: it will never be complete.
        RequestError: too large, too slow, too much for all together, or badly encoded.
    """
    body, over = bytearray(), int(headers.get("content-length", "0")) > limit

    async def collect() -> None:
        """Read to the end even what is too large, so that the client gets to read the answer."""
        nonlocal over
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            over = over or len(body) + len(message["body"]) > limit
            if not over:
                take(len(message["body"]))
                body.extend(message["body"])
            more = message["more_body"]

    try:
        await asyncio.wait_for(collect(), timeout_s)
    except BaseException as error:
        body.clear()  # the error's traceback may keep it alive for a while
        if not isinstance(error, asyncio.TimeoutError):
            raise
        if not over:
            text = f"The request was not complete after {timeout_s:g} s."
            raise RequestError(text, status=408) from None
    if over:
        raise _too_large(limit, remedy)
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in {"gzip", "deflate"}:
        raise RequestError(f"The Content-Encoding {encoding[:20]!r} is unknown: gzip or deflate.")
    take(min(limit, DEFLATE_RATIO * len(body)))
    return await asyncio.to_thread(_inflated, body, limit, remedy)


def file_of_form(body: bytes | bytearray, content_type: str) -> bytes:
    """Return the first file of a ``multipart/form-data`` body (RFC 7578).

    Raises:
        RequestError: the form is broken or has no file.
    """
    message = Message()
    message["content-type"] = content_type
    boundary, place = message.get_boundary("").encode(), 0
    for _ in range(MAX_PARTS if boundary else 0):
        start = body.find(b"\r\n\r\n", place)
        end = body.find(b"\r\n--" + boundary, max(start, 0))
        if min(start, end) < 0:
            break
        if b"filename" in body[place:start].lower():
            return bytes(body[start + 4 : end])
        place = end
    raise RequestError("The form has no file, or no boundary in its Content-Type.")


def _inflated(body: bytearray, limit: int, remedy: str) -> bytes:
    inflater = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(f"The compressed body is damaged: {error}.") from None
    if len(plain) > limit:
        raise _too_large(limit, remedy)
    if not inflater.eof:
        raise RequestError("The compressed body is truncated.")
    return plain


def _too_large(limit: int, remedy: str) -> RequestError:
    return RequestError(f"The request is larger than {limit:,} bytes.", remedy, 413)


def _new_pool() -> ProcessPoolExecutor:
    """Return one process, which starts when it is first needed."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_follow_the_server)


def _follow_the_server() -> None:
    """Leave signals to the server, and end when it does, however it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
