"""Results of checks, kept in the bundle's manifest beside the digests they are true of."""

from __future__ import annotations

import dataclasses
import errno
import math
from collections.abc import Mapping, Sequence
from typing import Any

from van_deploy.bundle import Bundle, writing

__all__ = ["jsonable", "record_check"]

MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


def record_check(bundle: Bundle, name: str, result: Mapping[str, Any]) -> str:
    """Write the result of a check into the manifest, with the digests of the artefacts.

    A bundle that may only be read keeps no record; the check is worth no less for it.

    Args:
        bundle: what was checked.
        name: of the check, such as ``verify``.
        result: the report's ``as_dict()``.

    Returns:
        Why nothing was recorded, a sentence, or "".

    Raises:
        BundleError: the bundle was changed while it was checked.
    """
    digests = {key: artefact.sha256 for key, artefact in bundle.artefacts.items()}
    try:
        with writing(bundle.path) as draft:
            draft.manifest["checks"][name] = {**jsonable(result), "artefacts_sha256": digests}
    except OSError as error:
        if error.errno not in MAY_NOT_WRITE:
            raise
        return f"'{bundle.path}' may only be read, so the result of '{name}' is not kept in it."
    return ""


def jsonable(value: Any) -> Any:
    """Return ``value`` in JSON's types; numbers it cannot spell become ``"inf"``, ``"nan"``.

    >>> jsonable({"sqnr_db": math.inf, "batches": (1, 2)})
    {'sqnr_db': 'inf', 'batches': [1, 2]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value
