"""A contender in a process of its own, stopped whenever it is not asked something."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any

from van_deploy.errors import VanDeployError

__all__ = ["KEEP_MEMORY", "WorkerError", "WorkerProcess"]

ANSWER_WITHIN_S = 900.0
"""Longer than any compilation of a VAN; past it a worker hangs."""

CAN_STOP = hasattr(signal, "SIGSTOP")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Tells glibc to keep what a process frees. It gives large blocks back to the system otherwise,
and takes them again page by page at the next call: so eager PyTorch spends a third of its time,
more or less by how each process's memory happens to lie (``python benchmarks/processes.py``).
See mallopt(3). Other C libraries ignore it; who sets these variables is not overruled."""

ONE_THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(VanDeployError):
    """A worker answered with an error, or died.

    Attributes:
        kind: ``memory``, ``missing``, ``failed`` or ``killed``.
    """

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.kind = kind


class WorkerProcess:
    """A process that answers :meth:`ask`, and sleeps otherwise. Open it with ``with``.

    Args:
        threads: how many its run time may use; set in its environment too.
        environment: further variables for it.
        keeps_memory: keep what it frees (see :data:`KEEP_MEMORY`).

    Attributes:
        busy_s: seconds it has spent answering.
    """

    def __init__(
        self,
        threads: int,
        environment: Mapping[str, str] | None = None,
        *,
        keeps_memory: bool = True,
    ) -> None:
        self.threads = threads
        self.busy_s = 0.0
        self._memory = KEEP_MEMORY if keeps_memory else {}
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> WorkerProcess:
        """Start the process."""
        pools = dict.fromkeys(ONE_THREAD_POOLS, str(self.threads))
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "van_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**self._memory, **os.environ, **pools, **self._environment},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, whatever it is doing."""
        process = self._process
        if process is not None:
            process.kill()  # also ends a stopped process
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if self._errors is not None:
            self._errors.close()
        self._process = None

    @property
    def pid(self) -> int:
        """The process's number, 0 before it was started."""
        return self._process.pid if self._process else 0

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Wake the process, return its answer to one request, and stop it again.

        Raises:
            WorkerError: it answered with an error, died or hung.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerError("failed", "The worker was asked before it was started.")
        start = time.perf_counter()
        try:
            self._wake(process)
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = ""
        finally:
            self.busy_s += time.perf_counter() - start
        if not line:
            raise self._died(process, do)
        self._sleep(process)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(**answer["error"])
        return answer

    def _line(self, process: subprocess.Popen[str]) -> str:
        with selectors.DefaultSelector() as selector:
            if process.stdout is None:
                return ""
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(ANSWER_WITHIN_S):
                process.kill()
                process.wait()
                raise WorkerError("failed", f"no answer within {ANSWER_WITHIN_S:.0f} s")
            return process.stdout.readline()

    def _wake(self, process: subprocess.Popen[str]) -> None:
        if CAN_STOP and process.poll() is None:
            process.send_signal(signal.SIGCONT)

    def _sleep(self, process: subprocess.Popen[str]) -> None:
        if CAN_STOP and process.poll() is None:
            process.send_signal(signal.SIGSTOP)

    def _died(self, process: subprocess.Popen[str], do: str) -> WorkerError:
        code = process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            memory = "; the system may have run out of memory" if -code == 9 else ""
            return WorkerError("killed", f"killed by {name} during '{do}'{memory}")
        return WorkerError("killed", f"ended with code {code} during '{do}': {self._last_words()}")

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a word"
