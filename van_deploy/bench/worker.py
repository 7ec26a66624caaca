"""The process that holds one contender. Started by :mod:`van_deploy.bench.process`.

It reads requests from a pipe, each the name of a method of :class:`Worker` and its arguments, and
answers each with what that returns. Between two requests it is stopped by its parent, so no
thread of it can spin.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from van_deploy.bench.contender import IMPORTED, Contender, runner_of
from van_deploy.bench.process import WorkerError
from van_deploy.bench.timing import Loading
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.environment.packages import imported_quietly
from van_deploy.errors import MissingDependency, VanDeployError

PR_SET_PDEATHSIG = 1
REWARM_S = 0.02
"""Unmeasured seconds after a process was woken: its threads start, its weights come back into
the caches. The first measured call is then as long as those after it."""

WARM_CALLS = 3  # the fastest of them tells how long a call takes
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "failed to allocate")
Call = Callable[[], object]


class Worker:
    """One contender, opened once (or once a stream), answering requests."""

    def __init__(self) -> None:
        self.opened = contextlib.ExitStack()
        self._runners: list[Any] = []
        self._calls: list[Call] = []

    def answer(self, do: str, arguments: dict[str, Any]) -> Any:
        """Return what a method returns, or a :class:`WorkerError` that a user can act on."""
        try:
            return getattr(self, do)(**arguments)
        except (VanDeployError, MemoryError, RuntimeError, OSError, ValueError) as error:
            return _told(error)

    def load(self, contender: Contender, threads: int, streams: int) -> Loading:
        """Import the runtime and open the contender once a stream."""
        self._contender, each = contender, max(1, threads // streams)
        start = time.perf_counter()
        for module in IMPORTED.get(contender.runtime, ()):
            with contextlib.suppress(ImportError):  # opening it says so
                imported_quietly(module)
        imported, before = time.perf_counter(), _memory_bytes()
        runners = [runner_of(contender, each) for _ in range(streams)]
        self._runners = [self.opened.enter_context(runner) for runner in runners]
        took = (imported - start, time.perf_counter() - imported)
        return Loading(*took, before, _memory_bytes(), threads_each=each)

    def take(self, images: Path, batch: int) -> None:
        """Take a batch of a file of images. The peak of resident memory starts afresh here."""
        import numpy as np

        _forget_peak()
        self._batch = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])

    def feed(self, images: Path, batch: int, warmup_s: float) -> tuple[float, float]:
        """Take a batch and warm up; return the ms of the first call and of the fastest."""
        self.take(images, batch)
        self._calls = [partial(runner.run_all, self._batch) for runner in self._runners]
        start = time.perf_counter()
        for call in self._calls:
            call()
        first_ms = 1e3 * (time.perf_counter() - start) / len(self._calls)
        gc.collect()
        gc.freeze()  # what is there now stays: later collections have next to nothing to look at
        return first_ms, min(self._run_streams(warmup_s, WARM_CALLS))

    def time(self, seconds: float) -> tuple[list[float], float, int]:
        """Return every call's latency in ms, their wall seconds, and the peak memory in bytes."""
        self._run_streams(REWARM_S, 1)
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        try:
            latencies = self._run_streams(seconds, 1)
        finally:
            gc.enable()
        return latencies, time.perf_counter() - start, peak_memory_bytes()

    def resident(self, images: Path, batch: int, seconds: float, calls: int) -> Any:
        """Take a batch; return what it takes on the GPU; see :func:`~.gpu.timed`."""
        from van_deploy.bench.gpu import GpuWatch, clock_of, timed

        self.take(images, batch)
        device = self._contender.device
        watch = GpuWatch(device)
        with contextlib.closing(self._runners[0].resident(self._batch)) as held:
            clock = clock_of(held, device)
            return timed(held, batch, clock, watch, seconds=seconds, calls=calls)

    def profile(self) -> Any:
        """Return the time of the batch by kind of layer."""
        from van_deploy.bench.profile import profile_of

        return profile_of(self._contender, self._runners[0], self._batch)

    def ceilings(self, device: str, threads: int, seconds: float) -> Any:
        """Return what the device itself can do; it needs no contender."""
        from van_deploy.bench.ceilings import measured_ceilings

        return measured_ceilings(device, threads, seconds)

    def _run_streams(self, seconds: float, calls: int) -> list[float]:
        """Run one thread a stream; return the latencies of all. One stream needs no thread."""
        if len(self._calls) == 1:
            return timed_calls(self._calls[0], seconds, calls)
        together = threading.Barrier(len(self._calls))

        def run(call: Call) -> list[float]:
            together.wait()
            return timed_calls(call, seconds, calls)

        with ThreadPoolExecutor(len(self._calls)) as pool:
            return [ms for stream in pool.map(run, self._calls) for ms in stream]


def timed_calls(call: Call, seconds: float, calls: int) -> list[float]:
    """Return the ms of each call, until ``seconds`` have passed and ``calls`` were made."""
    latencies: list[float] = []
    start = previous = time.perf_counter()
    while previous - start < seconds or len(latencies) < calls:
        call()
        now = time.perf_counter()
        latencies.append(1e3 * (now - previous))
        previous = now
    return latencies


def serve(pipe: Connection) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    with worker.opened, contextlib.suppress(EOFError):
        while True:
            pipe.send(worker.answer(*pipe.recv()))


def _told(error: BaseException) -> WorkerError:
    """Return an error as plain text, and whether it was memory that ran out."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in OUT_OF_MEMORY):
        return WorkerError("out of memory", "Use a smaller batch.", "memory")
    if isinstance(error, VanDeployError):
        kind = "missing" if isinstance(error, MissingDependency) else "failed"
        return WorkerError(error.message, error.remedy, kind)
    return WorkerError(text.splitlines()[0][:300])


def _memory_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def _forget_peak() -> None:
    """Start the peak of resident memory afresh, where the kernel lets a process do that."""
    with contextlib.suppress(OSError):  # the peak is then that of the whole life of the process
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    if sys.platform == "linux":  # the kernel kills it with its parent, even while it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    serve(Connection(int(sys.argv[1])))
