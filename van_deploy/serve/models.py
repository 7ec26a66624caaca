"""What the server does, without HTTP: models behind their queues, images to named classes.

Requests that arrive together run together. While a batch runs, requests collect; the next batch
takes as many as fit, or an equal share where several instances are idle. Under load nothing waits:
only an idle instance gives the first request a moment for company.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings, TritonSettings
from van_deploy.data.images import FORMATS, open_image
from van_deploy.errors import UsageError, VanDeployError, require_extra
from van_deploy.metrics import probabilities
from van_deploy.model.preprocess import Pixels, pixels_from_image
from van_deploy.runners.network import PYTORCH, NamedClass, Network, Outputs, require_classifier
from van_deploy.serve.requests import MIB, Allowance, Intake, Values
from van_deploy.serve.triton import TritonModel, model_config, served_name, usual_artifacts

LARGE_IMAGE = 16_000_000  # pixels; larger ones are decoded one at a time, which bounds memory
QUEUE_IMAGES = 256
QUEUE_FULL = "The queue is full: the server has more images than it can answer."
SECONDS = {"buckets": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)}
ROWS = {"buckets": (1, 2, 4, 8, 16, 32, 64, 128)}
METRICS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "requests": ("Counter", "Requests answered", "route model status", {}),
    "request_seconds": ("Histogram", "To answer", "route model", SECONDS),
    "queue_seconds": ("Histogram", "Waiting for a batch", "model", SECONDS),
    "queued_images": ("Gauge", "Images in the server", "model", {}),
    "batch_rows": ("Histogram", "Images in a batch", "model", ROWS),
    "infer_seconds": ("Histogram", "Running a batch", "model", SECONDS),
    "infer_cpu_seconds": ("Counter", "Processor time of running batches", "model", {}),
}


class ServerMetrics:
    """What one server counts, in Prometheus' terms.

    Raises:
        MissingDependency: a package the server is built on is not installed.
    """

    def __init__(self) -> None:
        with require_extra("The server", "serve"):
            import prometheus_client as client
            import uvicorn  # noqa: F401 - told here, before a model is loaded
        registry = client.CollectorRegistry()
        client.ProcessCollector(registry=registry)  # processor time, memory, files
        self.text: Callable[[], bytes] = lambda: client.generate_latest(registry)
        self.kind = {"content-type": client.CONTENT_TYPE_LATEST}
        how = {"namespace": "van_deploy", "registry": registry}
        self._all = {
            name: getattr(client, kind)(name, text, labels.split(), **how, **more)
            for name, (kind, text, labels, more) in METRICS.items()
        }

    def of(self, name: str, *labels: object) -> Any:
        """Return one metric, such as ``requests``, for some values of its labels."""
        return self._all[name].labels(*labels)


Answer = tuple[Outputs, dict[str, float], int]
"""What one request got: its rows of every output, seconds of queue and infer, its batch's rows."""

Waiting = tuple[Values, "asyncio.Future[Answer]", float]  # rows, their answer, and since when


class ServedModel:
    """One model the server answers for. Use it inside one event loop.

    Args:
        network: opened.
        settings: of the server.
        metrics: likewise.

    Attributes:
        name: in addresses.
        network: likewise.
        queue: images it may have, waiting or being answered.
        config: Triton's description of it, as it runs here.

    Raises:
        UsageError: the settings contradict the model.
    """

    def __init__(self, network: Network, settings: ServiceSettings, metrics: ServerMetrics) -> None:
        self.network, self._delay_s = network, settings.max_delay_ms / 1e3
        self.name = served_name(network.bundle, network.name)
        least = network.max_batch * settings.instances
        limit = settings.queue_limit or max(QUEUE_IMAGES, 2 * least)
        if limit < least:
            raise UsageError(
                f"A queue of {limit} images cannot hold the {least} that run at once.",
                f"Give --queue-limit {least} or more.",
            )
        compiled = network.is_engine or network.is_package
        if settings.instances > 1 and compiled:
            raise UsageError(
                f"'{network.name}' is compiled, and answers one batch at a time.",
                "Leave out --instances, or let Triton serve it (`van-deploy package triton`).",
            )
        self.queue = Allowance(limit, QUEUE_FULL, 429)
        self._metrics = metrics
        self._metrics.of("queued_images", self.name).set_function(lambda: self.queue.used)
        native = "tensorrt" if network.is_engine else "pytorch"
        how = TritonSettings(
            queue_delay_us=round(1e3 * settings.max_delay_ms),
            queue_limit=limit,
            instances=settings.instances,
            threads=settings.threads or 0,
            gpu=network.on_gpu,
        )
        model = TritonModel(self.name, native if compiled else "onnxruntime", network)
        self.config = model_config(model, how)
        self.config["dynamic_batching"]["preferred_batch_size"] = []  # it takes what waits
        self._idle = settings.instances
        self._waiting = deque[Waiting]()
        self._threads = ThreadPoolExecutor(self._idle, "van-deploy-batch")
        self._changed, self._closing = asyncio.Event(), False

    async def answer(self) -> None:
        """Run batches until it is closed and everything that waits is answered."""
        await asyncio.gather(*(self._work() for _ in range(self._idle)))
        self._threads.shutdown()

    def close(self) -> None:
        """Take no more; what waits is answered."""
        self._closing = True
        self._changed.set()

    async def infer(self, rows: Values) -> Answer:
        """Return the answer to ``rows (n, ...)`` as the network takes them, ``n`` of one batch."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((rows, future, time.perf_counter()))
        self._changed.set()
        return await future

    async def _work(self) -> None:
        while self._waiting or not self._closing:
            if not self._waiting:
                self._changed.clear()
                await self._changed.wait()
                await asyncio.sleep(0 if self._closing else self._delay_s)
            waiting = sum(len(rows) for rows, *_ in self._waiting)
            room, taken = min(self.network.max_batch, -(-waiting // self._idle)), list[Waiting]()
            while self._waiting and (not taken or len(self._waiting[0][0]) <= room):
                taken.append(self._waiting.popleft())
                room -= len(taken[-1][0])
            if present := [item for item in taken if not item[1].cancelled()]:
                self._idle -= 1
                await self._answer(present)
                self._idle += 1
        self._changed.set()  # for the other instances

    async def _answer(self, batch: Sequence[Waiting]) -> None:
        def run() -> tuple[Outputs, float]:
            begun = time.thread_time()  # the processor time of this thread: all, with one thread
            outputs = self.network.run(every[0] if len(every) == 1 else np.concatenate(every))
            return outputs, time.thread_time() - begun

        every = [rows for rows, *_ in batch]
        start, first, total = time.perf_counter(), 0, sum(map(len, every))
        in_thread = asyncio.get_running_loop().run_in_executor
        try:
            outputs, cpu_s = await in_thread(self._threads, run)
        except Exception as error:  # the model's own failure is each request's answer
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(error)
            return
        seconds = time.perf_counter() - start
        self._metrics.of("batch_rows", self.name).observe(total)
        self._metrics.of("infer_seconds", self.name).observe(seconds)
        self._metrics.of("infer_cpu_seconds", self.name).inc(cpu_s)
        for rows, future, began in batch:
            last, waited = first + len(rows), start - began
            self._metrics.of("queue_seconds", self.name).observe(waited)
            if not future.done():
                found = {name: values[first:last] for name, values in outputs.items()}
                future.set_result((found, {"queue": waited, "infer": seconds}, total))
            first = last


class Service:
    """The models of one bundle, ready to answer: each is opened and run once.

    Args:
        bundle: what is served.
        settings: how.

    Attributes:
        metrics: what was counted.
        models: by name, in the order asked for.
        intake: of bodies.

    Raises:
        UsageError: the settings contradict the models.
        VanDeployError: an artifact is missing, was changed or does not run here.
    """

    def __init__(self, bundle: Bundle, settings: ServiceSettings) -> None:
        self.bundle, self.settings = bundle, settings
        self.metrics, self.intake = ServerMetrics(), Intake(settings)
        self.models: dict[str, ServedModel] = {}
        self._stack, self._large = contextlib.ExitStack(), threading.Lock()
        self._torch = ThreadPoolExecutor(1, "van-deploy-pytorch")
        require_classifier(bundle, "serve")
        for artifact in settings.artifacts or usual_artifacts(bundle):
            network = Network(bundle, artifact, settings, threads=settings.threads, spin=False)
            served = ServedModel(network, settings, self.metrics)
            self._stack.enter_context(network)
            for rows in {1, network.max_batch}:
                network.run(np.zeros((rows, *network.input.shape), network.input.dtype))
            self.models[served.name] = served

    def description(self) -> dict[str, Any]:
        """Return what the page shows of the bundle and of this server."""
        manifest, settings = self.bundle.manifest, self.settings
        networks = ((name, served.network) for name, served in self.models.items())
        return {
            **manifest.model_dump(mode="json", include={"name", "preprocessing", "parameters"}),
            "compare": settings.compare,
            "classes": manifest.architecture.num_classes,
            "max_body_bytes": round(MIB * settings.max_body_mib),
            "models": [{"name": n, "artifact": v.name, "runner": v.runner} for n, v in networks],
        }

    async def answer(self, ended: Awaitable[object]) -> None:
        """Run batches until ``ended``, and all that waits then; release everything."""
        models = self.models.values()
        with self._stack:
            answering = asyncio.gather(*(served.answer() for served in models))
            await ended
            for served in models:
                served.close()
            await answering
            self.intake.close()
            self._torch.shutdown()

    async def look(
        self, served: ServedModel, content: bytes, count: int, *, compare: bool
    ) -> dict[str, Any]:
        """Return what is in an image file's bytes, as the page shows it.

        Raises:
            ImageError: it is no image, or too large.
            UsageError: more classes are asked for than the artifact gives.
        """
        start, network = time.perf_counter(), served.network
        pixels, (width, height) = await asyncio.to_thread(self._pixels, content, network)
        decoded = time.perf_counter()
        outputs, times, batch = await served.infer(network.prepare(pixels))
        (top,) = network.top(outputs, count)
        document: dict[str, Any] = {"model": served.name, "artifact": network.name, "batch": batch}
        document |= {"image": {"width": width, "height": height}, "top": [vars(c) for c in top]}
        if compare and self.settings.compare:
            ask = asyncio.get_running_loop().run_in_executor
            document["pytorch"] = await ask(self._torch, self._ask_pytorch, pixels, top)
        times = {"decode": decoded - start, **times, "total": time.perf_counter() - start}
        return {**document, "milliseconds": {k: round(1e3 * s, 3) for k, s in times.items()}}

    def _pixels(self, content: bytes, network: Network) -> tuple[Pixels, tuple[int, int]]:
        from PIL import Image

        large = False
        # What is no image is told by open_image.
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as it:
            large = it.width * it.height > LARGE_IMAGE
        with self._large if large else contextlib.nullcontext():
            limit, channels = self.settings.max_pixels, network.preprocessing.channels
            image = open_image(content, channels=channels, max_pixels=limit)
            return pixels_from_image(image, network.preprocessing)[None], image.size

    @functools.cached_property
    def _original(self) -> Network:
        return self._stack.enter_context(Network(self.bundle, PYTORCH))

    def _ask_pytorch(self, pixels: Pixels, answer: Sequence[NamedClass]) -> dict[str, Any]:
        """Return the original network's answer, beside another one to the same image."""
        try:
            original = self._original
        except VanDeployError as error:
            return {"skipped": error.message}
        start = time.perf_counter()
        logits = original.run(original.prepare(pixels))["logits"]
        times = {"infer": round(1e3 * (time.perf_counter() - start), 3)}
        shares = probabilities(logits, original.task)[0].tolist()
        beside = [shares[c.index] for c in answer]
        largest = max(abs(c.probability - p) for c, p in zip(answer, beside, strict=True))
        return {"milliseconds": times, "beside": beside, "largest_difference": largest}
