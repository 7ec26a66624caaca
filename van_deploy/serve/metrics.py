"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

from typing import Any

from van_deploy.errors import needs_extra

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
METRICS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "requests": ("Counter", "Requests answered", "route model status", {}),
    "request_seconds": ("Histogram", "To answer", "route model", {"buckets": SECONDS}),
    "queue_seconds": ("Histogram", "Waiting for a batch", "model", {"buckets": SECONDS}),
    "queued_images": ("Gauge", "Images in the server", "model", {}),
    "batch_rows": ("Histogram", "Images in a batch", "model", {"buckets": ROWS}),
    "infer_seconds": ("Histogram", "Running a batch", "model", {"buckets": SECONDS}),
    "infer_cpu_seconds": ("Counter", "Processor time of running batches", "model", {}),
}


class ServerMetrics:
    """The counters of one server, in a registry of its own.

    Raises:
        MissingDependency: a package the server is built on is not installed.
    """

    def __init__(self) -> None:
        with needs_extra("The server", "serve"):
            import prometheus_client as client
            import uvicorn  # noqa: F401 - told here, before a model is loaded
        self._client, self._registry = client, client.CollectorRegistry()
        client.ProcessCollector(registry=self._registry)  # processor time, memory, files
        self._all = {
            name: getattr(client, kind)(
                f"van_deploy_{name}", text, labels.split(), registry=self._registry, **more
            )
            for name, (kind, text, labels, more) in METRICS.items()
        }

    def of(self, name: str, *labels: object) -> Any:
        """Return one metric, such as ``requests``, for some values of its labels."""
        return self._all[name].labels(*labels)

    def text(self) -> tuple[bytes, dict[str, str]]:
        """Return every figure, and the header that says of what form."""
        kind = {"content-type": self._client.CONTENT_TYPE_LATEST}
        return self._client.generate_latest(self._registry), kind
