"""What the server does, without HTTP: models behind their queues, images to named classes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from van_deploy.bundle import Bundle
from van_deploy.config import ServiceSettings, TritonSettings
from van_deploy.errors import UsageError, VanDeployError
from van_deploy.images import open_image
from van_deploy.model.pixels import Pixels, pixels_from_image
from van_deploy.runners.network import ORT_CPU, PYTORCH, Network
from van_deploy.serve.batcher import Answer, Batch, Batcher
from van_deploy.serve.intake import Allowance, Workers
from van_deploy.serve.metrics import ServerMetrics
from van_deploy.serve.predict import named_classes
from van_deploy.serve.triton_config import model_config
from van_deploy.serve.triton_model import TritonModel, served_name, usual_artefacts

__all__ = ["MIB", "Served", "Service"]

MIB = 2**20
LARGE_IMAGE = 16_000_000  # pixels; larger ones are decoded one at a time, which bounds memory
QUEUE_IMAGES = 256
QUEUE_FULL = "The queue is full: the server has more images than it can answer."
HELD_FULL = "The requests that are being received hold all the memory they may."


@dataclass
class Served:
    """One model the server answers for.

    Attributes:
        network: opened.
        batcher: runs its batches.
        queue: the images it may have.
        config: Triton's description of it, as it runs here.
        labels: names of its classes, or None.
        counts: ``requests``, ``rows``, ``batches``, ``failures``, ``queue_ns``, ``infer_ns``.
    """

    network: Network
    batcher: Batcher
    queue: Allowance
    config: dict[str, Any]
    labels: Sequence[str] | None
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def name(self) -> str:
        """In addresses."""
        return str(self.config["name"])


class Service:
    """The models of one bundle, ready to answer. :meth:`start` and :meth:`close` in one loop.

    Args:
        bundle: what is served.
        settings: how.

    Attributes:
        metrics: what was counted.
        models: by name, in the order asked for.
        held: bytes of requests.
        workers: for work that would hold up the event loop.
        draining: True once the server is being stopped.
    """

    def __init__(self, bundle: Bundle, settings: ServiceSettings) -> None:
        self.bundle, self.settings = bundle, settings
        self.metrics = ServerMetrics()
        self.models: dict[str, Served] = {}
        self.held = Allowance(round(MIB * settings.max_held_mib), HELD_FULL, 503)
        self.workers = Workers()
        self.draining = False
        self._stack = contextlib.ExitStack()
        self._large = threading.Lock()
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="van-deploy-pytorch")
        self._original: Network | VanDeployError | None = None

    def load(self) -> None:
        """Open every model and run it once, so that the first client does not wait.

        Raises:
            UsageError: the settings contradict the models.
            VanDeployError: an artefact is missing, was changed or does not run here.
        """
        settings = self.settings
        for artefact in settings.artefacts or usual_artefacts(self.bundle):
            network = Network(
                *(self.bundle, artefact),
                runner=settings.runner,
                threads=settings.threads,
                spin=False,
                trust_engine=settings.trust_engine,
            )
            if network.is_engine and settings.instances > 1:
                raise UsageError(
                    f"The engine '{artefact}' answers one batch at a time.",
                    "Leave out --instances, or let Triton serve it (`van-deploy package triton`).",
                )
            self._add(served_name(self.bundle, artefact), network)

    def _add(self, name: str, network: Network) -> None:
        settings, instances, given = self.settings, self.settings.instances, network.input
        least = network.max_batch * instances
        limit = settings.queue_limit or max(QUEUE_IMAGES, 2 * least)
        if limit < least:
            raise UsageError(
                f"A queue of {limit} images cannot fill {instances} x {network.max_batch} images.",
                f"Give --queue-limit {least} or more.",
            )
        self._stack.enter_context(network)
        for rows in {1, network.max_batch}:
            network.run(np.zeros((rows, *given.shape), given.dtype))
        backend = "tensorrt" if network.is_engine else "onnxruntime"
        model = TritonModel(name, backend, given, network.outputs, network.max_batch)
        how = TritonSettings(
            queue_delay_us=round(1e3 * settings.max_delay_ms),
            queue_limit=limit,
            instances=instances,
            threads=settings.threads or 0,
            gpu=network.runner != ORT_CPU,
        )

        def ran(batch: Batch) -> None:
            served.counts["batches"] += 1
            self.metrics.batch_ran(name, batch)

        delay_s = settings.max_delay_ms / 1e3
        batcher = Batcher(network.run, network.max_batch, delay_s, instances, ran)
        queue, names = Allowance(limit, QUEUE_FULL, 429), self.bundle.manifest.class_names
        served = Served(network, batcher, queue, model_config(model, how), names)
        self.models[name] = served
        self.metrics.watch_queue(name, lambda: queue.used)

    def description(self) -> dict[str, Any]:
        """Return what the page shows of the bundle and of this server."""
        manifest, settings = self.bundle.manifest, self.settings
        plain = manifest.model_dump(mode="json", include={"name", "preprocessing", "parameters"})
        plain |= {"classes": manifest.architecture.num_classes, "compare": settings.compare}
        plain |= {"max_body_bytes": round(MIB * settings.max_body_mib)}
        networks = {name: served.network for name, served in self.models.items()}
        models = [{"name": n, "artefact": v.name, "runner": v.runner} for n, v in networks.items()]
        return {**plain, "models": models}

    def start(self) -> None:
        """Begin to answer; needs a running event loop."""
        for served in self.models.values():
            served.batcher.start()

    async def close(self) -> None:
        """Answer what waits, then release everything."""
        await asyncio.gather(*(served.batcher.close() for served in self.models.values()))
        self.workers.close()
        self._torch.shutdown()
        self._stack.close()

    async def infer(self, served: Served, rows: Any) -> Answer:
        """Return the answer to ``rows``, as the network takes them."""
        counts = served.counts
        try:
            answer = await served.batcher.submit(rows)
        except Exception:
            counts["failures"] += 1
            raise
        counts["requests"] += 1
        counts["rows"] += len(rows)
        counts["queue_ns"] += round(1e9 * answer.queue_s)
        counts["infer_ns"] += round(1e9 * answer.batch.seconds)
        counts["last_ms"] = round(1e3 * time.time())
        self.metrics.waited(served.name, answer.queue_s)
        return answer

    async def look(
        self, served: Served, content: bytes, top: int, *, compare: bool
    ) -> dict[str, Any]:
        """Return what is in an image file's bytes, as the page shows it.

        Raises:
            ImageError: it is no image, or too large.
            UsageError: more classes are asked for than the artefact gives.
        """
        start = time.perf_counter()
        pixels, size = await self.workers.in_thread(self._pixels, content, served.network)
        decoded = time.perf_counter()
        answer = await self.infer(served, served.network.prepare(pixels))
        ranked = served.network.top(answer.outputs, top)
        document: dict[str, Any] = {
            "model": served.name,
            "artefact": served.network.name,
            "image": {"width": size[0], "height": size[1]},
            "top": [vars(c) for c in named_classes(ranked, 0, served.labels)],
            "milliseconds": {"decode": _ms(decoded - start), "queue": _ms(answer.queue_s)},
            "batch": answer.batch.rows,
        }
        document["milliseconds"] |= {"infer": _ms(answer.batch.seconds)}
        if compare and self.settings.compare:
            ask = asyncio.get_running_loop().run_in_executor
            found = await ask(self._torch, self._ask_pytorch, pixels, document["top"])
            document["pytorch"] = found
        document["milliseconds"]["total"] = _ms(time.perf_counter() - start)
        return document

    def _pixels(self, content: bytes, network: Network) -> tuple[Pixels, tuple[int, int]]:
        from PIL import Image

        large = False
        with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as head:
            large = head.width * head.height > LARGE_IMAGE
        with self._large if large else contextlib.nullcontext():
            image = open_image(content, max_pixels=self.settings.max_pixels)
            return pixels_from_image(image, network.preprocessing)[None], image.size

    def _ask_pytorch(self, pixels: Pixels, answer: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        every = self._original.top(outputs, outputs["logits"].shape[1])
        classes = named_classes(every, 0, self.bundle.manifest.class_names)
        mine = {c.index: c.probability for c in classes}
        return {
            "top": [vars(c) for c in classes[: len(answer)]],
            "milliseconds": {"infer": _ms(seconds)},
            "largest_difference": max(abs(c["probability"] - mine[c["index"]]) for c in answer),
            "beside": [mine[c["index"]] for c in answer],
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
