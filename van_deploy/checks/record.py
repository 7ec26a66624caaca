"""Results of checks, kept in the bundle's manifest beside the digests they are true of."""

from __future__ import annotations

import errno

from van_deploy.bundle import Bundle, writing
from van_deploy.documents import plain

__all__ = ["record_check"]

MAY_NOT_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


def record_check(bundle: Bundle, name: str, result: object) -> str:
    """Write the result of a check into the manifest, with the digests of the artefacts.

    A bundle that may only be read keeps no record; the check is worth no less for it.

    Args:
        bundle: what was checked.
        name: of the check, such as ``verify``.
        result: the report.

    Returns:
        Why nothing was recorded, a sentence, or "".

    Raises:
        BundleError: the bundle was changed while it was checked.
    """
    digests = {key: artefact.sha256 for key, artefact in bundle.artefacts.items()}
    try:
        with writing(bundle.path) as draft:
            draft.checks[name] = {**plain(result), "artefacts_sha256": digests}
    except OSError as error:
        if error.errno not in MAY_NOT_WRITE:
            raise
        return f"'{bundle.path}' may only be read, so the result of '{name}' is not kept in it."
    return ""
