"""What every section is made of: a table with claims and notes, and commands that are measured."""

from __future__ import annotations

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
    """One section of the page; rows and claims go to stderr as they are known.

    Attributes:
        columns: headings, with units.
        rows: cells as text.
        claims: what is promised, what was measured of it, and whether that is enough.
        notes: sentences below the table.
    """

    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    claims: list[dict[str, object]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, *cells: object) -> None:
        """Add a row."""
        self.rows.append([str(cell) for cell in cells])
        print("  ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def claim(self, text: str, measured: str, met: bool) -> None:
        """Add a claim."""
        self.claims.append({"claim": text, "measured": measured, "met": bool(met)})
        print(f"{'met' if met else 'MISSED'}: {text}: {measured}", file=sys.stderr, flush=True)

    def printed(self) -> int:
        """Print the section as JSON; return 1 if a claim is missed."""
        print(json.dumps(asdict(self), indent=1))
        return int(not all(claim["met"] for claim in self.claims))


def van_deploy(*words: object, codes: Sequence[int] = (0,)) -> Any:
    """Run a command with ``--json`` in a process of its own and return its document.

    Raises:
        SystemExit: it ends with another code than one of ``codes``.
    """
    command = [sys.executable, "-m", "van_deploy", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command[2:])} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def process_cost(command: Sequence[str]) -> tuple[float, int]:
    """Return wall seconds and peak resident bytes of one process.

    Raises:
        SystemExit: it fails.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024
