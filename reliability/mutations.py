"""Seeded ways to spoil bytes, JSON and text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

__all__ = ["STRANGE_VALUES", "spoiled_bytes", "spoiled_json", "spoiled_json_text", "spoiled_text"]

MOST_ADDED = 4096  # bytes

STRANGE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "..", "a\\b"),
    *("\x00", "\udc80", "é" * 300, "[red]x[/]", [], {}, [[]], [None], {"": 0}, [1e999]),
    *("\x1b]0;x\x07\x1b[2J", "\x9b2J\u202e", 'x"); import os; ("', "a" * 5000, ".pending"),
)
LEVELS = (50, 900, 100_000)  # of lists in lists
STRANGE_WORDS = (
    *("", "=", "[", "]", '"', "'", "#", "\n", "\t", "\x00", "\ufeff", "[x]\n", "a = 1\n", "nan"),
    *("-1", "0", "1e999", "99999999999999999999", "true", '""', "[]", "{}", "../../x", "é", "\\"),
)


def spoiled_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` with flipped, removed, repeated, added or zeroed bytes, or cut off."""
    way = rng.choice(("flip", "flip", "flip", "cut", "remove", "repeat", "insert", "zero", "swap"))
    if not data:
        return rng.randbytes(rng.randint(1, 64))
    if way == "cut":
        return data[: rng.randrange(len(data))]
    spoiled = bytearray(data)
    start = _place(rng, len(data))
    size = rng.choice((1, 2, 4, 8, 64, 512, MOST_ADDED))
    if way == "flip":
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            spoiled[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    elif way == "remove":
        del spoiled[start : start + size]
    elif way == "repeat":
        spoiled[start:start] = data[start : start + size]
    elif way == "insert":
        spoiled[start:start] = rng.randbytes(size)
    elif way == "zero":
        spoiled[start : start + size] = bytes(len(spoiled[start : start + size]))
    else:
        other = rng.randrange(len(data))
        spoiled[start : start + size] = data[other : other + size]
    return bytes(spoiled)


def _place(rng: random.Random, length: int) -> int:
    """Return an index, as often near an end as anywhere: formats keep their directories there."""
    if rng.random() < 0.5:
        return rng.randrange(length)
    near = min(length, 512)
    return rng.randrange(near) if rng.random() < 0.5 else length - 1 - rng.randrange(near)


def spoiled_json(rng: random.Random, document: Any) -> Any:
    """Return ``document`` with one to three values replaced, removed, renamed or added."""
    spoiled = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        containers = list(_containers(spoiled))
        if not containers:
            return rng.choice(STRANGE_VALUES)
        container = rng.choice(containers)
        if isinstance(container, MutableMapping):
            _spoil_mapping(rng, container)
        elif container:
            _spoil_list(rng, container)
    return spoiled


def spoiled_json_text(rng: random.Random, document: Any) -> str:
    """Return spoiled JSON as text; now and then it says a thing twice, or nests without end."""
    text = json.dumps(spoiled_json(rng, document))
    way = rng.randrange(20)
    if way == 0:
        levels = rng.choice(LEVELS)
        return text.replace("{", '{"x": ' + "[" * levels + "]" * levels + ", ", 1)
    if way == 1 and isinstance(document, dict):
        name = json.dumps(rng.choice(list(document)))
        return text.replace("{", f"{{{name}: {json.dumps(rng.choice(STRANGE_VALUES))}, ", 1)
    if way == 2:
        return text.replace("{", '{"x": ' + "9" * rng.choice((100, 5000)) + ", ", 1)
    return text


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _spoil_mapping(rng: random.Random, mapping: MutableMapping[str, Any]) -> None:
    strange = copy.deepcopy(rng.choice(STRANGE_VALUES))
    if not mapping or rng.random() < 0.1:
        mapping[str(rng.choice(STRANGE_WORDS))] = strange
        return
    key = rng.choice(list(mapping))
    way = rng.choice(("replace", "replace", "remove", "rename"))
    value = mapping.pop(key)
    if way == "replace":
        mapping[key] = strange
    elif way == "rename":
        mapping[str(rng.choice(STRANGE_WORDS)) + key] = value


def _spoil_list(rng: random.Random, items: MutableSequence[Any]) -> None:
    index = rng.randrange(len(items))
    way = rng.choice(("replace", "replace", "remove", "repeat"))
    if way == "replace":
        items[index] = copy.deepcopy(rng.choice(STRANGE_VALUES))
    elif way == "remove":
        del items[index]
    else:
        items.insert(index, items[index])


def spoiled_text(rng: random.Random, text: str) -> str:
    """Return ``text`` with lines or words removed, repeated, swapped or replaced."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not lines:
            lines = [str(rng.choice(STRANGE_WORDS))]
        index = rng.randrange(len(lines))
        way = rng.choice(("word", "word", "word", "remove", "repeat", "swap", "insert"))
        if way == "word":
            lines[index] = _with_another_word(rng, lines[index])
        elif way == "remove":
            del lines[index]
        elif way == "repeat":
            lines.insert(index, lines[index])
        elif way == "swap":
            other = rng.randrange(len(lines))
            lines[index], lines[other] = lines[other], lines[index]
        elif rng.random() < 0.1:
            levels = rng.choice(LEVELS)
            lines.insert(index, "x = " + "[" * levels + "]" * levels + "\n")
        else:
            lines.insert(index, str(rng.choice(STRANGE_WORDS)))
    return "".join(lines)


def _with_another_word(rng: random.Random, line: str) -> str:
    words = line.split(" ")
    words[rng.randrange(len(words))] = str(rng.choice(STRANGE_WORDS))
    return " ".join(words)
