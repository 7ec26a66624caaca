"""Where work goes that would hold up the event loop.

JSON is parsed and written holding Python's lock, so large JSON goes to a process of its own.
Inflating, decoding and checks of arrays release the lock, so threads do.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

from van_deploy.serve.refusal import Refusal

__all__ = ["Workers"]

THREADS = 2

Result = TypeVar("Result")


class Workers:
    """A process and two threads for the server's own work; :meth:`close` ends them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="van-deploy-decode")
        self._process = self._new_process()  # starts when it is first needed

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return ``function(*arguments)``, which releases Python's lock for the most part."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def in_process(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Return ``function(*arguments)`` from another process; both must be picklable.

        Raises:
            Refusal: that process died; there will be another one.
        """
        process, loop = self._process, asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(process, function, *arguments)
        except BrokenExecutor:
            if self._process is process:
                self._process = self._new_process()
            text = "The process that parses JSON ended; there is another one now."
            raise Refusal(text, status=503) from None

    def close(self) -> None:
        """End both once what they were asked for is done."""
        self._threads.shutdown()
        self._process.shutdown()

    @staticmethod
    def _new_process() -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_follow_the_server)


def _follow_the_server() -> None:
    """Leave signals to the server, and end when it does, however it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
