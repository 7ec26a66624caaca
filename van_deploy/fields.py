"""Kinds of values that documents from elsewhere hold: each is checked when it is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from van_deploy.documents import LONGEST_TEXT

LARGEST = 2**62


def _text(value: str) -> str:
    if len(value) > LONGEST_TEXT:
        raise ValueError(f"has {len(value):,} characters, and a text here has {LONGEST_TEXT:,}")
    if not value.isprintable():
        raise ValueError("holds control characters")
    return value


def _file_name(value: str) -> str:
    """Return a name that is safe as a file's, in YAML and in a program's text.

    >>> _file_name("van_b1-fp16")
    'van_b1-fp16'
    """
    if re.fullmatch(r"\w[\w.+-]{0,199}", value) is None:
        raise ValueError("is no name: letters, digits and . + - _ only, 200 at most")
    return value


def _kept(value: Any) -> Any:
    """Return a data class whose texts can be shown and whose numbers are of a sensible size."""
    for leaf in _leaves(asdict(value)):
        if isinstance(leaf, str):
            _text(leaf)
        elif isinstance(leaf, int | float) and abs(leaf) > LARGEST:
            raise ValueError(f"holds the number {leaf:.3g}")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _leaves(item)
    else:
        yield value


Text = Annotated[str, AfterValidator(_text)]
"""Text of a sensible length without control characters."""

Label = Annotated[str, Field(max_length=LONGEST_TEXT)]
"""Text that may hold anything, such as a class's name; what shows it makes it harmless."""

FileName = Annotated[str, AfterValidator(_file_name)]
"""A name that is safe as a file's, in YAML and in a program's text."""

Count = Annotated[int, Field(ge=0, lt=LARGEST)]
"""A whole number from 0."""

Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A whole number from 1: a width, a batch, a side in pixels."""

Table = dict[str, Any]
"""A JSON object whose keys belong to whoever wrote it."""

Kept = AfterValidator(_kept)
"""Goes with a data class that a document keeps: its texts are :data:`Text`, numbers sensible."""
