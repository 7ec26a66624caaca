"""The table of a section, and processes that are measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent


@dataclass
class Table:
    """One section of the page; each row is also printed to stderr when it is added.

    Attributes:
        columns: headings, with units.
        rows: cells as text.
        notes: sentences below the table.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, *cells: object) -> None:
        """Add a row; missing cells are empty."""
        empty = [""] * (len(self.columns) - len(cells))
        self.rows.append([str(cell) for cell in (*cells, *empty)])
        print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)


def measure_process(
    command: Sequence[str],
    codes: Sequence[int] = (0,),
    stdout: IO[bytes] | int = subprocess.DEVNULL,
) -> tuple[float, int]:
    """Run a process and return its wall seconds and its peak resident bytes.

    Raises:
        RuntimeError: the exit code is not one of ``codes``.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=stdout, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in codes:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run_van_deploy(*words: object, codes: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a van-deploy command with ``--json``; return its document with ``peak_bytes``.

    Raises:
        RuntimeError: the exit code is not one of ``codes``.
    """
    command = [sys.executable, "-m", "van_deploy", *map(str, words), "--json"]
    with tempfile.TemporaryFile() as file:
        _, peak_bytes = measure_process(command, codes, file)
        file.seek(0)
        return {**json.load(file), "peak_bytes": peak_bytes}


def run_in_process(function: Callable[..., Any], *arguments: Any, **values: Any) -> Any:
    """Return the result of a function that runs in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **values).result()
