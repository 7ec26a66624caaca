"""Dynamic batching: requests that arrive together run together.

While a batch runs, requests collect in a queue; the next batch takes as many as fit. How
many may wait is limited before they come here (:class:`van_deploy.serve.refusal.Allowance`).
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


@dataclass
class _Waiting:
    rows: npt.NDArray[Any]
    future: asyncio.Future[Answer]
    since: float


class Batcher:
    """Collects requests for one model and runs them in batches, in threads of its own.

    Use it inside one event loop: :meth:`start`, :meth:`submit`, :meth:`close`.

    Args:
        run: the model; called in a thread, one batch at a time for each instance.
        max_batch: rows a batch, at most.
        max_delay_s: how long the first request of a batch waits for others when
            nothing runs. Under load nothing waits: the queue fills meanwhile.
        instances: batches that run at the same time.
        on_batch: told of each batch that ran.
    """

    def __init__(
        self,
        run: Callable[[npt.NDArray[Any]], Outputs],
        max_batch: int,
        *,
        max_delay_s: float = 0.001,
        instances: int = 1,
        on_batch: Callable[[Batch], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.max_delay_s = max_delay_s
        self.run = run
        self._on_batch = on_batch
        self._instances = instances
        self._queue: deque[_Waiting] = deque()
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
        self._queue.append(_Waiting(rows, future, time.perf_counter()))
        self._changed.set()
        return await future

    async def close(self) -> None:
        """Answer everything that waits, then stop."""
        self._closing = True
        self._changed.set()
        await asyncio.gather(*self._tasks)
        self._pool.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue or not self._closing:
            waiting = self._take(time.perf_counter())
            if not waiting:
                self._changed.clear()
                # A queue that is not empty has a batch to fill until its first one's time is up.
                left = self._queue[0].since + self.max_delay_s - time.perf_counter() if self._queue else None
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except asyncio.TimeoutError:
                    pass
                continue
            start = time.perf_counter()
            try:
                outputs, batch = await loop.run_in_executor(self._pool, self._run_rows, waiting)
            except Exception as error:  # the model's own failure is each request's answer
                for item in waiting:
                    if not item.future.done():
                        item.future.set_exception(error)
                continue
            self._deliver(waiting, outputs, batch, start)
        self._changed.set()  # for the other instances

    def _take(self, now: float) -> list[_Waiting]:
        """Return the next batch; nothing while there is time for it to grow."""
        queued = sum(len(item.rows) for item in self._queue)
        young = self._queue and now < self._queue[0].since + self.max_delay_s
        if young and queued < self.max_batch and not self._closing:
            return []
        batch: list[_Waiting] = []
        rows = 0
        while self._queue and rows + len(self._queue[0].rows) <= self.max_batch:
            item = self._queue.popleft()
            if not item.future.cancelled():  # the client is there still
                rows += len(item.rows)
                batch.append(item)
        return batch

    def _run_rows(self, waiting: list[_Waiting]) -> tuple[Outputs, Batch]:
        start, cpu = time.perf_counter(), time.thread_time()
        rows = waiting[0].rows
        if len(waiting) > 1:
            rows = np.concatenate([item.rows for item in waiting])
        outputs = self.run(rows)
        batch = Batch(len(rows), time.perf_counter() - start, time.thread_time() - cpu)
        return outputs, batch

    def _deliver(
        self, waiting: list[_Waiting], outputs: Outputs, batch: Batch, start: float
    ) -> None:
        if self._on_batch is not None:
            self._on_batch(batch)
        first = 0
        for item in waiting:
            last = first + len(item.rows)
            own = {name: values[first:last] for name, values in outputs.items()}
            if not item.future.done():
                item.future.set_result(Answer(own, start - item.since, batch))
            first = last
