"""What the server does, without HTTP: models behind their queues, pictures to named classes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings
from van_deploy.data import open_image
from van_deploy.errors import UsageError, VanDeployError
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.runners.network import PYTORCH, Network, runnable_artefacts
from van_deploy.serve.batcher import Batcher, QueueFull, ShuttingDown
from van_deploy.serve.metrics import ServerMetrics
from van_deploy.serve.predict import named_classes
from van_deploy.serve.triton_config import model_config

__all__ = ["Served", "Service", "served_name"]

DECODERS = 2  # pictures decoded at the same time, which bounds their memory
DECODE_QUEUE = 64


@dataclass
class Served:
    """One model the server answers for.

    Attributes:
        name: in addresses.
        network: opened.
        batcher: its queue.
        labels: names of its classes, or None.
        requests: answered.
        rows: answered.
        failures: requests that ended with the model's own error.
        queue_s: summed over requests.
        infer_s: summed over requests.
        batches: how many ran.
    """

    name: str
    network: Network
    batcher: Batcher
    labels: Sequence[str] | None
    requests: int = 0
    rows: int = 0
    failures: int = 0
    queue_s: float = 0.0
    infer_s: float = 0.0
    batches: int = 0
    last_ms: int = 0

    def config(self) -> dict[str, Any]:
        """Return Triton's description of it."""
        return model_config(
            self.name,
            "onnx",
            self.network.input,
            self.network.outputs,
            self.network.max_batch,
            queue_delay_us=round(1e6 * self.batcher.max_delay_s),
            queue_limit=self.batcher.queue_limit,
        )


def served_name(bundle: Bundle, artefact: str) -> str:
    """Return what a served artefact is called, here and in Triton: ``van_b1-fp32``."""
    return f"{bundle.name}-{artefact}"


@dataclass
class Service:
    """The models of one bundle, ready to answer. :meth:`start` and :meth:`close` in one loop.

    Attributes:
        bundle: what is served.
        settings: how.
        metrics: what was counted.
        models: by name, in the order asked for.
        draining: True once the server is being stopped.
    """

    bundle: Bundle
    settings: ServiceSettings
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    models: dict[str, Served] = field(default_factory=dict)
    draining: bool = False
    ready: bool = False

    def __post_init__(self) -> None:
        """Prepare what does not need an event loop."""
        self._stack = contextlib.ExitStack()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="van-deploy-decode")
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="van-deploy-pytorch")
        self._original: Network | VanDeployError | None = None
        self._decoding = 0

    @property
    def artefacts(self) -> tuple[str, ...]:
        """The artefacts that are served."""
        if self.settings.artefacts:
            return self.settings.artefacts
        here = runnable_artefacts(self.bundle)
        return ("fp32-uint8" if "fp32-uint8" in here else "fp32",)

    def load(self) -> None:
        """Open every model and run it once, so that the first client does not wait.

        Raises:
            VanDeployError: an artefact is missing, was changed or does not run here.
        """
        for artefact in self.artefacts:
            network = Network(
                self.bundle,
                artefact,
                runner=self.settings.runner,
                threads=self.settings.threads,
                spin=False,
                trust_engine=self.settings.trust_engine,
            )
            if network.is_engine and self.settings.instances > 1:
                raise UsageError(
                    f"The engine '{artefact}' answers one batch at a time.",
                    "Leave out --instances, or let Triton serve it (`van-deploy package triton`).",
                )
            self._stack.enter_context(network)
            given = network.input
            for rows in {1, network.max_batch}:
                network.run(np.zeros((rows, *given.shape), given.dtype))
            self._add(served_name(self.bundle, artefact), network)
        golden = self.bundle.manifest.golden
        for place in golden.originals[:1] if golden else ():
            # Pillow loads its decoders when it first needs them.
            self._pixels((self.bundle.path / place).read_bytes())

    def _add(self, name: str, network: Network) -> None:
        def batch_ran(rows: int, seconds: float) -> None:
            served.batches += 1
            self.metrics.batch_ran(name, rows, seconds)

        batcher = Batcher(
            network.run,
            network.max_batch,
            queue_limit=max(self.settings.queue_limit, network.max_batch),
            max_delay_s=self.settings.max_delay_ms / 1e3,
            instances=self.settings.instances,
            on_batch=batch_ran,
        )
        served = Served(name, network, batcher, self.bundle.manifest.class_names)
        self.models[name] = served
        self.metrics.watch_queue(name, lambda: batcher.queued_rows)

    def start(self) -> None:
        """Begin to answer; needs a running event loop."""
        for served in self.models.values():
            served.batcher.start()
        self.ready = True

    async def close(self) -> None:
        """Answer what waits, then release everything."""
        self.draining = True
        await asyncio.gather(*(served.batcher.close() for served in self.models.values()))
        self._decoders.shutdown()
        self._torch.shutdown()
        self._stack.close()

    async def infer(self, served: Served, rows: Any) -> Any:
        """Return a batcher's :class:`~van_deploy.serve.batcher.Answer` to ``rows``.

        Raises:
            QueueFull: the queue is full.
            ShuttingDown: the server is being stopped.
        """
        if self.draining:
            raise ShuttingDown
        try:
            answer = await served.batcher.submit(rows)
        except (QueueFull, ShuttingDown):
            raise
        except Exception:
            served.failures += 1
            raise
        served.requests += 1
        served.rows += len(rows)
        served.queue_s += answer.queue_s
        served.infer_s += answer.infer_s
        served.last_ms = round(1e3 * time.time())
        self.metrics.queue_seconds.labels(served.name).observe(answer.queue_s)
        return answer

    async def look(
        self, served: Served, picture: bytes, top: int, *, compare: bool
    ) -> dict[str, Any]:
        """Return what is in an image file's bytes, as the page shows it.

        Raises:
            ImageError: it is no picture, or too large.
            UsageError: more classes are asked for than the artefact gives.
            QueueFull: too many pictures wait.
        """
        start = time.perf_counter()
        pixels, size = await self._decode(picture)
        decoded = time.perf_counter()
        answer = await self.infer(served, served.network.prepare(pixels))
        ranked = served.network.top(answer.outputs, top)
        document: dict[str, Any] = {
            "model": served.name,
            "artefact": served.network.name,
            "picture": {"width": size[0], "height": size[1]},
            "top": [vars(c) for c in named_classes(ranked, 0, served.labels)],
            "milliseconds": {
                "decode": _ms(decoded - start),
                "queue": _ms(answer.queue_s),
                "infer": _ms(answer.infer_s),
                "total": _ms(time.perf_counter() - start),
            },
            "batch": answer.batch_rows,
        }
        if compare:
            document["pytorch"] = await self._compare(pixels, top, document["top"])
        return document

    async def _decode(self, picture: bytes) -> tuple[Pixels, tuple[int, int]]:
        if self._decoding >= DECODE_QUEUE:
            raise QueueFull
        self._decoding += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._decoders, self._pixels, picture)
        finally:
            self._decoding -= 1

    def _pixels(self, picture: bytes) -> tuple[Pixels, tuple[int, int]]:
        preprocessing = next(iter(self.models.values())).network.preprocessing
        limit = self.settings.max_pixels
        image = open_image(picture, channels=preprocessing.channels, max_pixels=limit)
        return pixels_from_image(image, preprocessing)[None], image.size

    async def _compare(
        self, pixels: Pixels, top: int, answer: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        if not self.settings.compare:
            return {"skipped": "the server was started with --no-compare"}
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._torch, self._ask_pytorch, pixels, top, answer)

    def _ask_pytorch(
        self, pixels: Pixels, top: int, answer: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the original network's answer; it is loaded when it is first asked."""
        if self._original is None:
            try:
                self._original = self._stack.enter_context(Network(self.bundle, PYTORCH))
                self._original.run(self._original.prepare(pixels))  # the first run is slow
            except VanDeployError as error:
                self._original = error
        if isinstance(self._original, VanDeployError):
            return {"skipped": self._original.message}
        start = time.perf_counter()
        outputs = self._original.run(self._original.prepare(pixels))
        seconds = time.perf_counter() - start
        names = self.bundle.manifest.class_names
        ranked = self._original.top(outputs, top)
        every = self._original.top(outputs, int(1e9))
        mine = dict(zip(every.classes[0].tolist(), every.probabilities[0].tolist(), strict=True))
        return {
            "top": [vars(c) for c in named_classes(ranked, 0, names)],
            "milliseconds": {"infer": _ms(seconds)},
            "largest_difference": max(abs(c["probability"] - mine[c["index"]]) for c in answer),
            "beside": [mine[c["index"]] for c in answer],
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
