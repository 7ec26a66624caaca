"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

from typing import Any

from van_deploy.errors import MissingDependency

__all__ = ["ServerMetrics", "serving_package"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


def serving_package(name: str) -> Any:
    """Return one of the packages the server is built on.

    Raises:
        MissingDependency: it is not installed.
    """
    import importlib

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
        client = serving_package("prometheus_client")
        self._client = client
        self.registry = client.CollectorRegistry()
        client.ProcessCollector(registry=self.registry)  # processor time, memory, open files
        self.requests = client.Counter(
            "van_deploy_requests",
            "Requests answered, by route, model and HTTP status",
            ["route", "model", "status"],
            registry=self.registry,
        )
        self.seconds = client.Histogram(
            "van_deploy_request_seconds",
            "Time from a request's first byte to its answer",
            ["route", "model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = client.Histogram(
            "van_deploy_queue_seconds",
            "Time a request waited for its batch",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_rows = client.Histogram(
            "van_deploy_batch_rows",
            "Pictures in the batches that ran",
            ["model"],
            buckets=ROWS,
            registry=self.registry,
        )
        self.infer_seconds = client.Histogram(
            "van_deploy_infer_seconds",
            "Time a batch ran",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._queued = client.Gauge(
            "van_deploy_queued_rows",
            "Pictures waiting for a batch",
            ["model"],
            registry=self.registry,
        )

    def watch_queue(self, model: str, rows: Any) -> None:
        """Report ``rows()`` as the length of a model's queue."""
        self._queued.labels(model).set_function(rows)

    def batch_ran(self, model: str, rows: int, seconds: float) -> None:
        """Count one batch."""
        self.batch_rows.labels(model).observe(rows)
        self.infer_seconds.labels(model).observe(seconds)

    def answered(self, route: str, model: str, status: int, seconds: float) -> None:
        """Count one request."""
        self.requests.labels(route, model, str(status)).inc()
        self.seconds.labels(route, model).observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """Return every figure and its content type."""
        return self._client.generate_latest(self.registry), self._client.CONTENT_TYPE_LATEST
