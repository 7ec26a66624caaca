"""The table of a section, command-line options, and measured commands."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


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

    def print_json(self) -> int:
        """Print the section as JSON; return 0, the exit code."""
        print(json.dumps(asdict(self), indent=1))
        return 0


def parse_options(text: str | None, **defaults: Any) -> argparse.Namespace:
    """Return the options of the command line: ``--skip-b6`` for ``skip_b6=False``.

    Args:
        text: docstring of the module, whose first line describes the command.
        defaults: default value of each option, whose type is that of the option.
    """
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    for name, value in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(value, tuple):
            parser.add_argument(flag, nargs="*", default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=f"default: {value}")
    return parser.parse_args()


def run_van_deploy(*words: object, codes: Sequence[int] = (0,)) -> Any:
    """Run a van-deploy command with ``--json`` in a new process and return its document.

    Raises:
        SystemExit: the exit code is not one of ``codes``.
    """
    command = [sys.executable, "-m", "van_deploy", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command[2:])} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def measure_process(command: Sequence[str]) -> tuple[float, int]:
    """Return the wall seconds and the peak resident bytes of one process.

    Raises:
        SystemExit: the process fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024
