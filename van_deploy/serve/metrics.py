"""What the server counts, in Prometheus' text form."""

from __future__ import annotations

import importlib
from typing import Any

from van_deploy.errors import MissingDependency

__all__ = ["ServerMetrics", "serving_package"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
METRICS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "requests": ("Counter", "Requests answered", ("route", "model", "status"), {}),
    "request_seconds": ("Histogram", "To answer", ("route", "model"), {"buckets": SECONDS}),
    "queue_seconds": ("Histogram", "Waiting for a batch", ("model",), {"buckets": SECONDS}),
    "queued_images": ("Gauge", "Images in the server", ("model",), {}),
    "batch_rows": ("Histogram", "Images in a batch", ("model",), {"buckets": ROWS}),
    "infer_seconds": ("Histogram", "Running a batch", ("model",), {"buckets": SECONDS}),
    "infer_cpu_seconds": ("Counter", "Processor time of running batches", ("model",), {}),
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
        self._all = {
            name: getattr(self._client, kind)(
                f"van_deploy_{name}", text, labels, registry=self._registry, **more
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
