"""Strict reading of untrusted JSON and TOML files, and conversion of results to JSON types.

Manifests, sidecars, recipes and similar files are small: a path must be a regular file
(reading a pipe would block) of limited size. JSON and TOML are parsed more strictly than
by Python: deep nesting is refused, and so is JSON with a repeated key, because two readers
may use different values of it.
"""

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from van_deploy.errors import VanDeployError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


MAX_BYTES = 64 * 2**20  # a calibration set with the names of 100,000 images has 20 MB
MAX_DEPTH = 40  # of nested tables and lists; a manifest has 8
MAX_TEXT_LENGTH = 4096  # characters, as for a path
MAX_LINE_LENGTH = 64 * 2**10  # of TOML: its parser takes quadratic time for dotted keys

# C0 and C1 except tab and newline, and characters that change the text direction.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


class DocumentError(ValueError):
    """A file is invalid; the message is the end of a sentence."""


def require_regular_file(path: Path | int) -> None:
    """Raise unless ``path``, or an open file descriptor, is a regular file.

    Raises:
        DocumentError: it is a pipe, a device or a socket.
        OSError: it does not exist, is a folder, or cannot be accessed.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise DocumentError("it is not a regular file")


def read_text_file(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DocumentError: it is not a regular file, is too large, or is not UTF-8.
        OSError: it cannot be read.
    """

    def open_nonblocking(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", opener=open_nonblocking) as file:
        require_regular_file(file.fileno())
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DocumentError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DocumentError(f"it is not UTF-8: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """Return the JSON in a text or in UTF-8 bytes.

    Raises:
        DocumentError: it is nested too deeply, repeats a key, or has an unpaired surrogate.
        ValueError: it is not JSON.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
        ...
    van_deploy.documents.DocumentError: it has the key 'a' twice
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise DocumentError(f"it has the key {key[:100]!r} twice")
            table[key] = value
        return table

    value = _limit_depth(lambda: json.loads(text, object_pairs_hook=unique))
    if re.search(r"\\u[dD]", text if isinstance(text, str) else text.decode(errors="replace")):
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            surrogate = ascii(error.object[error.start])
            raise DocumentError(f"it has the unpaired surrogate {surrogate}") from None
    return value


def plain(value: object) -> Any:
    """Return ``value`` in JSON types.

    A data class becomes a table of its fields and of :func:`json_properties`; a schema the
    contents of its file; an error of this package its class, message and remedy; a path its
    text. Infinity and NaN become ``"inf"``, ``"-inf"`` and ``"nan"``, which ``float()`` reads.

    Raises:
        TypeError: a value has no JSON form.

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
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


class Verdict:
    """Base of results; true if the result passed."""

    @property
    def passed(self) -> bool:
        """Whether the result passed."""
        raise NotImplementedError

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def is_json_field(field: dataclasses.Field[Any]) -> bool:
    """Return whether a field is in the document: all except those with ``{"json": False}``."""
    return bool(field.metadata.get("json", True))


def json_properties(kind: type) -> tuple[str, ...]:
    """Return the properties of a data class that are in its document.

    They are ``passed``, and those in its ``JSON_PROPERTIES``.
    """
    passed = ("passed",) if isinstance(getattr(kind, "passed", None), property) else ()
    return (*getattr(kind, "JSON_PROPERTIES", ()), *passed)


def read_toml_file(path: Path) -> dict[str, Any]:
    """Return the TOML in a file.

    Raises:
        DocumentError: it is not a regular file, too large, not UTF-8, nested too deeply, or has
            a line longer than :data:`MAX_LINE_LENGTH`.
        tomllib.TOMLDecodeError: it is not TOML; a ValueError too.
        OSError: it cannot be read.
    """
    text = read_text_file(path)
    longest = max(map(len, text.splitlines()), default=0)
    if longest > MAX_LINE_LENGTH:
        raise DocumentError(f"it has a line of {longest:,} characters")
    tables: dict[str, Any] = _limit_depth(lambda: tomllib.loads(text))
    return tables


def _limit_depth(read: Callable[[], Any]) -> Any:
    """Return the result of ``read`` if its nesting is within :data:`MAX_DEPTH`."""
    with contextlib.suppress(RecursionError):
        value = read()
        if _depth(value) <= MAX_DEPTH:
            return value
    raise DocumentError(f"it is nested more than {MAX_DEPTH} deep")


def _depth(value: Any) -> int:
    """Return the number of lists and tables around the innermost one."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max((1 + _depth(one) for one in inner if isinstance(one, dict | list)), default=0)


def limit_lines(lines: Sequence[str], count: int) -> list[str]:
    """Return the first lines, and the number of the others as a last line."""
    return [*lines[:count], *[f"and {len(lines) - count:,} more"] * (len(lines) > count)]
