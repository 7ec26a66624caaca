"""A contender in a process of its own, stopped whenever it is not asked something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing import Pipe
from typing import Any

from van_deploy.errors import VanDeployError

ANSWER_WITHIN_S = 900.0
"""Longer than any compilation of a VAN; past it a worker hangs."""

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Tells glibc to keep what a process frees. It gives large blocks back to the system otherwise,
and takes them again page by page at the next call: so eager PyTorch spends a third of its time.
See mallopt(3). Other C libraries ignore it; who sets these variables is not overruled."""

ONE_THREAD_POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(VanDeployError):
    """A worker answered with an error, or died.

    Attributes:
        kind: ``memory``, ``missing``, ``failed``, ``killed`` or ``batch``.
    """

    def __init__(self, message: str, remedy: str = "", kind: str = "failed") -> None:
        super().__init__(message, remedy)
        self.kind = kind


class WorkerProcess:
    """A process that answers :meth:`ask`, and sleeps otherwise. Open it with ``with``.

    Args:
        threads: how many its runtime may use; set in its environment too.
        keeps_memory: keep what it frees (see :data:`KEEP_MEMORY`).

    Attributes:
        pid: the process's number.
    """

    def __init__(self, threads: int, *, keeps_memory: bool = True) -> None:
        self.threads, self.pid = threads, 0
        self._memory = KEEP_MEMORY if keeps_memory else {}

    def __enter__(self) -> WorkerProcess:
        """Start the process."""
        pools = dict.fromkeys(ONE_THREAD_POOLS, str(self.threads))
        self._printed = tempfile.TemporaryFile()
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "van_deploy.bench.worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            env={**self._memory, **os.environ, **pools},
        )
        theirs.close()
        self.pid = self._process.pid
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()  # also ends a stopped process
        self._process.wait()
        self._pipe.close()
        self._printed.close()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Wake the process, return its answer to one request, and stop it again.

        Raises:
            WorkerError: it answered with an error, died or hung.
        """
        try:
            self._process.send_signal(signal.SIGCONT)
            self._pipe.send((do, arguments))
            if not self._pipe.poll(ANSWER_WITHIN_S):
                self._process.kill()
                raise WorkerError(f"no answer within {ANSWER_WITHIN_S:.0f} s")
            answer = self._pipe.recv()
        except (OSError, EOFError):
            raise self._died(do) from None
        self._process.send_signal(signal.SIGSTOP)
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def _died(self, do: str) -> WorkerError:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            memory = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            return WorkerError(f"killed by {name} during '{do}'{memory}", kind="killed")
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").strip().splitlines()
        words = lines[-1][:300] if lines else "without a word"
        return WorkerError(f"ended with code {code} during '{do}': {words}", kind="killed")
