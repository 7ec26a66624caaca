"""A listening socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from van_deploy.errors import UsageError
from van_deploy.serve.app import App

BACKLOG = 1024
KEEP_ALIVE_S = 75  # longer than most clients' pools
DRAIN_S = 30
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
THREADS = 2  # that decode, inflate and check arrays
MAX_HEAD_BYTES, MAX_HEADERS = 16 * 2**10, 100  # of a request; both with its request line
MAX_PIPELINED = 16  # requests of one connection that wait for each other
FREE_CHUNKS, LEAST_CHUNK_BYTES = 200, 64  # each chunk of a body costs a call, whatever its size


def is_loopback(host: str) -> bool:
    """Return whether an address reaches this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host in {"localhost", "::1"} or host.startswith("127.")


def listen(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Return a bound socket; port 0 takes a free one.

    Raises:
        UsageError: the address is taken, forbidden or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise UsageError(
            f"Cannot listen on {host} port {port}: {reason}.",
            "Choose another --port, or 0 for a free one." if taken else "Check --host and --port.",
        ) from error


def url_of(bound: socket.socket) -> str:
    """Return where a server on a bound socket answers."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(
    app: App, bound: socket.socket, on_ready: Callable[[Callable[[], Any]], None] = lambda _: None
) -> None:
    """Answer until SIGINT or SIGTERM, then finish what was begun.

    Args:
        app: of a service that is loaded.
        bound: from :func:`listen`; closed at the end.
        on_ready: called once requests are answered, with a function that ends the server
            from any thread.
    """
    import uvicorn

    settings = app.service.settings
    config = uvicorn.Config(
        app,
        http=_protocol(settings.read_timeout_s),
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="critical",
        server_header=False,
        backlog=BACKLOG,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )
    return_large_blocks()
    server, service = uvicorn.Server(config), app.service
    # Signals are taken below, and end it with code 0.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, "van-deploy-decode"))

        def end() -> None:
            server.force_exit = server.should_exit  # asked twice
            service.intake.draining = server.should_exit = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, end)
        service.start()
        running = asyncio.create_task(server.serve(sockets=[bound]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        on_ready(lambda: loop.call_soon_threadsafe(end))
        await running
        await service.close()

    loop = (config.get_loop_factory() or asyncio.new_event_loop)()
    with bound, contextlib.closing(loop):
        loop.run_until_complete(serve())


def return_large_blocks() -> bool:
    """Give blocks from 128 KiB on back to the system when they are freed; tell whether it took.

    glibc raises that threshold to the size of what is freed, up to 32 MiB; bodies and images then
    stay in its heaps: 1.2 GiB above the model under the worst bodies, and 0.8 GiB with this
    (``python -m benchmarks.serve worst``). Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 128 * 1024))


def _protocol(timeout_s: float) -> Any:
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
