"""The process of one contender, suspended between requests.

The process reads requests from a pipe, each the name of a method of :class:`Worker` and its
arguments, and sends back the result. Its parent suspends it between two requests, so that none of
its threads can spin.
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

from van_deploy.bench.contenders import create_runner
from van_deploy.bench.document import Contender
from van_deploy.bench.gpu import gpu_monitor, time_resident, timer_for
from van_deploy.bench.profile import profile_contender
from van_deploy.bench.roofline import measure_ceilings
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import VanDeployError, is_out_of_memory

# Longer than any compilation of a VAN; a worker that takes longer hangs.
REQUEST_TIMEOUT_S = 900.0

# Disables malloc trimming in glibc. Otherwise it returns large blocks to the system and requests
# them again page by page at the next call, which takes a third of eager PyTorch's time. See
# mallopt(3). Other C libraries ignore these variables; values that the user set have priority.
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}

SERVER_CODE = "from van_deploy.bench.worker import serve; serve({})"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

PR_SET_PDEATHSIG = 1
# Unmeasured seconds after a process is resumed, in which its threads start and its weights return
# to the caches. The first measured call then takes as long as the following ones.
REWARM_S = 0.02

WARM_CALLS = 3  # the fastest of them estimates the time of a call


class WorkerError(VanDeployError):
    """A worker returned an error."""


class WorkerExitError(WorkerError):
    """A worker's process exited or hung."""


class WorkerProcess:
    """A process that handles requests and is suspended between them; use it as a context manager.

    Args:
        threads: threads of its runtime, over all streams; also set in its environment.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> WorkerProcess:
        """Start the process."""
        pools = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self._pipe, child = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER_CODE.format(child.fileno())],
            pass_fds=[child.fileno()],
            env={**MALLOC_SETTINGS, **os.environ, **pools},
            **quiet,
        )
        child.close()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process."""
        self.process.kill()  # also ends a suspended process
        self.process.wait()
        self._pipe.close()

    def request(self, method: str, **arguments: Any) -> Any:
        """Resume the process, return the result of one request, and suspend the process again.

        Raises:
            WorkerError: the process returned an error, exited or hung.
        """
        try:
            self.process.send_signal(signal.SIGCONT)
            self._pipe.send((method, arguments))
            if not self._pipe.poll(REQUEST_TIMEOUT_S):
                self.process.kill()
                raise WorkerExitError(f"no result within {REQUEST_TIMEOUT_S:.0f} s")
            result = self._pipe.recv()
        except (OSError, EOFError):
            code = self.process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            memory = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            raise WorkerExitError(f"{how} during '{method}'{memory}") from None
        self.process.send_signal(signal.SIGSTOP)
        if isinstance(result, WorkerError):
            raise result
        return result


class Worker:
    """Handler of requests: one contender with a runner for each stream."""

    def __init__(self) -> None:
        self.opened = contextlib.ExitStack()
        self._runners: list[Any] = []

    def handle(self, method: str, arguments: dict[str, Any]) -> Any:
        """Return the result of a method, or a :class:`WorkerError` for the user."""
        try:
            return getattr(self, method)(**arguments)
        except VanDeployError as error:
            return WorkerError(error.message, error.remedy)
        except Exception as error:
            if is_out_of_memory(error):
                return WorkerError("out of memory", "Use a smaller batch.")
            text = str(error).strip() or type(error).__name__
            return WorkerError(text.splitlines()[0][:300])

    def load(self, contender: Contender, threads: int, streams: int) -> float:
        """Open a runner of the contender for each stream; return the seconds it took."""
        start, self._contender = time.perf_counter(), contender
        for _ in range(streams):
            runner = create_runner(contender, max(1, threads // streams))
            self._runners.append(self.opened.enter_context(runner))
        return time.perf_counter() - start

    def load_batch(self, images: Path, batch: int) -> None:
        """Load the first ``batch`` images of a file, and reset the peak of resident memory."""
        with contextlib.suppress(OSError):  # not permitted: the peak then includes loading
            Path("/proc/self/clear_refs").write_text("5")
        self._batch = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])

    def warm_up(self, images: Path, batch: int, warmup_s: float) -> tuple[float, float]:
        """Load a batch and warm up; return the ms of the first call and of the fastest."""
        self.load_batch(images, batch)
        start = time.perf_counter()
        for runner in self._runners:
            runner.run_all(self._batch)
        first_ms = 1e3 * (time.perf_counter() - start) / len(self._runners)
        gc.collect()
        gc.freeze()  # later collections skip the objects that exist now
        return first_ms, min(self._time_calls(warmup_s, WARM_CALLS))

    def time_calls(self, seconds: float) -> tuple[list[float], float, int]:
        """Return the latency of each call in ms, their wall seconds, and peak memory in bytes."""
        self._time_calls(REWARM_S, 1)
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        try:
            latencies = self._time_calls(seconds, 1)
        finally:
            gc.enable()
        return latencies, time.perf_counter() - start, peak_memory_bytes()

    def time_resident(self, images: Path, batch: int, seconds: float, calls: int) -> Any:
        """Load a batch and time it with buffers on the GPU; see :func:`~.gpu.time_resident`."""
        self.load_batch(images, batch)
        device = self._contender.device
        with contextlib.closing(self._runners[0].resident_batch(self._batch)) as resident:
            timer = timer_for(resident, device)
            return time_resident(resident, batch, timer, gpu_monitor(device), seconds, calls)

    def profile(self) -> Any:
        """Return the time of the batch by kind of layer."""
        return profile_contender(self._contender, self._runners[0], self._batch)

    ceilings = staticmethod(measure_ceilings)  # of the device; no contender is needed

    def _time_calls(self, seconds: float, calls: int) -> list[float]:
        """Return the ms of each call, for at least ``seconds`` and ``calls``.

        Each stream has its own thread; all start at the same time.
        """
        barrier = threading.Barrier(len(self._runners))

        def run(runner: Any) -> list[float]:
            latencies: list[float] = []
            barrier.wait()
            start = previous = time.perf_counter()
            while previous - start < seconds or len(latencies) < calls:
                runner.run_all(self._batch)
                now = time.perf_counter()
                latencies.append(1e3 * (now - previous))
                previous = now
            return latencies

        if len(self._runners) == 1:
            return run(self._runners[0])
        with ThreadPoolExecutor(len(self._runners)) as pool:
            return [ms for stream in pool.map(run, self._runners) for ms in stream]


def serve(handle: int) -> None:
    """Handle the requests of a pipe until it is closed."""
    if sys.platform == "linux":  # the kernel kills it with its parent, even while suspended
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    worker, pipe = Worker(), Connection(handle)
    with worker.opened, contextlib.suppress(EOFError):
        while True:
            pipe.send(worker.handle(*pipe.recv()))
