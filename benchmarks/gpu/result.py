"""What a step of the GPU report writes, and its turns on the machine.

Steps import, compile and tune at the same time. ``with turn():`` asks the report for the
machine, which stops (SIGSTOP) the process groups of all other steps until the block ends.
Outside the report it does nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

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


class Result:
    """Rows, tables, notes and facts of one step; the file is replaced whenever one is added."""

    def __init__(self, path: Path) -> None:
        """Begin with nothing."""
        self.path = path
        self.content: dict[str, Any] = {"rows": [], "tables": {}, "notes": [], "facts": {}}

    def row(self, **values: Any) -> None:
        """Add a row of the big table; see ``page.COLUMNS`` for the names it reads."""
        self.content["rows"].append(values)
        write(self.path, self.content)

    def table(self, title: str, lines: list[Any]) -> None:
        """Add or replace a table: a list of flat dictionaries or data classes."""
        self.content["tables"][title] = lines
        write(self.path, self.content)

    def note(self, text: str) -> None:
        """Add one sentence."""
        self.content["notes"].append(text)
        print(text, flush=True)
        write(self.path, self.content)

    def fact(self, name: str, value: Any) -> None:
        """Add one named value, whatever it is made of."""
        self.content["facts"][name] = value
        write(self.path, self.content)


def write(path: Path, document: Any) -> None:
    """Write a document as JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1, default=_plain), encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
