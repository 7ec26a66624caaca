"""Edits of JSON files, and validation of documents with their JSON Schemas."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, reduce
from pathlib import Path
from typing import Any

import jsonschema

from supply_chain.reference import DOCUMENTS, document_schema


@cache
def _validator(name: str) -> Any:
    return jsonschema.Draft202012Validator(document_schema(name))


def validate_json_output(document: Any, command: str) -> None:
    """Validate the output of a command with ``--json``.

    Args:
        document: the parsed JSON.
        command: a name in :data:`DOCUMENTS`; names that begin with it and a dash are
            other documents of the same command.

    Raises:
        AssertionError: no schema matches; reports the first error of the nearest one.
    """
    names = [name for name in DOCUMENTS if name == command or name.startswith(f"{command}-")]
    errors = [list(_validator(name).iter_errors(document)) for name in names]
    if all(errors):
        worst = jsonschema.exceptions.best_match(min(errors, key=len))
        raise AssertionError(f"{command} --json: {worst.json_path}: {worst.message[:300]}")


@contextmanager
def edited(file: Path) -> Iterator[Any]:
    """Yield the content of a JSON file, and write it at the end."""
    document = json.loads(file.read_text())
    yield document
    file.write_text(json.dumps(document))


def edit_json(file: Path, keys: str, value: object) -> None:
    """Set one value of a JSON file; ``keys`` are the keys that lead to it, with spaces between."""
    *tables, last = keys.split(" ")
    with edited(file) as document:
        reduce(dict.__getitem__, tables, document)[last] = value
