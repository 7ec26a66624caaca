"""Text files that somebody else wrote: read whole, and strictly.

Manifests, sidecars, recipes and the like are small. So each is first made sure to be a
file (a pipe would be waited for) of a size such files have. JSON and TOML are taken more
strictly than Python's readers do it: what is nested deeper than any of these files is
refused, and so is JSON that gives a key twice, of which two readers may believe
different ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from van_deploy.errors import VanDeployError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


LARGEST_BYTES = 64 * 2**20  # a calibration set that names 100,000 images has 20 MB
MAX_DEPTH = 40  # a manifest has 8
MAX_TEXT_LENGTH = 4096  # characters; a path has no more
MAX_LINE_LENGTH = 64 * 2**10  # of TOML, whose reader takes squared time over dotted keys

# C0 and C1 but tab and newline, and what turns the direction of writing round.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class DocumentError(ValueError):
    """A file is not what it should be; the message says what it is, as the end of a sentence."""


def require_regular_file(path: Path | int) -> None:
    """Return if ``path``, or an open handle, is a file rather than a pipe or a device.

    Raises:
        DocumentError: it is something else.
        OSError: there is nothing, a folder, or what may not be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise DocumentError("it is no regular file")


def read_text_file(path: Path, largest_bytes: int = LARGEST_BYTES) -> str:
    """Return the text of a file.

    Raises:
        DocumentError: it is no file, is too large, or is not UTF-8.
        OSError: it cannot be read.
    """

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=without_waiting) as file:
        require_regular_file(file.fileno())
        content = file.read(largest_bytes + 1)
    if len(content) > largest_bytes:
        raise DocumentError(f"it has more than {largest_bytes:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is not UTF-8: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """Return the JSON in ``text``, which is UTF-8 where it is bytes.

    Raises:
        DocumentError: it is nested too deeply, gives a key twice, or spells half a character.
        ValueError: it is not JSON.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
        ...
    van_deploy.documents.DocumentError: it gives the key 'a' twice
    """

    def once(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DocumentError(f"it gives the key {twice[:100]!r} twice")
        return found

    value = _not_deep(lambda: json.loads(text, object_pairs_hook=once))
    if re.search(r"\\u[dD]", text if isinstance(text, str) else text.decode(errors="replace")):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise DocumentError(f"it spells {half}, half a character") from None
    return value


def plain(value: object) -> Any:
    """Return ``value`` in the types JSON has.

    A data class becomes its fields, and the properties that :func:`json_properties` names;
    a schema what its file holds; an error of ours its kind, message and remedy; a path its
    text. Numbers that JSON cannot spell become ``"inf"``, ``"-inf"`` and ``"nan"``, which
    ``float()`` reads.

    Raises:
        TypeError: it holds something that has no plain form.

    >>> plain({"sqnr_db": math.inf, "shape": (1, 3), "path": Path("a/b")})
    {'sqnr_db': 'inf', 'shape': [1, 3], 'path': 'a/b'}
    """
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if is_json_field(field)]
        return {n: plain(getattr(value, n)) for n in (*names, *json_properties(type(value)))}
    if isinstance(value, VanDeployError):
        return {"kind": type(value).__name__, "message": value.message, "remedy": value.remedy}
    if hasattr(value, "model_dump"):  # a Schema
        return plain(value.model_dump(by_alias=True))
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no plain form: {value!r}")


class Verdict:
    """A result that is true if it passed."""

    @property
    def passed(self) -> bool:
        """Whether it passed."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def is_json_field(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field belongs to the document, as all but ``{"json": False}`` do."""
    return bool(field.metadata.get("json", True))


def json_properties(kind: type) -> tuple[str, ...]:
    """Return the properties of a data class that belong to its document.

    They are ``passed``, and those that its ``JSON_PROPERTIES`` names.
    """
    passed = ("passed",) if isinstance(getattr(kind, "passed", None), property) else ()
    return (*getattr(kind, "JSON_PROPERTIES", ()), *passed)


def read_toml_file(path: Path) -> dict[str, Any]:
    """Return the TOML in a file.

    Raises:
        DocumentError: it is no file, too large, not UTF-8, nested too deeply, or has a line
            longer than any that a person wrote.
        tomllib.TOMLDecodeError: it is not TOML; a ValueError too.
        OSError: it cannot be read.
    """
    text = read_text_file(path)
    longest = max(map(len, text.splitlines()), default=0)
    if longest > MAX_LINE_LENGTH:
        raise DocumentError(f"it has a line of {longest:,} characters")
    tables: dict[str, Any] = _not_deep(lambda: tomllib.loads(text))
    return tables


def _not_deep(read: Callable[[], Any]) -> Any:
    """Return what ``read`` returns unless lists and tables are too deep in one another."""
    with contextlib.suppress(RecursionError):
        value = read()
        if _depth(value) <= MAX_DEPTH:
            return value
    raise DocumentError(f"it is nested more than {MAX_DEPTH} deep")


def _depth(value: Any) -> int:
    """Return how many lists and tables are around the innermost one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((1 + _depth(one) for one in inner if isinstance(one, dict | list)), default=0)
