"""Reading a request's body: never more than the limit, never longer than the deadline."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping
from email.message import Message
from typing import Any

from van_deploy.serve.refusal import Refusal
from van_deploy.serve.workers import Workers

__all__ = ["ClientGoneError", "Receive", "file_of_form", "read_body"]

DEFLATE_RATIO = 1032  # the most that a byte of deflate stands for (zlib's technical details)
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
MAX_PARTS = 16  # of a form

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class ClientGoneError(Exception):
    """The client closed its connection before its request was complete."""


async def read_body(
    receive: Receive,
    headers: Mapping[str, str],
    limit: int,
    timeout_s: float,
    take: Callable[[int], None],
    workers: Workers,
) -> bytes | bytearray:
    """Return a request's body, decompressed.

    Args:
        receive: ASGI's.
        headers: by their names in lower case.
        limit: bytes the body may have, before and after decompression.
        timeout_s: in which it must be complete.
        take: called with the bytes that are held from then on; may refuse them.
        workers: inflate it.

    Raises:
        ClientGoneError: it will never be complete.
        Refusal: too large, too slow, too much for all requests together, or badly encoded.
    """
    if int(headers.get("content-length", "0")) > limit:
        raise _too_large(limit)
    try:
        body = await asyncio.wait_for(_collected(receive, limit, take), timeout_s)
    except asyncio.TimeoutError:
        raise Refusal(f"The request was not complete after {timeout_s:g} s.", status=408) from None
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding == "identity":
        return body
    if encoding not in {"gzip", "deflate"}:
        raise Refusal(f"The Content-Encoding {encoding[:20]!r} is unknown: gzip or deflate.")
    take(min(limit, DEFLATE_RATIO * len(body)))
    return await workers.in_thread(_inflated, body, limit)


def file_of_form(body: bytes | bytearray, content_type: str) -> bytes:
    """Return the first file of a ``multipart/form-data`` body (RFC 7578).

    Raises:
        Refusal: the form is broken or has no file.
    """
    message = Message()
    message["content-type"] = content_type
    boundary = message.get_boundary("")
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), MAX_PARTS)[1:-1]:
        head, found, content = part.partition(b"\r\n\r\n")
        if boundary and found and b"filename" in head.lower():
            return content
    raise Refusal("The form has no file, or no boundary in its Content-Type.")


async def _collected(receive: Receive, limit: int, take: Callable[[int], None]) -> bytearray:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        take(len(message["body"]))
        body += message["body"]
        if len(body) > limit:
            raise _too_large(limit)
        more = message["more_body"]
    return body


def _inflated(body: bytearray, limit: int) -> bytes:
    inflater = zlib.decompressobj(GZIP_OR_ZLIB)
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refusal(f"The compressed body is damaged: {error}.") from None
    if len(plain) > limit:
        raise _too_large(limit)
    if not inflater.eof:
        raise Refusal("The compressed body is truncated.")
    return plain


def _too_large(limit: int) -> Refusal:
    return Refusal(
        f"The request is larger than the {limit:,} bytes this server takes.",
        "Send fewer or smaller images, or start the server with a higher --max-body-mib.",
        status=413,
    )
