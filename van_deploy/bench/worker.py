"""A contender in a process of its own, stopped whenever it is not asked something.

The process reads requests from a pipe, each the name of a method of :class:`Worker` and its
arguments, and answers each with what that returns. Between two requests it is stopped by its
parent, so no thread of it can spin.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from van_deploy.bench.contenders import runner_of
from van_deploy.bench.document import Contender
from van_deploy.bench.gpu import clock_of, gpu_watch, timed
from van_deploy.bench.profile import profile_of
from van_deploy.bench.roofline import measured_ceilings
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import VanDeployError

# Longer than any compilation of a VAN; past it a worker hangs.
ANSWER_WITHIN_S = 900.0

# Tells glibc to keep what a process frees. It gives large blocks back to the system otherwise,
# and takes them again page by page at the next call: so eager PyTorch spends a third of its time.
# See mallopt(3). Other C libraries ignore it; who sets these variables is not overruled.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}

SERVE = "from van_deploy.bench.worker import serve; serve({})"
ONE_THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

PR_SET_PDEATHSIG = 1
# Unmeasured seconds after a process was woken: its threads start, its weights come back into
# the caches. The first measured call is then as long as those after it.
REWARM_S = 0.02

WARM_CALLS = 3  # the fastest of them tells how long a call takes
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "failed to allocate")


class WorkerError(VanDeployError):
    """A worker answered with an error."""


class WorkerGoneError(WorkerError):
    """A worker's process is gone."""


class WorkerProcess:
    """A process that answers :meth:`ask`, and sleeps otherwise. Open it with ``with``.

    Args:
        threads: how many its runtime may use, over all streams; set in its environment too.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> WorkerProcess:
        """Start the process."""
        pools = dict.fromkeys(ONE_THREAD_POOLS, str(self.threads))
        quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE.format(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**KEEP_MEMORY, **os.environ, **pools},
            **quiet,
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()  # also ends a stopped process
        self.process.wait()
        self._pipe.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Wake the process, return its answer to one request, and stop it again.

        Raises:
            WorkerError: it answered with an error, died or hung.
        """
        try:
            self.process.send_signal(signal.SIGCONT)
            self._pipe.send((do, arguments))
            if not self._pipe.poll(ANSWER_WITHIN_S):
                self.process.kill()
                raise WorkerGoneError(f"no answer within {ANSWER_WITHIN_S:.0f} s")
            answer = self._pipe.recv()
        except (OSError, EOFError):
            code = self.process.wait()
            what = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            memory = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            raise WorkerGoneError(f"{what} during '{do}'{memory}") from None
        self.process.send_signal(signal.SIGSTOP)
        if isinstance(answer, WorkerError):
            raise answer
        return answer


class Worker:
    """One contender, opened once a stream, answering requests."""

    def __init__(self) -> None:
        self.opened = contextlib.ExitStack()
        self._runners: list[Any] = []

    def answer(self, do: str, arguments: dict[str, Any]) -> Any:
        """Return what a method returns, or a :class:`WorkerError` that a user can act on."""
        try:
            return getattr(self, do)(**arguments)
        except VanDeployError as error:
            return WorkerError(error.message, error.remedy)
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            if isinstance(error, MemoryError) or any(s in text.lower() for s in OUT_OF_MEMORY):
                return WorkerError("out of memory", "Use a smaller batch.")
            return WorkerError(text.splitlines()[0][:300])

    def load(self, contender: Contender, threads: int, streams: int) -> float:
        """Open the contender once a stream; return the seconds that took."""
        start, self._contender = time.perf_counter(), contender
        for _ in range(streams):
            runner = runner_of(contender, max(1, threads // streams))
            self._runners.append(self.opened.enter_context(runner))
        return time.perf_counter() - start

    def take(self, images: Path, batch: int) -> None:
        """Take a batch of a file of images. The peak of resident memory starts afresh here."""
        with contextlib.suppress(OSError):  # the peak is then that of the process's whole life
            Path("/proc/self/clear_refs").write_text("5")
        self._batch = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])

    def feed(self, images: Path, batch: int, warmup_s: float) -> tuple[float, float]:
        """Take a batch and warm up; return the ms of the first call and of the fastest."""
        self.take(images, batch)
        start = time.perf_counter()
        for runner in self._runners:
            runner.run_all(self._batch)
        first_ms = 1e3 * (time.perf_counter() - start) / len(self._runners)
        gc.collect()
        gc.freeze()  # what is there now stays: later collections have next to nothing to look at
        return first_ms, min(self._timed(warmup_s, WARM_CALLS))

    def time(self, seconds: float) -> tuple[list[float], float, int]:
        """Return every call's latency in ms, their wall seconds, and the peak memory in bytes."""
        self._timed(REWARM_S, 1)
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        try:
            latencies = self._timed(seconds, 1)
        finally:
            gc.enable()
        return latencies, time.perf_counter() - start, peak_memory_bytes()

    def resident(self, images: Path, batch: int, seconds: float, calls: int) -> Any:
        """Take a batch; return what it takes on the GPU; see :func:`~.gpu.timed`."""
        self.take(images, batch)
        device = self._contender.device
        watch = gpu_watch(device)
        with contextlib.closing(self._runners[0].resident_batch(self._batch)) as held:
            return timed(held, batch, clock_of(held, device), watch, seconds, calls)

    def profile(self) -> Any:
        """Return the time of the batch by kind of layer."""
        return profile_of(self._contender, self._runners[0], self._batch)

    def ceilings(self, **given: Any) -> Any:
        """Return what the device itself can do; it needs no contender."""
        return measured_ceilings(**given)

    def _timed(self, seconds: float, calls: int) -> list[float]:
        """Return the ms of each call, until the seconds have passed and the calls were made.

        Each stream has a thread of its own, and they begin together.
        """
        together = threading.Barrier(len(self._runners))

        def run(runner: Any) -> list[float]:
            latencies: list[float] = []
            together.wait()
            start = previous = time.perf_counter()
            while previous - start < seconds or len(latencies) < calls:
                runner.run_all(self._batch)
                now = time.perf_counter()
                latencies.append(1e3 * (now - previous))
                previous = now
            return latencies

        if len(self._runners) == 1:  # needs no thread
            return run(self._runners[0])
        with ThreadPoolExecutor(len(self._runners)) as pool:
            return [ms for stream in pool.map(run, self._runners) for ms in stream]


def serve(handle: int) -> None:
    """Answer the requests of a pipe until there are no more, or the parent is gone."""
    if sys.platform == "linux":  # the kernel kills it with its parent, even while it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    worker, pipe = Worker(), Connection(handle)
    with worker.opened, contextlib.suppress(EOFError):
        while True:
            pipe.send(worker.answer(*pipe.recv()))
