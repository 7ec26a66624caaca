"""A bundle of the embedded network, images with their outputs, and servers in threads."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from van_deploy.api import open_bundle
from van_deploy.bundle import Bundle
from van_deploy.checks.golden import golden_samples
from van_deploy.config import ServiceSettings
from van_deploy.data.images import find_images, open_image
from van_deploy.metrics import softmax
from van_deploy.model.preprocess import pixels_from_image
from van_deploy.runners.network import NamedClass, Network
from van_deploy.serve.app import App, listen, run_server
from van_deploy.serve.models import Service


@pytest.fixture(scope="session")
def digits(uint8_bundle: Bundle) -> Bundle:
    """Return a bundle of ``van_digits`` with all outputs in its uint8 graph; do not change it."""
    return uint8_bundle


def write_package(folder: Path, bundle: Bundle, *artifacts: str, **options: Any) -> Path:
    """Write a package for Triton into a folder, which it replaces, and return the folder."""
    report = open_bundle(bundle.path).package(folder, artifacts=artifacts, **options)
    assert report.passed, report.findings
    return folder


class Running(NamedTuple):
    """A running server in its own thread; ``address`` is host and port."""

    app: App
    address: str
    stop: Callable[[], Any]

    @property
    def service(self) -> Service:
        """The service of the application."""
        return self.app.service


@contextlib.contextmanager
def serving(bundle: Bundle, **settings: Any) -> Iterator[Running]:
    """Serve ``bundle`` on a free port, with :class:`ServiceSettings`, until the block ends."""
    app = App(Service(bundle, ServiceSettings(**settings)))
    bound, url = listen(port=0)
    ready = queue.SimpleQueue[Callable[[], Any]]()
    thread = threading.Thread(target=run_server, args=(app, bound, ready.put))
    thread.start()
    stop = ready.get(timeout=30)
    try:
        yield Running(app, url.removeprefix("http://"), stop)
    finally:
        with contextlib.suppress(RuntimeError):  # its event loop has ended
            stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(digits: Bundle) -> Iterator[Running]:
    """Serve the uint8 graph and the plain graph for the whole session."""
    pytest.importorskip("uvicorn")
    with serving(digits, artifacts=("fp32-uint8", "fp32"), max_body_mib=4) as running:
        yield running


@pytest.fixture(scope="session")
def pixels(digits: Bundle, heldout_200: Path) -> Any:
    """Return held-out digits preprocessed for the network, ``(200, 64, 64, 3)`` uint8."""
    return pixels_of(digits, find_images(heldout_200))


@pytest.fixture(scope="session")
def expected(digits: Bundle, pixels: Any) -> Any:
    """Return the outputs of the uint8 graph for ``pixels``."""
    with Network(digits, "fp32-uint8", threads=1) as network:
        return network.run(pixels)


@pytest.fixture
def golden_image(digits: Bundle) -> Path:
    """Return the bundle's first golden image."""
    return digits.path / "golden/0.png"


def top5_of(bundle: Bundle) -> list[NamedClass]:
    """Return PyTorch's top five classes of the bundle's first golden image."""
    shares = softmax(golden_samples(bundle).logits[:1])[0]
    order = np.argsort(-shares, kind="stable")[:5]
    return [NamedClass(int(i), str(i), float(shares[i])) for i in order]


def tensor_of(client: Any, values: Any, name: str = "pixels", **options: Any) -> Any:
    """Return an input for a module of ``tritonclient``: ``http`` or ``grpc``."""
    kind = {"uint8": "UINT8", "float32": "FP32"}[str(values.dtype)]
    tensor = client.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values, **options)
    return tensor


def pixels_of(bundle: Bundle, images: Iterable[Path]) -> Any:
    """Return images preprocessed for the bundle's network, ``(N, S, S, C)`` uint8."""
    preprocessing = bundle.manifest.preprocessing
    return np.stack([pixels_from_image(open_image(path), preprocessing) for path in images])
