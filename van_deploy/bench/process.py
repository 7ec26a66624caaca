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
from contextlib import ExitStack
from typing import Any

from van_deploy.errors import VanDeployError

__all__ = ["KEEP_MEMORY", "WorkerError", "WorkerProcess"]

ANSWER_WITHIN_S = 900.0
"""Longer than any compilation of a VAN; past it a worker hangs."""

CAN_STOP = hasattr(signal, "SIGSTOP")
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

    def __init__(self, kind: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.kind = kind


class WorkerProcess:
    """A process that answers :meth:`ask`, and sleeps otherwise. Open it with ``with``.

    Args:
        threads: how many its runtime may use; set in its environment too.
        keeps_memory: keep what it frees (see :data:`KEEP_MEMORY`).
    """

    def __init__(self, threads: int, *, keeps_memory: bool = True) -> None:
        self.threads = threads
        self._memory = KEEP_MEMORY if keeps_memory else {}
        self._stack = ExitStack()

    def __enter__(self) -> WorkerProcess:
        """Start the process."""
        pools = dict.fromkeys(ONE_THREAD_POOLS, str(self.threads))
        self._errors = self._stack.enter_context(tempfile.TemporaryFile())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "van_deploy.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**self._memory, **os.environ, **pools},
        )
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()  # also ends a stopped process
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self._stack.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Wake the process, return its answer to one request, and stop it again.

        Raises:
            WorkerError: it answered with an error, died or hung.
        """
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._send("SIGCONT")
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            line = self._line()
        if not line:
            raise self._died(do)
        self._send("SIGSTOP")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(**answer["error"])
        return answer

    def _line(self) -> str:
        stdout = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            if not selector.select(ANSWER_WITHIN_S):
                self._process.kill()
                raise WorkerError("failed", f"no answer within {ANSWER_WITHIN_S:.0f} s")
            return stdout.readline()  # type: ignore[union-attr]

    def _send(self, name: str) -> None:
        if CAN_STOP and self._process.poll() is None:
            self._process.send_signal(signal.Signals[name])

    def _died(self, do: str) -> WorkerError:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            memory = "; the system may have run out of memory" if -code == 9 else ""
            return WorkerError("killed", f"killed by {name} during '{do}'{memory}")
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        words = lines[-1][:300] if lines else "without a word"
        return WorkerError("killed", f"ended with code {code} during '{do}': {words}")
