"""Documents of this program's own: JSON files that say first which form they have.

Manifests, sidecars, signatures and the like are written and read by one model each. A
file of another version is refused, with what makes it anew, rather than guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import Field

from van_deploy.documents import json_from, plain, text_from
from van_deploy.errors import InputError
from van_deploy.schema import Schema, validated_json

Document = TypeVar("Document", bound="Versioned")


class Versioned(Schema):
    """A document whose class says ``schema_: Literal["van-deploy/NAME/VERSION"]``."""

    schema_: str = Field(alias="schema")

    @classmethod
    def schema_name(cls) -> str:
        """Return what ``schema`` must be."""
        return str(get_args(cls.model_fields["schema_"].annotation)[0])

    def text(self) -> str:
        """Return the document as its file has it."""
        return json.dumps(plain(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_versioned(
    model: type[Document],
    path: Path,
    what: str,
    error: type[InputError],
    *,
    damaged: str,
    outdated: str,
) -> Document:
    """Return the document in a file.

    Args:
        model: its class.
        path: the file.
        what: what errors call it, such as ``manifest``.
        error: what a mistake is raised as.
        damaged: what to do about a file that is not what was written.
        outdated: what to do about a file of another version.

    Raises:
        error: it cannot be read, is damaged, or is of another version.
    """
    try:
        text = text_from(path)
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"The {what} '{path}' is damaged: {reason}.", damaged) from failure
    return versioned_from(model, text, path, what, error, damaged=damaged, outdated=outdated)


def versioned_from(
    model: type[Document],
    text: str,
    path: Path,
    what: str,
    error: type[InputError],
    *,
    damaged: str,
    outdated: str,
) -> Document:
    """Return the document in ``text``. Arguments and errors are :func:`read_versioned`'s."""
    where = f"The {what} '{path}' is damaged"
    try:
        raw = json_from(text)
    except ValueError as failure:
        raise error(f"{where}: {failure}.", damaged) from failure
    found = raw.get("schema") if isinstance(raw, Mapping) else None
    if isinstance(found, str) and found != model.schema_name():
        raise error(
            f"'{path}' has schema '{found[:100]}'; this version reads '{model.schema_name()}'.",
            outdated,
        )
    return validated_json(model, text, where=where, error=error, remedy=damaged)
