"""Answers on disk while an evaluation runs, so that an interrupted one can go on.

One JSON document a line, written through to the disk before the next batch
begins. The first line says what is evaluated; a journal of anything else is
not gone on with. A line that was cut off by a crash does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from van_deploy.errors import InputError
from van_deploy.files import write_atomic

__all__ = ["Journal"]


class Journal:
    """The answers so far. A context manager; remove it with :meth:`finish` at the end.

    Args:
        path: the file.
        key: digest of everything that decides the answers.
        resume: go on with what is there; else begin anew.

    Raises:
        InputError: it is the journal of another evaluation.
    """

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path, self.key = path, key
        self.entries: list[dict[str, Any]] = []
        self._file: IO[str] | None = None
        if resume and path.exists():
            self.entries = list(self._read())
        text = "".join(f"{json.dumps(entry)}\n" for entry in ({"key": key}, *self.entries))
        write_atomic(path, text)  # without a torn line, so that what follows begins on its own

    def _read(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                return  # cut off by a crash; nothing behind it counts
            if number:
                yield entry
            elif entry.get("key") != self.key:
                raise InputError(
                    f"The journal '{self.path}' is of another evaluation: "
                    "other artefacts, images or labels.",
                    "Leave out --resume to begin anew, or give another --journal FILE.",
                )

    def __enter__(self) -> Journal:
        """Open the file for more."""
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; the answers stay."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def append(self, entry: dict[str, Any]) -> None:
        """Write one batch of answers through to the disk."""
        if self._file is None:
            raise RuntimeError("the journal is not open")
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Remove the file: the evaluation has ended well."""
        self.path.unlink(missing_ok=True)
