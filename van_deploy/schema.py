"""The base of every document and table of settings, and how a mistake in one is told.

Recipes, options, manifests, sidecars, baselines and calibration sets are pydantic
models derived from :class:`Schema`. Whatever they are filled from (TOML, JSON, the
command line, keyword arguments), a mistake becomes one message from
:func:`validated`: the key, what was given, what it takes, and for an unknown key the
nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic
from pydantic_core import ErrorDetails

from van_deploy.documents import DocumentError, json_from, text_from, toml_from
from van_deploy.errors import InputError, UsageError

__all__ = ["Open", "Schema", "read_json", "read_toml", "validated", "validated_json"]

Model = TypeVar("Model", bound="Schema")

_FAULTS = {
    "missing": "'{key}' is missing",
    "frozen_instance": "'{key}' cannot be changed",
}


class Schema(pydantic.BaseModel):
    """A frozen table whose keys are all known; numbers are finite, and texts are not numbers."""

    model_config = pydantic.ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )


class Open(Schema):
    """A table that others may add keys to; the ones it names are still checked."""

    model_config = pydantic.ConfigDict(extra="allow")


def validated(
    model: type[Model],
    values: Any,
    *,
    where: str = "",
    error: type[InputError] | type[UsageError] = UsageError,
    remedy: str = "",
) -> Model:
    """Return ``model`` filled from ``values``.

    Args:
        model: the schema.
        values: a mapping, as TOML, JSON or keyword arguments gave it.
        where: what opens the message, such as ``The recipe 'x.toml'``; "" for the key alone.
        error: what a mistake is raised as.
        remedy: what to do next, where the mistake itself suggests nothing better.

    Raises:
        error: a key is unknown or missing, or a value is not of its kind or out of its
            limits; one sentence about the first mistake.
    """
    return _checked(lambda: model.model_validate(values), model, where, error, remedy)


def validated_json(
    model: type[Model],
    text: str,
    *,
    where: str = "",
    error: type[InputError] | type[UsageError] = UsageError,
    remedy: str = "",
) -> Model:
    """Return ``model`` filled from JSON, in which nothing is taken for another type.

    ``"3"``, ``3.0`` and ``true`` are no whole numbers there. The text has gone through
    :func:`~van_deploy.documents.json_from`, which refuses what pydantic lets pass.
    Arguments and errors are those of :func:`validated`.
    """
    strict = lambda: model.model_validate_json(text, strict=True)  # noqa: E731
    return _checked(strict, model, where, error, remedy)


def _checked(
    fill: Callable[[], Model],
    model: type[Model],
    where: str,
    error: type[InputError] | type[UsageError],
    remedy: str,
) -> Model:
    opening = f"{where}: " if where else ""
    try:
        return fill()
    except pydantic.ValidationError as failure:
        message, advice = _told(failure.errors(include_url=False)[0], model)
        raise error(f"{opening}{message}.", advice or remedy or "Correct it.") from None
    except UsageError as failure:  # what a schema's own validator found to contradict itself
        raise error(f"{opening}{failure.message}", failure.remedy) from None


def read_toml(model: type[Model], path: Path, what: str, error: type[InputError]) -> Model:
    """Return the schema in a TOML file.

    Args:
        model: the schema.
        path: the file.
        what: what errors call it, such as ``recipe``.
        error: what a mistake is raised as.

    Raises:
        error: the file cannot be read, is not TOML, or is not of this schema.
    """
    try:
        values = toml_from(path)
    except (OSError, DocumentError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"The {what} '{path}' cannot be read: {reason}.", "Check the path.") from None
    except ValueError as failure:
        raise error(
            f"The {what} '{path}' is not TOML: {failure}.", "Correct the line it names."
        ) from None
    return validated(model, values, where=f"The {what} '{path}'", error=error)


def read_json(
    model: type[Model], path: Path, what: str, error: type[InputError], remedy: str = ""
) -> Model:
    """Return the schema in a JSON file. Arguments and errors are those of :func:`read_toml`."""
    try:
        text = text_from(path)
        json_from(text)
    except OSError as failure:
        raise error(f"The {what} '{path}' cannot be read: {failure.strerror}.", remedy) from None
    except ValueError as failure:
        raise error(f"The {what} '{path}' is no JSON document: {failure}.", remedy) from None
    return validated_json(model, text, where=f"The {what} '{path}'", error=error, remedy=remedy)


def _told(fault: ErrorDetails, model: type[Schema]) -> tuple[str, str]:
    """Return one mistake as a message without its full stop, and what to do next."""
    location = [part for part in fault["loc"] if not _is_branch(part)]
    key = ".".join(str(part) for part in location)[:200]
    if fault["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        prefix = key[: len(key) - len(str(location[-1]))]
        return f"the key '{key}' is unknown", (
            f"Did you mean '{prefix}{near[0]}'?" if near else f"Known keys: {', '.join(known)}."
        )
    if fault["type"] in _FAULTS:
        return _FAULTS[fault["type"]].format(key=key), ""
    text = re.sub(r"^(Input|Value error,|String|List|Tuple|Dictionary) ?", "", fault["msg"])
    if not key:
        return f"it {text}", ""
    return f"'{key}' is {reprlib.repr(fault['input'])}: it {text}", ""


def _is_branch(part: str | int) -> bool:
    """Return whether a part of a location names a branch of a union rather than a key."""
    return isinstance(part, str) and ("[" in part or part in {"int", "float", "str", "bool"})


def _keys_at(table: type[Any], location: list[str | int]) -> list[str]:
    """Return the keys that the table at ``location`` may have."""
    for part in location:
        annotation = _keys_of(table).get(part)
        if annotation is None:  # a place in a list, or a key of a mapping
            continue
        found = _table_in(annotation)
        if found is None:
            return []
        table = found
    return [str(key) for key in _keys_of(table)]


def _keys_of(table: type[Any]) -> dict[Any, Any]:
    """Return the keys of a schema or a data class, and the type of each."""
    if dataclasses.is_dataclass(table):
        return dict(get_type_hints(table))
    return {f.alias or name: f.annotation for name, f in table.model_fields.items()}


def _table_in(annotation: Any) -> type[Any] | None:
    """Return the table that an annotation holds: itself, or inside a union, list or mapping."""
    if isinstance(annotation, type) and (
        issubclass(annotation, Schema) or dataclasses.is_dataclass(annotation)
    ):
        return annotation
    return next(filter(None, map(_table_in, get_args(annotation))), None)
