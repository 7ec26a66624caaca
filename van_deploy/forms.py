"""What JSON from elsewhere must look like: a small language of checks and tables of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "CONTROL",
    "LONGEST_TEXT",
    "Check",
    "Form",
    "count",
    "list_of",
    "name",
    "number",
    "one_of",
    "optional",
    "require_encodable",
    "require_form",
    "size",
    "table",
    "table_of",
    "text",
]

# C0 and C1 but tab and newline, and what turns the direction of writing round.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
LONGEST_TEXT = 4096  # characters; a path has no more

Check = Callable[[Any], bool]
"""Tells whether a value is of a kind."""

Form = Any
"""A :data:`Check`, or a mapping of keys to forms; keys may be absent, others may be there."""


def require_form(value: Any, form: Form, where: str = "") -> None:
    """Return if ``value`` has the form.

    Args:
        value: as JSON gave it.
        form: what it must be.
        where: its name, for the message.

    Raises:
        ValueError: it has not; the message names the part and shows it.
    """
    if callable(form):
        if not form(value):
            raise ValueError(f"'{where}' is {value!r}"[:200])
        return
    if not table(value):
        raise ValueError(f"'{where}' is {value!r}, not a table"[:200])
    for key, inner in form.items():
        if key in value:
            require_form(value[key], inner, f"{where}.{key}" if where else key)


def require_encodable(document: Any) -> None:
    """Return if every text in ``document`` can be written as UTF-8.

    Raises:
        ValueError: JSON's escapes can spell halves of characters, which cannot.
    """
    json.dumps(document, ensure_ascii=False, default=str).encode()


def text(value: Any) -> bool:
    """Return whether it is text of a sensible length without control characters."""
    return isinstance(value, str) and len(value) <= LONGEST_TEXT and value.isprintable()


def name(value: Any) -> bool:
    """Return whether it is a name that is safe as a file's, in YAML and in a program's text.

    >>> name("van_b1-fp16"), name("../x"), name('x"; import os'), name("")
    (True, False, False, False)
    """
    return isinstance(value, str) and re.fullmatch(r"\w[\w.+-]{0,199}", value) is not None


def number(value: Any) -> bool:
    """Return whether it is a finite number."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) < 1e300 and math.isfinite(value)


def count(value: Any) -> bool:
    """Return whether it is a whole number from 0 to 2**62."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def size(value: Any) -> bool:
    """Return whether it is a whole number from 1 to 2**31: a width, a batch, a side in pixels."""
    return count(value) and 0 < value < 2**31


def table(value: Any) -> bool:
    """Return whether it is a JSON object."""
    return isinstance(value, Mapping)


def one_of(*words: str) -> Check:
    """Return a check for one of these words."""
    return lambda value: isinstance(value, str) and value in words


def optional(check: Check) -> Check:
    """Return a check that takes null as well."""
    return lambda value: value is None or check(value)


def list_of(check: Check, *, at_least: int = 0) -> Check:
    """Return a check for a list whose every item passes ``check``."""
    return lambda value: (
        isinstance(value, list) and len(value) >= at_least and all(check(item) for item in value)
    )


def table_of(check: Check) -> Check:
    """Return a check for an object whose every value passes ``check``."""
    return lambda value: table(value) and all(check(item) for item in value.values())
