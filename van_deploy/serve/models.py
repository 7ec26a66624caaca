"""The served models and their dynamic batching, without HTTP.

Requests that arrive together run in one batch. While a batch runs, requests collect; the next
batch takes as many as fit, or an equal share where several instances are idle. Only an idle
instance waits a moment after the first request, for others; under load there is no delay.
"""

import asyncio
import contextlib
import functools
import io
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings, TritonSettings
from van_deploy.data.images import FORMATS, open_image
from van_deploy.errors import UsageError, VanDeployError, require_extra
from van_deploy.metrics import probabilities
from van_deploy.model.preprocess import Pixels, pixels_from_image
from van_deploy.runners.base import Outputs
from van_deploy.runners.network import PYTORCH, NamedClass, Network, require_classifier
from van_deploy.serve.requests import BodyReader, Quota, Values
from van_deploy.serve.triton import TritonModel, default_artifacts, model_config, served_name

LARGE_IMAGE = 16_000_000  # pixels; larger images are decoded one at a time, to limit memory
QUEUE_IMAGES = 256
QUEUE_FULL = "The queue is full: the server has more images than it can process."
SECONDS = {"buckets": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)}
ROWS = {"buckets": (1, 2, 4, 8, 16, 32, 64, 128)}
METRICS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "requests": ("Counter", "HTTP requests", "route model status", {}),
    "request_seconds": ("Histogram", "Seconds per request", "route model", SECONDS),
    "queue_seconds": ("Histogram", "Seconds in the queue", "model", SECONDS),
    "queued_images": ("Gauge", "Images queued or running", "model", {}),
    "batch_rows": ("Histogram", "Images per batch", "model", ROWS),
    "infer_seconds": ("Histogram", "Seconds per batch", "model", SECONDS),
    "infer_cpu_seconds": ("Counter", "CPU seconds of threads that run batches", "model", {}),
}


class ServerMetrics:
    """Prometheus metrics of one server.

    Raises:
        MissingDependency: a package of the extra ``serve`` is not installed.
    """

    def __init__(self) -> None:
        with require_extra("The server", "serve"):
            import prometheus_client as client
            import uvicorn  # noqa: F401 - to fail here, before a model is loaded
        registry = client.CollectorRegistry()
        client.ProcessCollector(registry=registry)  # processor time, memory, files
        self.text: Callable[[], bytes] = lambda: client.generate_latest(registry)
        self.headers = {"content-type": client.CONTENT_TYPE_LATEST}
        common = {"namespace": "van_deploy", "registry": registry}
        self._metrics = {
            name: getattr(client, kind)(name, text, labels.split(), **common, **options)
            for name, (kind, text, labels, options) in METRICS.items()
        }

    def metric(self, name: str, *labels: object) -> Any:
        """Return one metric, such as ``requests``, for the values of its labels."""
        return self._metrics[name].labels(*labels)


# Result of one request: its rows of every output, seconds of queue and infer, rows of its batch.
InferResult = tuple[Outputs, dict[str, float], int]
QueuedRequest = tuple[Values, "asyncio.Future[InferResult]", float]  # rows, result, start time


class ServedModel:
    """One served model with its queue. Use it inside one event loop.

    Args:
        network: an open network.
        settings: settings of the server.
        metrics: metrics of the server.

    Attributes:
        name: model name in URLs.
        network: the network.
        queue: quota of images, waiting or running.
        config: the model's configuration in Triton's format, as it runs here.

    Raises:
        UsageError: the settings do not fit the model.
    """

    def __init__(self, network: Network, settings: ServiceSettings, metrics: ServerMetrics) -> None:
        self.network, self._delay_s = network, settings.max_delay_ms / 1e3
        # Only rows of one size can run in one batch.
        shape = network.input_shape(network.preprocessing.sides)
        network.input = replace(network.input, shape=shape)
        self.name = served_name(network.bundle, network.name)
        running = network.max_batch * settings.instances
        limit = settings.queue_limit or max(QUEUE_IMAGES, 2 * running)
        if limit < running:
            raise UsageError(
                f"A queue of {limit} images cannot hold the {running} that run at once.",
                f"Give --queue-limit {running} or more.",
            )
        compiled = network.is_engine or network.is_package
        if settings.instances > 1 and compiled:
            raise UsageError(
                f"'{network.name}' is compiled and runs one batch at a time.",
                "Leave out --instances, or serve it with Triton (`van-deploy package triton`).",
            )
        self.queue = Quota(limit, QUEUE_FULL, 429)
        self._metrics = metrics
        self._metrics.metric("queued_images", self.name).set_function(lambda: self.queue.used)
        backend = "tensorrt" if network.is_engine else "onnxruntime"
        backend = "pytorch" if network.is_package or network.name == PYTORCH else backend
        triton_settings = TritonSettings(
            queue_delay_us=round(1e3 * settings.max_delay_ms),
            queue_limit=limit,
            instances=settings.instances,
            threads=settings.threads or 0,
            gpu=network.on_gpu,
        )
        self.config = model_config(TritonModel(self.name, backend, network), triton_settings)
        self.config["dynamic_batching"]["preferred_batch_size"] = []  # batches have any size
        self._idle = settings.instances
        self._waiting = deque[QueuedRequest]()
        self._threads = ThreadPoolExecutor(self._idle, "van-deploy-batch")
        self._changed, self._closing = asyncio.Event(), False

    async def run(self) -> None:
        """Run batches until the model is closed and its queue is empty."""
        await asyncio.gather(*(self._run_instance() for _ in range(self._idle)))
        self._threads.shutdown()

    def close(self) -> None:
        """Stop after the queued requests."""
        self._closing = True
        self._changed.set()

    async def infer(self, rows: Values) -> InferResult:
        """Return the result for ``rows (n, ...)`` in the network's type, at most one batch."""
        future: asyncio.Future[InferResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future, time.perf_counter()))
        self._changed.set()
        return await future

    async def _run_instance(self) -> None:
        while self._waiting or not self._closing:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                await asyncio.sleep(0 if self._closing else self._delay_s)
            waiting = sum(len(rows) for rows, *_ in self._waiting)
            room = min(self.network.max_batch, -(-waiting // self._idle))
            batch = list[QueuedRequest]()
            while self._waiting and (not batch or len(self._waiting[0][0]) <= room):
                batch.append(self._waiting.popleft())
                room -= len(batch[-1][0])
            if active := [request for request in batch if not request[1].cancelled()]:
                self._idle -= 1
                await self._run_batch(active)
                self._idle += 1
        self._changed.set()  # for the other instances

    async def _run_batch(self, batch: Sequence[QueuedRequest]) -> None:
        def run() -> tuple[Outputs, float]:
            cpu_start = time.thread_time()  # of this thread: all of it with one intra-op thread
            outputs = self.network.run(inputs[0] if len(inputs) == 1 else np.concatenate(inputs))
            return outputs, time.thread_time() - cpu_start

        inputs = [rows for rows, *_ in batch]
        start, first, total = time.perf_counter(), 0, sum(map(len, inputs))
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            outputs, cpu_s = await in_thread(self._threads, run)
        except Exception as error:  # each request of the batch gets the model's failure
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(error)
            return
        seconds = time.perf_counter() - start
        self._metrics.metric("batch_rows", self.name).observe(total)
        self._metrics.metric("infer_seconds", self.name).observe(seconds)
        self._metrics.metric("infer_cpu_seconds", self.name).inc(cpu_s)
        for rows, future, queued in batch:
            last, waited = first + len(rows), start - queued
            self._metrics.metric("queue_seconds", self.name).observe(waited)
            if not future.done():
                own = {name: values[first:last] for name, values in outputs.items()}
                future.set_result((own, {"queue": waited, "infer": seconds}, total))
            first = last


class Service:
    """The served models of one bundle; creating it opens each model and runs it once.

    Args:
        bundle: the bundle.
        settings: settings of the server.

    Attributes:
        metrics: metrics of the server.
        models: models by name, in the requested order.
        reader: reader of request bodies.

    Raises:
        UsageError: the settings do not fit the models.
        VanDeployError: an artifact is missing, was changed or does not run here.
    """

    def __init__(self, bundle: Bundle, settings: ServiceSettings) -> None:
        self.bundle, self.settings = bundle, settings
        self.metrics, self.reader = ServerMetrics(), BodyReader(settings)
        self.models: dict[str, ServedModel] = {}
        self._stack, self._large_image = contextlib.ExitStack(), threading.Lock()
        self._torch = ThreadPoolExecutor(1, "van-deploy-pytorch")
        require_classifier(bundle, "serve")
        for artifact in dict.fromkeys(settings.artifacts or default_artifacts(bundle)):
            network = Network(bundle, artifact, settings, threads=settings.threads, spin=False)
            served = ServedModel(network, settings, self.metrics)
            self._stack.enter_context(network)
            for rows in {1, network.max_batch}:
                network.run(np.zeros((rows, *network.input.shape), network.input.dtype))
            self.models[served.name] = served

    def description(self) -> dict[str, Any]:
        """Return the properties of the bundle and the server for the web page."""
        manifest = self.bundle.manifest
        networks = ((name, served.network) for name, served in self.models.items())
        return {
            **manifest.model_dump(mode="json", include={"name", "preprocessing", "parameters"}),
            "compare": self.settings.compare,
            "classes": manifest.architecture.num_classes,
            "max_body_bytes": self.reader.max_body,
            "models": [{"name": n, "artifact": v.name, "runner": v.runner} for n, v in networks],
        }

    async def run(self, ended: Awaitable[object]) -> None:
        """Run batches until ``ended`` and the queues are empty; then release all resources."""
        models = self.models.values()
        with self._stack:
            running = asyncio.gather(*(served.run() for served in models))
            await ended
            for served in models:
                served.close()
            await running
            self.reader.close()
            self._torch.shutdown()

    async def classify(
        self, served: ServedModel, content: bytes, count: int, *, compare: bool
    ) -> dict[str, Any]:
        """Return the classes of an image file, with times, in the format of ``/predict``.

        Raises:
            ImageError: the bytes are not an image, or the image is too large.
            UsageError: more classes are requested than the artifact returns.
        """
        start, network = time.perf_counter(), served.network
        pixels, (width, height) = await asyncio.to_thread(self._pixels, content, network)
        decoded = time.perf_counter()
        outputs, times, batch = await served.infer(network.prepare(pixels))
        (top,) = network.top_classes(outputs, count)
        document: dict[str, Any] = {"model": served.name, "artifact": network.name, "batch": batch}
        document |= {"image": {"width": width, "height": height}, "top": [vars(c) for c in top]}
        if compare and self.settings.compare:
            in_thread = asyncio.get_running_loop().run_in_executor
            document["pytorch"] = await in_thread(self._torch, self._run_pytorch, pixels, top)
        times = {"decode": decoded - start, **times, "total": time.perf_counter() - start}
        return {**document, "milliseconds": {k: round(1e3 * s, 3) for k, s in times.items()}}

    def _pixels(self, content: bytes, network: Network) -> tuple[Pixels, tuple[int, int]]:
        from PIL import Image

        large = False
        # open_image reports files that are not images.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as it:
            large = it.width * it.height > LARGE_IMAGE
        with self._large_image if large else contextlib.nullcontext():
            limit, channels = self.settings.max_pixels, network.preprocessing.channels
            image = open_image(content, channels=channels, max_pixels=limit)
            return pixels_from_image(image, network.preprocessing)[None], image.size

    @functools.cached_property
    def _original(self) -> Network:
        threads = self.settings.threads
        return self._stack.enter_context(Network(self.bundle, PYTORCH, threads=threads))

    def _run_pytorch(self, pixels: Pixels, top: Sequence[NamedClass]) -> dict[str, Any]:
        """Return the original network's probabilities of some classes of the same image."""
        try:
            original = self._original
        except VanDeployError as error:
            return {"skipped": error.message}
        start = time.perf_counter()
        logits = original.run(original.prepare(pixels))["logits"]
        times = {"infer": round(1e3 * (time.perf_counter() - start), 3)}
        expected = probabilities(logits, original.task)[0, [c.index for c in top]].tolist()
        largest = max(abs(c.probability - p) for c, p in zip(top, expected, strict=True))
        return {"milliseconds": times, "beside": expected, "largest_difference": largest}
