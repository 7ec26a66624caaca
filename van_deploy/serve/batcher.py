"""Dynamic batching: requests that arrive together run together.

While a batch runs, requests collect in a queue; the next batch takes as many as fit. How
many may wait is limited before they come here (:class:`van_deploy.serve.intake.Allowance`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from van_deploy.runners.network import Outputs

__all__ = ["Answer", "Batch", "Batcher"]


@dataclass(frozen=True)
class Batch:
    """One batch that ran.

    Attributes:
        rows: in it.
        seconds: it took.
        cpu_seconds: processor time of the thread that ran it; all of it with one thread.
    """

    rows: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        outputs: its own rows of every output.
        queue_s: time it waited.
        batch: it ran in.
    """

    outputs: Outputs
    queue_s: float
    batch: Batch


class Batcher:
    """Collects requests for one model and runs them in batches, in threads of its own.

    Use it inside one event loop: :meth:`start`, :meth:`submit`, :meth:`close`.

    Args:
        run: the model; called in a thread, one batch at a time for each instance.
        max_batch: rows a batch, at most.
        max_delay_s: how long an idle instance waits for company to the first request.
            Under load nothing waits: the queue fills while a batch runs.
        instances: batches that run at the same time.
        on_batch: told of each batch that ran.
    """

    def __init__(
        self,
        run: Callable[[npt.NDArray[Any]], Outputs],
        max_batch: int,
        max_delay_s: float,
        instances: int,
        on_batch: Callable[[Batch], None],
    ) -> None:
        self.run, self.max_batch, self.max_delay_s = run, max_batch, max_delay_s
        self._instances, self._on_batch = instances, on_batch
        self._queue: deque[tuple[npt.NDArray[Any], asyncio.Future[Answer], float]] = deque()
        self._pool = ThreadPoolExecutor(instances, thread_name_prefix="van-deploy-batch")
        self._changed = asyncio.Event()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to run batches; needs a running event loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._instances)]

    async def submit(self, rows: npt.NDArray[Any]) -> Answer:
        """Return the answer to ``rows (n, ...)``, ``n`` at most ``max_batch``."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, future, time.perf_counter()))
        self._changed.set()
        return await future

    async def close(self) -> None:
        """Answer everything that waits, then stop."""
        self._closing = True
        self._changed.set()
        await asyncio.gather(*self._tasks)
        self._pool.shutdown()

    async def _work(self) -> None:
        while self._queue or not self._closing:
            if not self._queue:
                self._changed.clear()
                await self._changed.wait()
                if self.max_delay_s and not self._closing:
                    await asyncio.sleep(self.max_delay_s)
                continue
            taken: list[tuple[npt.NDArray[Any], asyncio.Future[Answer], float]] = []
            room = self.max_batch
            while self._queue and len(self._queue[0][0]) <= room:
                taken.append(self._queue.popleft())
                room -= len(taken[-1][0])
            present = [item for item in taken if not item[1].cancelled()]
            if present:
                await self._answer(*zip(*present, strict=True))
        self._changed.set()  # for the other instances

    async def _answer(
        self,
        rows: tuple[npt.NDArray[Any], ...],
        futures: tuple[asyncio.Future[Answer], ...],
        since: tuple[float, ...],
    ) -> None:
        start, first = time.perf_counter(), 0
        try:
            loop = asyncio.get_running_loop()
            outputs, batch = await loop.run_in_executor(self._pool, self._run, rows)
        except Exception as error:  # the model's own failure is each request's answer
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        self._on_batch(batch)
        for own, future, began in zip(rows, futures, since, strict=True):
            last = first + len(own)
            if not future.done():
                found = {name: values[first:last] for name, values in outputs.items()}
                future.set_result(Answer(found, start - began, batch))
            first = last

    def _run(self, rows: tuple[npt.NDArray[Any], ...]) -> tuple[Outputs, Batch]:
        start, cpu = time.perf_counter(), time.thread_time()
        together = rows[0] if len(rows) == 1 else np.concatenate(rows)
        outputs = self.run(together)
        seconds, cpu_seconds = time.perf_counter() - start, time.thread_time() - cpu
        return outputs, Batch(len(together), seconds, cpu_seconds)
