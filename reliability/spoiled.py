"""Ways to spoil bytes, JSON and TOML; Hypothesis draws each choice, and shrinks what failed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
"""Draws from a strategy, as ``st.data()`` does."""

STRANGE_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**63, 10**30, 10**400, -0.5, 1e308, float("nan"), float("inf")),
    *("", "../../etc/passwd", "/etc/passwd", "..", "a\\b", "\x00", "\udc80", "é" * 300, "[red]x"),
    *("\x1b]0;x\x07\x1b[2J", "\x9b2J\u202e", 'x"); import os; ("', "a" * 5000, ".pending", "[/]"),
    *([], {}, [[]], [None], {"": 0}, [[[[[]]]]], {"a": {"b": []}}, ["a" * 1000, 1]),
)
STRANGE_WORDS = (
    *("", "=", "[", '"', "#", "\n", "\x00", "\ufeff", "[x]\n", "a = 1\n", "nan", "-1"),
    *("1e999", "9" * 20, "true", '""', "[]", "{}", "../../x", "é", "\\", "[" * 100_000),
)


def first_fault(case: Callable[[Draw], object], seed: int, count: int) -> str:
    """Return what the first of so many cases that failed says, shrunk; "" where none did."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max(1, count),
        database=None,
        deadline=None,
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


def spoiled_bytes(draw: Draw, data: bytes) -> bytes:
    """Return ``data`` with a piece of it cut, zeroed, repeated, or replaced by other bytes."""
    for _ in range(draw(st.integers(1, 3))):
        start, size = draw(st.integers(0, len(data))), one_of(draw, 0, 1, 4, 64, 4096, 2**40)
        if draw(st.booleans()):  # formats keep their directories at the end
            start = len(data) - start
        piece = data[start : start + size]
        new = one_of(draw, b"", bytes(len(piece)), 2 * piece, draw(st.binary(max_size=64)))
        data = data[:start] + new + data[start + size :]
    return data


def spoiled_json(draw: Draw, value: Any) -> Any:
    """Return a document with something in it replaced, removed, renamed or repeated."""
    way = one_of(draw, "inside", "inside", "inside", "replace", "remove", "rename", "repeat")
    if not isinstance(value, dict | list) or not value or way == "replace":
        return one_of(draw, *STRANGE_VALUES)
    key = one_of(draw, *(value if isinstance(value, dict) else range(len(value))))
    if isinstance(value, list):
        new = {"remove": [], "inside": [spoiled_json(draw, value[key])]}
        return [*value[:key], *new.get(way, 2 * [value[key]]), *value[key + 1 :]]
    rest = {name: inner for name, inner in value.items() if name != key}
    if way == "inside":
        return {**value, key: spoiled_json(draw, value[key])}
    return rest if way == "remove" else {**rest, one_of(draw, *STRANGE_WORDS): value[key]}


def spoiled_document(draw: Draw, sound: bytes, suffix: str) -> bytes:
    """Return a document with spoiled bytes, or with other words (TOML) or values (JSON)."""
    if suffix == ".pub" or one_of(draw, True, False, False):
        return spoiled_bytes(draw, sound)
    if suffix == ".toml":
        text = sound.decode()
        for _ in range(draw(st.integers(1, 3))):
            if places := list(re.finditer(r"\S+|\n", text)):
                place = one_of(draw, *places)
                text = text[: place.start()] + one_of(draw, *STRANGE_WORDS) + text[place.end() :]
    else:
        text = json.dumps(spoiled_json(draw, json.loads(sound)))
        first, levels = json.dumps(next(iter(json.loads(sound)))), one_of(draw, 50, 900, 100_000)
        more = (f"{first}: 1", f'"x": {"[" * levels}{"]" * levels}', f'"x": {"9" * 5000}')
        if one_of(draw, True, False, False, False):  # said twice, nested or long without end
            text = text.replace("{", f"{{{one_of(draw, *more)}, ", 1)
    return text.encode("utf-8", "surrogatepass")
