"""A bundle of the embedded network, and servers for it in threads of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from van_deploy.bundle import Bundle
from van_deploy.checks.golden import golden_samples
from van_deploy.config import ServiceSettings
from van_deploy.metrics import softmax
from van_deploy.runners.network import Outputs
from van_deploy.serve.server import listen, run_server
from van_deploy.serve.service import Service


@pytest.fixture(scope="session")
def digits(byte_bundle: Bundle) -> Bundle:
    """Return a bundle of ``van_digits`` with every output of the byte graph; not to be changed."""
    return byte_bundle


class Running:
    """A server that answers, in a thread of its own."""

    def __init__(self, service: Service, url: str) -> None:
        self.service = service
        self.url = url
        self.address = url.removeprefix("http://")


Serve = Callable[..., contextlib.AbstractContextManager[Running]]


@contextlib.contextmanager
def serving(
    bundle: Bundle, *, slow: threading.Event | None = None, **settings: Any
) -> Iterator[Running]:
    """Serve ``bundle`` on a free port until the block ends.

    Args:
        bundle: what to serve.
        slow: where given, every batch waits for it before it runs.
        settings: of :class:`ServiceSettings`, and ``max_connections``.
    """
    connections = settings.pop("max_connections", 512)
    service = Service(bundle, ServiceSettings(**settings))
    service.load()
    if slow is not None:
        _hold(service, slow)
    listening = listen(port=0)
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=run_server,
        args=(service, listening),
        kwargs={"on_ready": ready.set, "stop": stop, "max_connections": connections},
    )
    thread.start()
    try:
        assert ready.wait(30)
        yield Running(service, listening.url)
    finally:
        stop.set()
        if slow is not None:
            slow.set()
        thread.join(30)
        assert not thread.is_alive()


def _hold(service: Service, gate: threading.Event) -> None:
    for served in service.models.values():
        run = served.network.run

        def held(batch: Any, run: Callable[[Any], Outputs] = run) -> Outputs:
            gate.wait(30)
            return run(batch)

        served.batcher._run = held


@pytest.fixture(scope="session")
def server(digits: Bundle) -> Iterator[Running]:
    """Serve the bytes graph and the plain one for the whole session."""
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    with serving(digits, artefacts=("fp32-uint8", "fp32"), max_body_bytes=4 * 2**20) as running:
        yield running


@pytest.fixture
def original(digits: Bundle) -> Path:
    """Return the bundle's first golden original."""
    return digits.path / "golden/0.png"


@dataclass(frozen=True)
class Likely:
    """A class and its probability."""

    index: int
    probability: float


def top5_of(bundle: Bundle) -> list[Likely]:
    """Return PyTorch's first five classes of the bundle's first golden original."""
    shares = softmax(golden_samples(bundle).logits[:1])[0]
    order = np.argsort(-shares, kind="stable")[:5]
    return [Likely(int(index), float(shares[index])) for index in order]
