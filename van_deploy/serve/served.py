"""One model behind its queue: requests that arrive together run together.

While a batch runs, requests collect; the next batch takes as many as fit, or an equal share where
several instances are idle. Under load nothing waits: only an idle instance gives the first request
a moment for company.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from van_deploy.config import ServiceSettings, TritonSettings
from van_deploy.errors import UsageError
from van_deploy.runners.network import Network, Outputs
from van_deploy.serve.intake import Allowance
from van_deploy.serve.metrics import ServerMetrics
from van_deploy.serve.protocol import Values
from van_deploy.serve.triton_model import TritonModel, model_config, served_name

QUEUE_IMAGES = 256
Waiting = tuple[Values, "asyncio.Future[Answer]", float]  # rows, their answer, and since when
QUEUE_FULL = "The queue is full: the server has more images than it can answer."


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        outputs: its own rows of every output.
        queue_s: time it waited.
        infer_s: time its batch ran.
        batch: rows of that batch.
    """

    outputs: Outputs
    queue_s: float
    infer_s: float
    batch: int


class ServedModel:
    """One model the server answers for. Use it inside one event loop.

    Args:
        network: opened.
        settings: of the server.
        metrics: likewise.

    Attributes:
        name: in addresses.
        network: likewise.
        labels: names of its classes, or None.
        queue: images it may have, waiting or being answered.
        config: Triton's description of it, as it runs here.
        counts: ``requests``, ``rows``, ``batches``, ``failures``, ``queue_ns``, ``infer_ns``.

    Raises:
        UsageError: the settings contradict the model.
    """

    def __init__(self, network: Network, settings: ServiceSettings, metrics: ServerMetrics) -> None:
        self.network, self._metrics = network, metrics
        self.name = served_name(network.bundle, network.name)
        self.labels = network.bundle.manifest.class_names
        self.counts: dict[str, int] = defaultdict(int)
        self._idle = self._instances = settings.instances
        self._delay_s = settings.max_delay_ms / 1e3
        least = network.max_batch * settings.instances
        limit = settings.queue_limit or max(QUEUE_IMAGES, 2 * least)
        if limit < least:
            raise UsageError(
                f"A queue of {limit} images cannot fill {settings.instances} x "
                f"{network.max_batch} images.",
                f"Give --queue-limit {least} or more.",
            )
        if settings.instances > 1 and (network.is_engine or network.is_package):
            raise UsageError(
                f"'{network.name}' is compiled, and answers one batch at a time.",
                "Leave out --instances, or let Triton serve it (`van-deploy package triton`).",
            )
        self.queue = Allowance(limit, QUEUE_FULL, 429)
        metrics.of("queued_images", self.name).set_function(lambda: self.queue.used)
        native = "tensorrt" if network.is_engine else "pytorch"
        backend = native if network.is_engine or network.is_package else "onnxruntime"
        how = TritonSettings(
            queue_delay_us=round(1e3 * settings.max_delay_ms),
            queue_limit=limit,
            instances=settings.instances,
            threads=settings.threads or 0,
            gpu=network.on_gpu,
        )
        self.config = model_config(TritonModel(self.name, backend, network), how)
        self._waiting: deque[Waiting] = deque()
        self._threads = ThreadPoolExecutor(self._instances, "van-deploy-batch")
        self._changed, self._closing = asyncio.Event(), False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to run batches; needs a running event loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._instances)]

    async def close(self) -> None:
        """Answer everything that waits, then stop."""
        self._closing = True
        self._changed.set()
        await asyncio.gather(*self._tasks)
        self._threads.shutdown()

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
            rows = sum(len(item[0]) for item in self._waiting)
            room, taken = min(self.network.max_batch, -(-rows // self._idle)), list[Waiting]()
            while self._waiting and (not taken or len(self._waiting[0][0]) <= room):
                taken.append(self._waiting.popleft())
                room -= len(taken[-1][0])
            if present := [item for item in taken if not item[1].cancelled()]:
                self._idle -= 1
                await self._answer(present)
                self._idle += 1
        self._changed.set()  # for the other instances

    async def _answer(self, batch: list[Waiting]) -> None:
        start, first, counts, name = time.perf_counter(), 0, self.counts, self.name
        run, rows = asyncio.get_running_loop().run_in_executor, [own for own, _, _ in batch]
        try:
            outputs, cpu_s = await run(self._threads, self._run, rows)
        except Exception as error:  # the model's own failure is each request's answer
            counts["failures"] += len(batch)
            for _, future, _ in batch:
                if not future.done():
                    future.set_exception(error)
            return
        seconds, total = time.perf_counter() - start, sum(map(len, rows))
        self._metrics.of("batch_rows", name).observe(total)
        self._metrics.of("infer_seconds", name).observe(seconds)
        self._metrics.of("infer_cpu_seconds", name).inc(cpu_s)
        counts["batches"] += 1
        counts["last_ms"] = round(1e3 * time.time())
        for own, future, began in batch:
            last, waited = first + len(own), start - began
            counts["requests"] += 1
            counts["rows"] += len(own)
            counts["queue_ns"] += round(1e9 * waited)
            counts["infer_ns"] += round(1e9 * seconds)
            self._metrics.of("queue_seconds", name).observe(waited)
            if not future.done():
                found = {key: values[first:last] for key, values in outputs.items()}
                future.set_result(Answer(found, waited, seconds, total))
            first = last

    def _run(self, rows: list[Values]) -> tuple[Outputs, float]:
        """Return the outputs, and the processor time of this thread (all, with one thread)."""
        start = time.thread_time()
        outputs = self.network.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        return outputs, time.thread_time() - start
