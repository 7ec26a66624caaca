"""What a step of the GPU report writes: one JSON file, whole after every row."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


class Result:
    """Rows, tables and notes of one step; the file is replaced whenever one is added.

    Args:
        path: the file; None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        """See the class."""
        self.path = path
        self.content: dict[str, Any] = {"rows": [], "tables": {}, "notes": [], "facts": {}}

    def row(self, **values: Any) -> None:
        """Add a row of the big table; see ``page.COLUMNS`` for the names it reads."""
        self.content["rows"].append(values)
        self._write()

    def table(self, title: str, lines: list[Any]) -> None:
        """Add a table: a list of flat dictionaries or data classes."""
        self.content["tables"][title] = lines
        self._write()

    def note(self, text: str) -> None:
        """Add one sentence."""
        self.content["notes"].append(text)
        print(text, flush=True)
        self._write()

    def fact(self, name: str, value: Any) -> None:
        """Add one named value, whatever it is made of."""
        self.content["facts"][name] = value
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(plain(self.content), indent=1), encoding="utf-8")
        part.replace(self.path)


def plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: no data classes, no infinities."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
