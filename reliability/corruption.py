"""Corrupt bytes, JSON and TOML; Hypothesis draws each choice and shrinks a failing case."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
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
    *("", "=", "[", '"', "#", "\n", "\x00", "\ufeff", "[x]\n", "a = 1\n", "nan", "-1", "1e999"),
    *("9" * 5000, "true", '""', "[]", "{}", "é", "\\", "[" * 100_000, "[" * 900 + "]" * 900),
)
# Parts of a text that are replaced, removed or repeated; a repeated line is a duplicate key.
TEXT_PATTERNS = {"word": r'"[^"\n]*"|[\w.+-]+|\S|\n', "line": r".+\n?"}


def find_failure(
    case: Callable[[Draw], object], seed: int, count: int, timeout_s: float | None = None
) -> str:
    """Return the message of the first of ``count`` cases that fails, shrunk, or ""."""
    options: dict[str, Any] = {"suppress_health_check": list(hypothesis.HealthCheck)}
    options |= {"deadline": timeout_s and 1000 * timeout_s, "report_multiple_bugs": False}
    settings = hypothesis.settings(max_examples=max(1, count), database=None, **options)

    @settings
    @hypothesis.seed(seed)
    @hypothesis.given(st.data())
    def cases(data: st.DataObject) -> None:
        case(data.draw)

    try:
        cases()
    except (AssertionError, hypothesis.errors.HypothesisException) as error:
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
    elif isinstance(value, list):
        similar = (value[1:], 2 * value, [*value[:-1], one_of(draw, *UNUSUAL_VALUES)])
    elif value:
        key = one_of(draw, *value)
        rest = {name: inner for name, inner in value.items() if name != key}
        similar = (rest, {**value, "x": value[key]}, {**rest, key.upper(): value[key]})
    return one_of(draw, *one_of(draw, similar, similar, UNUSUAL_VALUES))


def corrupt_document(draw: Draw, data: bytes) -> bytes:
    """Return JSON or TOML with a value, word or line changed; other data with bytes changed."""
    text = data.decode()
    values, change = list(_values(text)), one_of(draw, *["value"] * 11, *TEXT_PATTERNS, "bytes")
    if not values or change == "bytes":
        return corrupt_bytes(draw, data)
    if change == "value":
        start, end, value = one_of(draw, *values)
        new = json.dumps(corrupt_value(draw, value))
    else:
        place = one_of(draw, *re.finditer(TEXT_PATTERNS[change], text))
        start, end = place.span()
        new = one_of(draw, *(UNUSUAL_WORDS if change == "word" else ("", 2 * place[0])))
    return (text[:start] + new + text[end:]).encode("utf-8", "surrogatepass")


def _values(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yield start, end and content of the values and keys of JSON, and of the values of TOML."""
    for place in re.finditer(r'(?m)\A|^ +|[:=] |\{|, (?=")', text):
        with contextlib.suppress(ValueError):
            value, end = json.JSONDecoder().raw_decode(text, place.end())
            yield place.end(), end, value
