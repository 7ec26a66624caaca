"""Documents held against their JSON Schemas."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema

from supply_chain.reference import DOCUMENTS, document_schema


@cache
def _validator(name: str) -> Any:
    return jsonschema.Draft202012Validator(document_schema(name))


def validate_json_output(document: Any, command: str) -> None:
    """Return if a document is what a command prints with ``--json``.

    Args:
        document: as JSON gave it.
        command: a name in :data:`DOCUMENTS`; those that begin with it and a dash are
            other documents of the same command.

    Raises:
        AssertionError: it is none of them; the first fault of the nearest one is told.
    """
    names = [name for name in DOCUMENTS if name == command or name.startswith(f"{command}-")]
    faults = [list(_validator(name).iter_errors(document)) for name in names]
    if all(faults) and faults:
        worst = jsonschema.exceptions.best_match(min(faults, key=len))
        raise AssertionError(f"{command} --json: {worst.json_path}: {worst.message[:300]}")
