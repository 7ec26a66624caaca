"""Dynamic batching: requests that arrive together run together.

While a batch runs, requests collect in a queue; the next batch takes as many as
fit. The queue is bounded, and so is the time a request can wait: what does not
fit is refused at once, which the client can act on, rather than answered late.
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

__all__ = ["Answer", "Batcher", "QueueFull", "ShuttingDown"]


class QueueFull(Exception):  # noqa: N818 - a state of the server, not a fault; HTTP 429
    """There are as many rows waiting as are allowed."""


class ShuttingDown(Exception):  # noqa: N818 - a state of the server, not a fault; HTTP 503
    """The server takes no more requests."""


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        outputs: its own rows of every output.
        queue_s: time it waited.
        infer_s: time its batch ran.
        batch_rows: rows of the batch it ran in.
    """

    outputs: Outputs
    queue_s: float
    infer_s: float
    batch_rows: int


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
        queue_limit: rows waiting, at most.
        max_delay_s: how long the first request of a batch waits for others when
            nothing runs. Under load nothing waits: the queue fills meanwhile.
        instances: batches that run at the same time.
        on_batch: told the rows and seconds of each batch that ran.
    """

    def __init__(
        self,
        run: Callable[[npt.NDArray[Any]], Outputs],
        max_batch: int,
        *,
        queue_limit: int = 256,
        max_delay_s: float = 0.001,
        instances: int = 1,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        self.max_batch = max_batch
        self.queue_limit = queue_limit
        self.max_delay_s = max_delay_s
        self.queued_rows = 0
        self._run = run
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
        """Return the answer to ``rows (n, ...)``, ``n`` at most ``max_batch``.

        Raises:
            QueueFull: too many rows wait already.
            ShuttingDown: :meth:`close` was called.
        """
        if self._closing:
            raise ShuttingDown
        if self.queued_rows + len(rows) > self.queue_limit:
            raise QueueFull
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(rows, future, time.perf_counter()))
        self.queued_rows += len(rows)
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
        while True:
            while not self._queue:
                if self._closing:
                    self._changed.set()  # for the other instances
                    return
                self._changed.clear()
                await self._changed.wait()
            await self._fill()
            batch = self._take()
            if not batch:
                continue
            start = time.perf_counter()
            try:
                outputs = await loop.run_in_executor(self._pool, self._run_rows, batch)
            except Exception as error:  # the model's own failure is each request's answer
                for item in batch:
                    if not item.future.done():
                        item.future.set_exception(error)
                continue
            self._deliver(batch, outputs, start, time.perf_counter() - start)

    async def _fill(self) -> None:
        """Wait a moment for more requests, unless there is a full batch already."""
        deadline = self._queue[0].since + self.max_delay_s
        while self._queue and self.queued_rows < self.max_batch and not self._closing:
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except asyncio.TimeoutError:
                return

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        rows = 0
        while self._queue and rows + len(self._queue[0].rows) <= self.max_batch:
            item = self._queue.popleft()
            self.queued_rows -= len(item.rows)
            if item.future.cancelled():  # the client is gone
                continue
            rows += len(item.rows)
            batch.append(item)
        return batch

    def _run_rows(self, batch: list[_Waiting]) -> Outputs:
        rows = batch[0].rows if len(batch) == 1 else np.concatenate([i.rows for i in batch])
        return self._run(rows)

    def _deliver(
        self, batch: list[_Waiting], outputs: Outputs, start: float, seconds: float
    ) -> None:
        total = sum(len(item.rows) for item in batch)
        if self._on_batch is not None:
            self._on_batch(total, seconds)
        first = 0
        for item in batch:
            last = first + len(item.rows)
            own = {name: values[first:last] for name, values in outputs.items()}
            if not item.future.done():
                item.future.set_result(Answer(own, start - item.since, seconds, total))
            first = last
