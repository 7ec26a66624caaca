"""Turns: while one step of the report times something, every other step is stopped.

Steps import, compile and tune at the same time. ``with turn():`` asks the report for the
machine, which stops (SIGSTOP) the process groups of all other steps until the block ends.
Outside the report it does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

REQUEST, DONE, GO = "@turn", "@done", "@go"
VARIABLE = "VAN_GPU_REPORT_TURNS"


@contextmanager
def turn() -> Iterator[None]:
    """Hold the machine alone inside the block."""
    if VARIABLE not in os.environ:
        yield
        return
    print(REQUEST, flush=True)
    while (line := sys.stdin.readline()) and line.strip() != GO:
        pass
    try:
        yield
    finally:
        print(DONE, flush=True)
