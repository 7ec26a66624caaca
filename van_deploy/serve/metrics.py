"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from van_deploy.errors import MissingDependency
from van_deploy.serve.batcher import Batch

__all__ = ["ServerMetrics", "serving_package"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
METRICS = {  # name: what, kind, labels, buckets
    "requests": ("Requests answered", "Counter", ("route", "model", "status"), None),
    "request_seconds": ("From head to answer", "Histogram", ("route", "model"), SECONDS),
    "queue_seconds": ("Time a request waited for its batch", "Histogram", ("model",), SECONDS),
    "queued_images": ("Images in the server", "Gauge", ("model",), None),
    "batch_rows": ("Images in the batches that ran", "Histogram", ("model",), ROWS),
    "infer_seconds": ("Time a batch ran", "Histogram", ("model",), SECONDS),
    "infer_cpu_seconds": (
        "Processor time of the threads that ran batches",
        "Counter",
        ("model",),
        None,
    ),
}


def serving_package(name: str) -> Any:
    """Return one of the packages the server is built on.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependency(
            f"The server needs a package that is not installed: {error}.",
            "Install it with `pip install 'van-deploy[serve]'`.",
        ) from error


class ServerMetrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._client = serving_package("prometheus_client")
        self._registry = self._client.CollectorRegistry()
        self._client.ProcessCollector(registry=self._registry)  # processor time, memory, files
        self._all: dict[str, Any] = {}
        for name, (text, kind, labels, buckets) in METRICS.items():
            more = {"buckets": buckets} if buckets else {}
            made, full = getattr(self._client, kind), f"van_deploy_{name}"
            self._all[name] = made(full, text, labels, registry=self._registry, **more)

    def watch_queue(self, model: str, images: Callable[[], int]) -> None:
        """Report ``images()`` as the length of a model's queue."""
        self._all["queued_images"].labels(model).set_function(images)

    def batch_ran(self, model: str, batch: Batch) -> None:
        """Count one batch."""
        self._all["batch_rows"].labels(model).observe(batch.rows)
        self._all["infer_seconds"].labels(model).observe(batch.seconds)
        self._all["infer_cpu_seconds"].labels(model).inc(batch.cpu_seconds)

    def waited(self, model: str, seconds: float) -> None:
        """Count how long one request waited for its batch."""
        self._all["queue_seconds"].labels(model).observe(seconds)

    def answered(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._all["requests"].labels(route, model, str(status)).inc()
        self._all["request_seconds"].labels(route, model).observe(seconds)

    def text(self) -> tuple[bytes, dict[str, str]]:
        """Return every figure, and the header that says of what form."""
        kind = {"content-type": self._client.CONTENT_TYPE_LATEST}
        return self._client.generate_latest(self._registry), kind
