"""A listening socket, uvicorn on it, and an orderly end."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from van_deploy.errors import UsageError
from van_deploy.serve.app import server_app
from van_deploy.serve.metrics import serving_package
from van_deploy.serve.service import Service

__all__ = ["Listening", "is_loopback", "listen", "run_server"]

BACKLOG = 1024
KEEP_ALIVE_S = 75  # longer than most clients' pools
DRAIN_S = 30


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
        number = getattr(error, "errno", None)
        taken = number == errno.EADDRINUSE
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
    on_ready: Callable[[], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM (or ``stop``), then finish what was begun.

    Args:
        service: loaded.
        listening: from :func:`listen`; closed at the end.
        max_connections: more are answered with 503.
        on_ready: called once requests are answered.
        stop: ends the server where signals cannot reach it (outside the main thread).
    """
    import asyncio

    uvicorn = serving_package("uvicorn")
    config = uvicorn.Config(
        server_app(service),
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        ws="none",
        backlog=BACKLOG,
        limit_concurrency=max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=DRAIN_S,
    )

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        """uvicorn's, which tells the service that it is about to end, and ends with code 0."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets=sockets)
            if on_ready is not None and not self.should_exit:
                on_ready()

        async def on_tick(self, counter: int) -> bool:
            if stop is not None and stop.is_set():
                service.draining = self.should_exit = True
            return bool(await super().on_tick(counter))

        def handle_exit(self, number: int, frame: Any) -> None:
            service.draining = True
            super().handle_exit(number, frame)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            ours = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in ours}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    server = Server(config)
    runner = getattr(config, "get_loop_factory", None)
    factory = runner() if runner is not None else None
    with listening.socket:
        if factory is not None and hasattr(asyncio, "Runner"):
            with asyncio.Runner(loop_factory=factory) as loop:
                loop.run(server.serve(sockets=[listening.socket]))
        else:
            asyncio.run(server.serve(sockets=[listening.socket]))
