"""Corrupt bytes, JSON and TOML; Hypothesis draws each choice and shrinks a failing case."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]  # as the `draw` method of `st.data()`

UNUSUAL_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**63, 10**30, 10**400, -0.5, 1e308, float("nan"), float("inf")),
    *("", "../../etc/passwd", "/etc/passwd", "..", "a\\b", "\x00", "\udc80", "é" * 300, "[red]x"),
    *("\x1b]0;x\x07\x1b[2J", "\x9b2J\u202e", 'x"); import os; ("', "a" * 5000, ".pending", "[/]"),
    *([], {}, [[]], [None], {"": 0}, [[[[[]]]]], {"a": {"b": []}}, ["a" * 1000, 1]),
)
UNUSUAL_WORDS = (
    *("", "=", "[", '"', "#", "\n", "\x00", "\ufeff", "[x]\n", "a = 1\n", "nan", "-1"),
    *("1e999", "9" * 20, "true", '""', "[]", "{}", "../../x", "é", "\\", "[" * 100_000),
)


def find_failure(case: Callable[[Draw], object], seed: int, count: int) -> str:
    """Return the message of the first of ``count`` cases that fails, shrunk, or ""."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(1, count),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def cases(data: st.DataObject) -> None:
        case(data.draw)

    try:
        cases()
    except (AssertionError, hypothesis.errors.Flaky) as error:
        return str(error) or "a case failed"
    return ""


def one_of(draw: Draw, *values: Any) -> Any:
    """Return one of some values."""
    return draw(st.sampled_from(values))


def corrupt_bytes(draw: Draw, data: bytes) -> bytes:
    """Return ``data`` with a piece of it cut, zeroed, repeated, or replaced by other bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start, size = draw(st.integers(0, len(data))), one_of(draw, 0, 1, 4, 64, 4096, 2**40)
        if draw(st.booleans()):  # many formats have their directory at the end
            start = len(data) - start
        piece = data[start : start + size]
        new = one_of(draw, b"", bytes(len(piece)), 2 * piece, draw(st.binary(max_size=64)))
        data = data[:start] + new + data[start + size :]
    return data


def corrupt_value(draw: Draw, value: Any) -> Any:
    """Return a similar value, which is often still valid, or an unusual one."""
    similar: tuple[Any, ...] = UNUSUAL_VALUES
    if isinstance(value, bool):
        similar = (not value,)
    elif isinstance(value, int | float):
        similar = (value + 1, max(value - 1, 1), 2 * value, value / 2)
    elif isinstance(value, str):
        similar = (value + "x", value[1:], value.upper(), "é", "x")
    return one_of(draw, *one_of(draw, similar, similar, UNUSUAL_VALUES))


def corrupt_json(draw: Draw, value: Any) -> Any:
    """Return a document with a value changed, or an entry removed, renamed or repeated."""
    if not isinstance(value, dict | list) or not value:
        return corrupt_value(draw, value)
    change = one_of(draw, *["value"] * 12, "remove", "rename", "repeat", "replace")
    if change == "replace":
        return one_of(draw, *UNUSUAL_VALUES)
    key = one_of(draw, *(value if isinstance(value, dict) else range(len(value))))
    if isinstance(value, list):
        new = {"remove": [], "value": [corrupt_json(draw, value[key])]}
        return [*value[:key], *new.get(change, 2 * [value[key]]), *value[key + 1 :]]
    if change == "value":
        return {**value, key: corrupt_json(draw, value[key])}
    rest = {name: inner for name, inner in value.items() if name != key}
    return rest if change == "remove" else {**rest, one_of(draw, *UNUSUAL_WORDS): value[key]}


def corrupt_document(draw: Draw, data: bytes, suffix: str) -> bytes:
    """Return a document with corrupt bytes, words (TOML) or values (TOML and JSON)."""
    if suffix == ".pub" or one_of(draw, True, *[False] * 5):
        return corrupt_bytes(draw, data)
    if suffix == ".toml":
        return _corrupt_toml(draw, data.decode()).encode("utf-8", "surrogatepass")
    document = json.loads(data)
    text = json.dumps(corrupt_json(draw, document))
    first, levels = json.dumps(next(iter(document))), one_of(draw, 50, 900, 100_000)
    more = (f"{first}: 1", f'"x": {"[" * levels}{"]" * levels}', f'"x": {"9" * 5000}')
    if one_of(draw, True, *[False] * 7):  # a duplicate key, deep nesting or a huge number
        text = text.replace("{", f"{{{one_of(draw, *more)}, ", 1)
    return text.encode("utf-8", "surrogatepass")


def _corrupt_toml(draw: Draw, text: str) -> str:
    """Return TOML with one value changed, or one word replaced by an unusual one."""
    if one_of(draw, True, False, False, False):
        place = one_of(draw, *re.finditer(r"\S+|\n", text))
        return text[: place.start()] + one_of(draw, *UNUSUAL_WORDS) + text[place.end() :]
    place = one_of(draw, *re.finditer(r'(?m)^([\w-]+ = )(true|false|-?[\d.]+|"[^"\n]*")$', text))
    value = json.dumps(corrupt_value(draw, json.loads(place[2])))
    return text[: place.start()] + place[1] + value + text[place.end() :]
