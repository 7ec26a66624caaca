"""JSON documents held against the forms in ``tests/golden/documents.json``, key by key.

A form is a mapping of exactly these keys (``"*"``: any key), ``["EACH", form]`` for a
list, ``[null, form]`` for something that may be missing, or the name of a type.
``number`` is a float, or what JSON cannot spell: ``"inf"``, ``"-inf"``, ``"nan"``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["misfits"]

FORMS = json.loads((Path(__file__).parent / "golden" / "documents.json").read_text())
NOISE = FORMS["verify"]["noise"]
COMPARISON = {key: form for key, form in NOISE.items() if key != "largest_logit"}
TYPES = {"bool": bool, "int": int, "str": str}


def misfits(document: Any, name: str) -> list[str]:
    """Return what a document has that its form lacks, lacks, or has of another type."""
    return list(_misfits(document, FORMS[name], name))


def _misfits(value: Any, form: Any, at: str) -> Iterator[str]:
    if form == "COMPARISON":
        form = COMPARISON
    if isinstance(form, dict):
        yield from _of_mapping(value, form, at)
    elif isinstance(form, list) and form[0] is None:
        if value is not None:
            yield from _misfits(value, form[1], at)
    elif isinstance(form, list):
        if not isinstance(value, list):
            yield f"{at} is no list"
            return
        for index, item in enumerate(value):
            yield from _misfits(item, form[1], f"{at}[{index}]")
    elif form == "number":
        spelt = value in ("inf", "-inf", "nan")
        if not spelt and (isinstance(value, bool) or not isinstance(value, int | float)):
            yield f"{at} is no number: {value!r}"
    elif form in TYPES:
        if type(value) is not TYPES[form]:
            yield f"{at} is no {form}: {value!r}"
    elif value != form:
        yield f"{at} is {value!r}, not {form!r}"


def _of_mapping(value: Any, form: dict[str, Any], at: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{at} is no mapping"
        return
    if set(form) == {"*"}:
        for key, item in value.items():
            yield from _misfits(item, form["*"], f"{at}.{key}")
        return
    if set(value) != set(form):
        yield f"{at} has the keys {sorted(set(value) ^ set(form))} on one side only"
        return
    for key, inner in form.items():
        yield from _misfits(value[key], inner, f"{at}.{key}")
