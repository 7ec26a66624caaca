"""The process that holds one contender. Started by :mod:`van_deploy.bench.process`.

It reads one JSON object a line from stdin and answers each with one. Whatever a
runtime prints goes to stderr. Between two requests it is stopped by its
parent, so no thread of it can spin.

=============  ==========================================================
``load``       import the runtime and open the contender
``feed``       take a batch of images and make the first call with it
``time``       call for some seconds and answer with the latencies
``resident``   time a batch that stays on the GPU (:mod:`van_deploy.bench.gpu`)
``profile``    answer with the time by kind of layer (:mod:`van_deploy.bench.profile`)
``ceilings``   measure what the device itself can do (needs no contender)
=============  ==========================================================
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from van_deploy.bench.contender import Contender
from van_deploy.bench.runtimes import import_runtime, runner_of
from van_deploy.environment.hardware import peak_memory_bytes
from van_deploy.errors import MissingDependency, VanDeployError

__all__ = ["Worker", "serve", "timed_calls"]

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "failed to allocate")
MOST_SAMPLES = 20_000  # latencies a reply holds at most, per stream
Call = Callable[[], object]


class Worker:
    """One contender, opened once (or once a stream), answering requests."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._runners: list[Any] = []
        self._calls: list[Call] = []
        self._contender = Contender("", "", "")
        self._batch: Any = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request; what a user can act on comes as ``error``."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "feed": self.feed,
            "time": self.time,
            "resident": self.resident,
            "profile": self.profile,
            "ceilings": self.ceilings,
        }
        try:
            return handlers[request["do"]](**arguments)
        except (VanDeployError, MemoryError, RuntimeError, OSError, ValueError) as error:
            return {"error": _described(error)}

    def load(self, contender: Mapping[str, Any], threads: int, streams: int) -> dict[str, Any]:
        """Open the contender once a stream; answer with the seconds that took."""
        self._contender = Contender(**contender)
        start = time.perf_counter()
        import_runtime(self._contender.runtime)
        imported, before = time.perf_counter(), _memory_bytes()
        each = max(1, threads // streams)
        self._runners = [
            self._open.enter_context(runner_of(self._contender, each)) for _ in range(streams)
        ]
        return {
            "import_s": imported - start,
            "load_s": time.perf_counter() - imported,
            "rss_imported_bytes": before,
            "rss_loaded_bytes": _memory_bytes(),
            "threads_each": each,
        }

    def feed(
        self, images: str, batch: int, preprocessing: Mapping[str, Any] | None, calls: bool = True
    ) -> dict[str, Any]:
        """Prepare a batch and make the first call with it, if ``calls``; answer with its seconds.

        The peak of resident memory starts afresh here.
        """
        import numpy as np

        _forget_peak()
        array = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])
        embedded = self._contender.embedded
        self._batch = given = _as_the_graph_takes_it(array, embedded, preprocessing)
        if not calls:
            return {}
        runs = [r.run if embedded == "none" else r.run_all for r in self._runners]
        self._calls = [lambda run=run: run(given) for run in runs]  # type: ignore[misc]
        start = time.perf_counter()
        for call in self._calls:
            call()
        took = time.perf_counter() - start
        gc.collect()
        gc.freeze()  # what is there now stays: later collections have next to nothing to look at
        return {"first_call_s": took / len(self._calls)}

    def time(self, seconds: float, calls: int, limit_s: float) -> dict[str, Any]:
        """Answer with every call's latency in ms, and the wall seconds of all of them."""
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        try:
            latencies = self._run_streams(seconds, calls, limit_s)
        finally:
            gc.enable()
        return {
            "latencies_ms": [ms for stream in latencies for ms in stream[:MOST_SAMPLES]],
            "calls": sum(len(stream) for stream in latencies),
            "wall_s": time.perf_counter() - start,
            "peak_rss_bytes": peak_memory_bytes(),
        }

    def resident(self, batch: int, seconds: float, calls: int) -> dict[str, Any]:
        """Answer with what the batch takes on the GPU; see :func:`~.gpu.timed`."""
        from van_deploy.bench.gpu import clock_of, timed
        from van_deploy.bench.gpu_state import GpuWatch

        device = self._contender.device
        watch = GpuWatch(device)
        held = self._runners[0].resident(self._batch)
        try:
            clock = clock_of(held, device)
            timing = timed(held, batch, clock, watch, seconds=seconds, calls=calls)
        finally:
            held.close()
        return asdict(timing)

    def profile(self) -> dict[str, Any]:
        """Answer with the time of the batch by kind of layer."""
        from van_deploy.bench.profile import profile_of

        lines = profile_of(self._contender, self._runners[0], self._batch)
        return {"lines": [asdict(line) for line in lines]}

    def ceilings(self, threads: int, seconds: float, device: str) -> dict[str, Any]:
        """Answer with the device's own limits (see :mod:`van_deploy.bench.ceilings`)."""
        from van_deploy.bench.ceilings import measured_ceilings

        return asdict(measured_ceilings(device, threads, seconds))

    def close(self) -> None:
        """Release everything."""
        self._open.close()

    def _run_streams(self, seconds: float, calls: int, limit_s: float) -> list[list[float]]:
        """Run one thread a stream; return each one's latencies. One stream needs no thread."""
        if len(self._calls) == 1:
            return [timed_calls(self._calls[0], seconds, calls, limit_s)]
        together = threading.Barrier(len(self._calls))

        def run(call: Call) -> list[float]:
            together.wait()
            return timed_calls(call, seconds, calls, limit_s)

        with ThreadPoolExecutor(len(self._calls)) as pool:
            return list(pool.map(run, self._calls))


def timed_calls(call: Call, seconds: float, calls: int, limit_s: float) -> list[float]:
    """Return the milliseconds of each call.

    Stops once ``seconds`` have passed and ``calls`` were made, or after
    ``limit_s`` seconds, whichever is first; never without one call.
    """
    latencies: list[float] = []
    start = previous = time.perf_counter()
    while True:
        call()
        now = time.perf_counter()
        latencies.append(1e3 * (now - previous))
        enough = now - start >= seconds and len(latencies) >= calls
        if enough or now - start >= limit_s:
            return latencies
        previous = time.perf_counter()


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    worker = Worker()
    try:
        for line in requests:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            answers.flush()
    finally:
        worker.close()


def _as_the_graph_takes_it(
    images: Any, embedded: str, preprocessing: Mapping[str, Any] | None
) -> Any:
    """Return normalised images as a graph with embedded preprocessing takes them."""
    if embedded == "none" or preprocessing is None:
        return images
    import numpy as np

    shape = (1, -1, 1, 1)
    mean, std = (np.array(preprocessing[k], np.float32).reshape(shape) for k in ("mean", "std"))
    values = np.clip(images * std + mean, 0, 1)
    if embedded == "normalize":
        return np.ascontiguousarray(values, np.float32)
    return np.ascontiguousarray(np.rint(255 * values).astype(np.uint8).transpose(0, 2, 3, 1))


def _described(error: BaseException) -> dict[str, str]:
    """Return an error as plain text, and whether it was memory that ran out."""
    text = str(error).strip() or type(error).__name__
    lowered = text.lower()
    if isinstance(error, MemoryError) or any(sign in lowered for sign in OUT_OF_MEMORY):
        return {"kind": "memory", "message": "out of memory", "remedy": "Use a smaller batch."}
    kind = "missing" if isinstance(error, MissingDependency) else "failed"
    if isinstance(error, VanDeployError):
        return {"kind": kind, "message": error.message, "remedy": error.remedy}
    return {"kind": kind, "message": text.splitlines()[0][:300], "remedy": ""}


def _memory_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _forget_peak() -> None:
    """Start the peak of resident memory afresh, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the whole life of the process


if __name__ == "__main__":
    if sys.platform == "linux":  # the kernel kills it with its parent, even while it is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a runtime prints
    serve(sys.stdin, out)
