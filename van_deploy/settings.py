"""TOML files read into frozen dataclasses, every key and every value checked.

A mistake is reported with the file and the key. A :class:`~pathlib.Path` is relative
to the file it is written in.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from van_deploy.documents import DocumentError, toml_from
from van_deploy.errors import RecipeError, UsageError

__all__ = ["read_settings"]

Settings = typing.TypeVar("Settings")


def read_settings(kind: type[Settings], path: Path, what: str) -> Settings:
    """Return the frozen dataclass ``kind`` filled from a TOML file, every key checked.

    Args:
        kind: its fields are the file's keys, those that are dataclasses its tables.
        path: the file.
        what: what errors call it, such as ``recipe``.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is
            not of its kind; names the file and the key.
    """
    try:
        tables = toml_from(path)
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"The {what} '{path}' cannot be read: {reason}.", "Check the path."
        ) from error
    except ValueError as error:
        raise RecipeError(
            f"The {what} '{path}' is not TOML: {error}.", "Mend the line it names."
        ) from error
    return typing.cast("Settings", _table(kind, tables, str(path), ""))


def _table(kind: type, values: Mapping[str, Any], file: str, key: str) -> object:
    """Return the dataclass ``kind`` filled from one table."""
    if not isinstance(values, Mapping):
        raise _wrong(file, key, "a table", values)
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        raise RecipeError(
            f"'{file}' has an unknown key '{key}{unknown[0][:100]}'.",
            f"Did you mean '{key}{near[0]}'?" if near else f"Known keys: {', '.join(hints)}.",
        )
    read = {name: _value(hints[name], value, file, key + name) for name, value in values.items()}
    try:
        return kind(**read)
    except UsageError as error:
        where = f", [{key.rstrip('.')}]" if key else ""
        raise RecipeError(f"'{file}'{where}: {error.message}", error.remedy) from None


def _value(kind: Any, value: object, file: str, key: str) -> object:
    """Return ``value`` as the type a dataclass's field is annotated with."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return _value(next(k for k in inner if k is not type(None)), value, file, key)
    if dataclasses.is_dataclass(kind):
        return _table(typing.cast("type", kind), typing.cast("Any", value), file, f"{key}.")
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(file, key, "a list", value)
        return tuple(_value(inner[0], item, file, key) for item in value)
    if kind is Path:
        if not isinstance(value, str) or not value:
            raise _wrong(file, key, "a path", value)
        return Path(file).parent / value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _wrong(file, key, f"a {kind.__name__}", value)
    return value


def _wrong(file: str, key: str, wanted: str, value: object) -> RecipeError:
    return RecipeError(
        f"'{file}': the key '{key}' must be {wanted}, not {reprlib.repr(value)}.", "Mend it."
    )
