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
        self.registry = self._client.CollectorRegistry()
        self._client.ProcessCollector(registry=self.registry)  # processor time, memory, files

        def made(kind: str, name: str, text: str, labels: list[str], **more: Any) -> Any:
            metric = getattr(self._client, kind)
            return metric(f"van_deploy_{name}", text, labels, registry=self.registry, **more)

        of_model, every = ["model"], {"buckets": SECONDS}
        text = "Requests answered, by route, model and HTTP status"
        self._requests = made("Counter", "requests", text, ["route", "model", "status"])
        text = "Time from a request's head to its answer"
        self._seconds = made("Histogram", "request_seconds", text, ["route", "model"], **every)
        text = "Time a request waited for its batch"
        self.queue_seconds = made("Histogram", "queue_seconds", text, of_model, **every)
        text = "Images in the batches that ran"
        self._rows = made("Histogram", "batch_rows", text, of_model, buckets=ROWS)
        self._infer = made("Histogram", "infer_seconds", "Time a batch ran", of_model, **every)
        text = "Processor time of the threads that ran batches"
        self._cpu = made("Counter", "infer_cpu_seconds", text, of_model)
        self._queued = made("Gauge", "queued_images", "Images in the server", of_model)

    def watch_queue(self, model: str, images: Callable[[], int]) -> None:
        """Report ``images()`` as the length of a model's queue."""
        self._queued.labels(model).set_function(images)

    def batch_ran(self, model: str, batch: Batch) -> None:
        """Count one batch."""
        self._rows.labels(model).observe(batch.rows)
        self._infer.labels(model).observe(batch.seconds)
        self._cpu.labels(model).inc(batch.cpu_seconds)

    def answered(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(route, model, str(status)).inc()
        self._seconds.labels(route, model).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Return every figure and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
