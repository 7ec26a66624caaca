"""A listening socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from van_deploy.errors import UsageError
from van_deploy.serve.app import LOG, App
from van_deploy.serve.metrics import serving_package
from van_deploy.serve.service import Service

__all__ = ["Listening", "is_loopback", "listen", "log_to_stderr", "run_server"]

BACKLOG = 1024
KEEP_ALIVE_S = 75  # longer than most clients' pools
DRAIN_S = 30
MAX_HEAD_BYTES = 64 * 2**10  # of request line and headers


@dataclass(frozen=True)
class Listening:
    """A socket that is bound.

    Attributes:
        socket: to hand to :func:`run_server`.
        url: where the server will answer.
        loopback: whether only this machine can reach it.
    """

    socket: socket.socket
    url: str
    loopback: bool


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, the event's own fields, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {"time": f"{stamp}.{record.msecs:03.0f}Z", "level": record.levelname.lower()}
        entry |= {"event": record.getMessage().strip(), **getattr(record, "fields", {})}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_to_stderr(level: str) -> None:
    """Write what the server logs to standard error, one JSON object a line.

    Args:
        level: ``error`` for faults, ``info`` for every request too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for logger, least in ((LOG, level.upper()), (logging.getLogger("uvicorn.error"), "ERROR")):
        logger.handlers = [handler]
        logger.setLevel(least)
        logger.propagate = False


def is_loopback(host: str) -> bool:
    """Return whether an address reaches this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    return host in {"localhost", "::1"} or host.startswith("127.")


def listen(host: str = "127.0.0.1", port: int = 8000) -> Listening:
    """Return a bound socket; port 0 takes a free one.

    Raises:
        UsageError: the address is taken, forbidden or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        bound.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"Cannot listen on {host} port {port}: {reason}.",
            "Choose another --port, or 0 for a free one." if taken else "Check --host and --port.",
        ) from error
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return Listening(bound, f"http://{shown}:{bound.getsockname()[1]}", is_loopback(host))


def run_server(
    service: Service,
    listening: Listening,
    *,
    max_connections: int = 512,
    on_ready: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM, then finish what was begun.

    Args:
        service: loaded.
        listening: from :func:`listen`; closed at the end.
        max_connections: more are answered with 503.
        on_ready: called once requests are answered, with a function that ends the server
            from any thread.
    """
    uvicorn = serving_package("uvicorn")
    config = uvicorn.Config(
        App(service),
        http=_protocol(service.settings.read_timeout_s),
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        limit_concurrency=max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        """uvicorn's, which leaves the signals to :func:`serve`."""

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()

    async def serve() -> None:
        server, loop = Server(config), asyncio.get_running_loop()

        def end() -> None:
            server.force_exit = server.should_exit  # asked twice
            service.draining = server.should_exit = True

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, end)
        service.start()
        running = asyncio.create_task(server.serve(sockets=[listening.socket]))
        while not (server.started or running.done()):
            await asyncio.sleep(0.01)
        if on_ready is not None and not running.done():
            on_ready(lambda: loop.call_soon_threadsafe(end))
        await running
        await service.close()

    with listening.socket:
        if sys.version_info >= (3, 11):
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())
        else:
            config.setup_event_loop()
            asyncio.run(serve())


def _protocol(timeout_s: float) -> type:
    """Return uvicorn's HTTP protocol with limits on the head, which uvicorn takes at any length."""
    base = serving_package("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol

    class LimitedHead(base):  # type: ignore[misc, valid-type]
        """Counts the bytes of a head and the seconds it takes."""

        head = 0  # bytes of the head that is not complete; -1 while a body comes
        timer: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self.timer.cancel()
            super().connection_lost(exc)

        def wait_for_head(self) -> None:
            self.head = 0
            self.timer = self.loop.call_later(timeout_s, self.transport.close)

        def data_received(self, data: bytes) -> None:
            while data and self.parser is not None and not self.transport.is_closing():
                piece, data = data, b""
                if self.head >= 0:
                    room = MAX_HEAD_BYTES - self.head
                    piece, data = piece[:room], piece[room:]
                    self.head += len(piece)
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
            super().on_headers_complete()

    return LimitedHead
