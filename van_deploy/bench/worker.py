"""The process that holds one contender. Started by :mod:`van_deploy.bench.process`.

It reads one JSON object a line from stdin and answers each with one. Whatever a
run time prints goes to stderr. Between two requests it is stopped by its
parent, so no thread of it can spin.

=============  ==========================================================
``load``       import the run time and open the contender
``feed``       take a batch of images and make the first call with it
``warm``       call for some seconds, unmeasured
``measure``    call for some seconds and answer with the latencies
``ceilings``   measure what the machine itself can do (needs no contender)
``gauge``      do a fixed piece of work and answer with its time (the same)
=============  ==========================================================
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from van_deploy.bench.contender import Contender
from van_deploy.bench.quiet import Product
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError

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
        self._contender: Contender | None = None
        self._threads = 1
        self._product: Product | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to one request; what a user can act on comes as ``error``."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        handlers: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "feed": self.feed,
            "warm": self.warm,
            "measure": self.measure,
            "ceilings": self.ceilings,
            "gauge": self.gauge,
        }
        try:
            return handlers[request["do"]](**arguments)
        except (VanDeployError, MemoryError, RuntimeError, OSError, ValueError) as error:
            return {"error": _described(error)}

    def load(self, contender: Mapping[str, Any], threads: int, streams: int) -> dict[str, Any]:
        """Open the contender once a stream; answer with the seconds that took."""
        from van_deploy.bench.runtimes import import_runtime, open_contender

        self._contender = Contender(**contender)
        self._threads = threads
        start = time.perf_counter()
        versions = import_runtime(self._contender)
        imported = time.perf_counter()
        before = _rss_bytes("VmRSS")
        each = max(1, threads // streams)
        self._runners = [
            self._open.enter_context(open_contender(self._contender, each)) for _ in range(streams)
        ]
        return {
            "import_s": imported - start,
            "load_s": time.perf_counter() - imported,
            "rss_imported_bytes": before,
            "rss_loaded_bytes": _rss_bytes("VmRSS"),
            "versions": versions,
            "threads_each": each,
        }

    def feed(
        self, images: str, batch: int, preprocessing: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Prepare a batch and make the first call with it; answer with its seconds.

        The peak of resident memory starts afresh here.
        """
        import numpy as np

        if self._contender is None:
            raise ConversionError("The worker was fed before it was loaded.")
        _forget_peak()
        array = np.ascontiguousarray(np.load(images, mmap_mode="r")[:batch])
        prepared = _as_the_graph_takes_it(array, self._contender.embedded, preprocessing)
        self._calls = [runner.prepared(prepared) for runner in self._runners]
        start = time.perf_counter()
        for call in self._calls:
            call()
        took = time.perf_counter() - start
        gc.collect()
        gc.freeze()  # what is there now stays: later collections have next to nothing to look at
        return {"first_call_s": took / len(self._calls)}

    def warm(self, seconds: float, calls: int) -> dict[str, Any]:
        """Call for ``seconds`` and ``calls`` times at least; answer with the fastest's seconds."""
        latencies = self._run_streams(seconds, calls, max(seconds, 60.0))
        return {"call_s": min(map(min, latencies)) / 1e3}

    def measure(self, seconds: float, calls: int, limit_s: float) -> dict[str, Any]:
        """Answer with every call's latency in ms, and the wall seconds of all of them."""
        gc.collect()
        gc.disable()
        cpu, start = time.process_time(), time.perf_counter()
        try:
            latencies = self._run_streams(seconds, calls, limit_s)
        finally:
            gc.enable()
        wall = time.perf_counter() - start
        device = [ms for runner in self._runners for ms in runner.take_device_ms()]
        return {
            "latencies_ms": [ms for stream in latencies for ms in stream[:MOST_SAMPLES]],
            "calls": sum(len(stream) for stream in latencies),
            "wall_s": wall,
            "cpu_s": time.process_time() - cpu,
            "device_ms": device[:MOST_SAMPLES],
            "peak_rss_bytes": _rss_bytes("VmHWM"),
        }

    def ceilings(self, threads: int, seconds: float) -> dict[str, Any]:
        """Answer with the machine's own limits (see :mod:`van_deploy.bench.ceilings`)."""
        from van_deploy.bench.ceilings import measured_ceilings

        return asdict(measured_ceilings(threads, seconds))

    def gauge(self) -> dict[str, Any]:
        """Answer with the milliseconds of a fixed piece of work (:mod:`van_deploy.bench.quiet`)."""
        self._product = self._product or Product()
        return {"ms": self._product.ms()}

    def close(self) -> None:
        """Release everything."""
        self._open.close()

    def _run_streams(self, seconds: float, calls: int, limit_s: float) -> list[list[float]]:
        """Run one thread a stream, the first in this thread; return each one's latencies."""
        results: list[list[float]] = [[] for _ in self._calls]
        failures: list[BaseException] = []

        def run(index: int) -> None:
            try:
                results[index] = timed_calls(self._calls[index], seconds, calls, limit_s)
            except Exception as failure:  # handed to the main thread below
                failures.append(failure)

        others = [threading.Thread(target=run, args=(i,)) for i in range(1, len(self._calls))]
        for thread in others:
            thread.start()
        run(0)
        for thread in others:
            thread.join()
        if failures:
            raise failures[0]
        return results


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


def _rss_bytes(key: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Start the peak of resident memory afresh, where the kernel lets a process do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the whole life of the process


def _die_with_the_parent() -> None:
    """Ask the kernel to kill this process with its parent, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_the_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a run time prints
    serve(sys.stdin, out)
