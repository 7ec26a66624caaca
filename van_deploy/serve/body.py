"""Reading a request's body: never more than the limit, never longer than the deadline."""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from van_deploy.errors import InputError
from van_deploy.serve.metrics import serving_package
from van_deploy.serve.protocol import RequestError

__all__ = ["SlowClientError", "TooLargeError", "file_of_form", "read_body"]

DISCARD_S = 2.0  # how long a client is listened to that has been refused already
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class TooLargeError(InputError):
    """The body is larger than is allowed; HTTP status 413."""


class SlowClientError(InputError):
    """The body did not come in time; HTTP status 408."""


async def read_body(request: Any, limit_bytes: int, timeout_s: float) -> bytes:
    """Return a Starlette request's body, decompressed.

    Raises:
        TooLargeError: it has more than ``limit_bytes``, before or after decompression.
        SlowClientError: it was not complete after ``timeout_s``.
        RequestError: its encoding is unknown or broken, or its length is no number.
    """
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal():
        raise RequestError(f"The Content-Length '{announced}' is not a number.")
    stream = request.stream()
    try:
        if int(announced) > limit_bytes:
            raise _too_large(limit_bytes)
        async with _deadline(timeout_s):
            body = await _collect(stream, limit_bytes)
    except (asyncio.TimeoutError, TimeoutError):
        raise SlowClientError(f"The request was not complete after {timeout_s:g} s.") from None
    except TooLargeError:
        with contextlib.suppress(Exception):  # so that the client gets to read the answer
            async with _deadline(DISCARD_S):
                await _discard(stream)
        raise
    return _decoded(body, request.headers, limit_bytes)


async def file_of_form(body: bytes, headers: Any) -> bytes:
    """Return the first file of a ``multipart/form-data`` body.

    Raises:
        RequestError: the form is broken or has no file.
    """
    serving_package("python_multipart")
    parsers = serving_package("starlette.formparsers")

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await parsers.MultiPartParser(headers, stream(), max_files=1, max_fields=16).parse()
    except parsers.MultiPartException as error:
        raise RequestError(f"The form cannot be read: {error.message}") from None
    except KeyError:
        raise RequestError("The form cannot be read: it has no boundary.") from None
    async with _closing(form):
        for value in form.values():
            if not isinstance(value, str):
                content: bytes = await value.read()
                return content
    raise RequestError("The form has no file.")


def _deadline(seconds: float) -> Any:
    """Return a context that ends with TimeoutError after so many seconds.

    Python 3.11 has one, which unlike ``wait_for`` makes no task for each request.
    """
    return asyncio.timeout(seconds) if hasattr(asyncio, "timeout") else _Deadline(seconds)


class _Deadline:
    """The same for Python 3.10: cancels the task and turns that into TimeoutError."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._expired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()

        def expire() -> None:
            self._expired = True
            if task is not None:
                task.cancel()

        self._handle = loop.call_later(self._seconds, expire)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handle.cancel()
        if self._expired and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError


@contextlib.asynccontextmanager
async def _closing(form: Any) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await form.close()


async def _collect(stream: AsyncIterator[bytes], limit_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    async for piece in stream:
        size += len(piece)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        pieces.append(piece)
    return b"".join(pieces)


async def _discard(stream: AsyncIterator[bytes]) -> None:
    async for _ in stream:
        pass


def _decoded(body: bytes, headers: Mapping[str, str], limit_bytes: int) -> bytes:
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in {"gzip", "deflate"}:
        raise RequestError(f"The Content-Encoding '{encoding}' is unknown; use gzip or deflate.")
    inflater = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = inflater.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"The {encoding} body is damaged: {error}.") from None
    if len(plain) > limit_bytes:
        raise _too_large(limit_bytes)
    if not inflater.eof:
        raise RequestError(f"The {encoding} body is truncated.")
    return plain


def _too_large(limit_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"The request is larger than the {limit_bytes:,} bytes this server takes.",
        "Send fewer or smaller pictures, or start the server with a higher --max-body-mib.",
    )
