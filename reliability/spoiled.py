"""Seeded ways to spoil bytes, JSON and text."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "../../etc/passwd", "/etc/passwd", "..", "a\\b"),
    *("\x00", "\udc80", "é" * 300, "[red]x[/]", [], {}, [[]], [None], {"": 0}, [1e999]),
    *("\x1b]0;x\x07\x1b[2J", "\x9b2J\u202e", 'x"); import os; ("', "a" * 5000, ".pending"),
    *([[[[[]]]]], {"a": {"b": []}}, ["a" * 1000, 1]),
)
STRANGE_WORDS = (
    *("", "=", "[", "]", '"', "'", "#", "\n", "\t", "\x00", "\ufeff", "[x]\n", "a = 1\n", "nan"),
    *("-1", "0", "1e999", "99999999999999999999", "true", '""', "[]", "{}", "../../x", "é", "\\"),
)
LEVELS = (50, 900, 100_000)  # of lists in lists


def generator_of(name: str, index: int) -> random.Random:
    """Return the generator of one case: the same on every machine."""
    return random.Random(hashlib.sha256(f"{name}/{index}".encode()).digest())


def spoiled_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return ``data`` with flipped, removed, repeated, added or zeroed bytes, or cut off."""
    if not data:
        return rng.randbytes(rng.randint(1, 64))
    way = rng.choice(("flip", "flip", "flip", "cut", "remove", "repeat", "insert", "zero", "swap"))
    start, size = _place(rng, len(data)), rng.choice((1, 2, 4, 8, 64, 512, 4096))
    spoiled, piece = bytearray(data), data[start : start + size]
    if way == "cut":
        del spoiled[rng.randrange(len(data)) :]
    elif way == "flip":
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            spoiled[_place(rng, len(data))] ^= 1 << rng.randrange(8)
    elif way in {"repeat", "insert"}:
        spoiled[start:start] = piece if way == "repeat" else rng.randbytes(size)
    elif way == "swap":
        other = rng.randrange(len(data))
        spoiled[start : start + size] = data[other : other + size]
    else:
        spoiled[start : start + size] = b"" if way == "remove" else bytes(len(piece))
    return bytes(spoiled)


def _place(rng: random.Random, length: int) -> int:
    """Return an index, as often near an end as anywhere: formats keep their directories there."""
    near = rng.randrange(min(length, 512))
    return rng.choice((rng.randrange(length), rng.randrange(length), near, length - 1 - near))


def spoiled_json(rng: random.Random, document: Any) -> Any:
    """Return ``document`` with one to three values replaced, removed, renamed or repeated."""
    spoiled = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        containers = list(_containers(spoiled))
        if not containers:
            return rng.choice(STRANGE_VALUES)
        container, strange = rng.choice(containers), copy.deepcopy(rng.choice(STRANGE_VALUES))
        way = rng.choice(("replace", "replace", "replace", "remove", "rename", "add"))
        if isinstance(container, dict):
            key, word = rng.choice(list(container) or [""]), str(rng.choice(STRANGE_WORDS))
            value = container.get(key, strange) if way == "add" else container.pop(key, strange)
            if way != "remove":
                named = {"replace": key, "rename": word + key, "add": word}[way]
                container[named] = value if way == "rename" else strange
        elif container:
            index = rng.randrange(len(container))
            more = {"replace": [strange], "remove": []}
            container[index : index + 1] = more.get(way, 2 * [container[index]])
    return spoiled


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def spoiled_json_text(rng: random.Random, document: Any) -> bytes:
    """Return spoiled JSON as text; now and then it says a thing twice, or nests without end."""
    text, way = json.dumps(spoiled_json(rng, document)), rng.randrange(20)
    levels, strange = rng.choice(LEVELS), json.dumps(rng.choice(STRANGE_VALUES))
    name = json.dumps(next(iter(document)))
    more = {
        0: '"x": ' + "[" * levels + "]" * levels,
        1: f"{name}: {strange}",
        2: '"x": ' + "9" * rng.choice((100, 5000)),
    }
    if way in more:
        text = text.replace("{", f"{{{more[way]}, ", 1)
    return text.encode("utf-8", "surrogatepass")


def spoiled_text(rng: random.Random, text: str) -> bytes:
    """Return ``text`` with lines or words removed, repeated, swapped or replaced."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = lines or [""]
        index, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        way, strange = rng.randrange(8), str(rng.choice(STRANGE_WORDS))
        if way < 4:  # another word
            words = lines[index].split(" ")
            words[rng.randrange(len(words))] = strange
            lines[index] = " ".join(words)
        elif way == 4:
            del lines[index]
        elif way == 5:
            lines[index] = lines[other]
        elif way == 6 or rng.random() < 0.9:
            lines.insert(index, strange)
        else:
            levels = rng.choice(LEVELS)
            lines.insert(index, "x = " + "[" * levels + "]" * levels + "\n")
    return "".join(lines).encode("utf-8", "surrogatepass")
