"""The moment a draft counts: one rename, then moves that any later process can finish."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from van_deploy.bundle.lock import PENDING, refuse_links
from van_deploy.documents import json_from, text_from
from van_deploy.errors import BundleError
from van_deploy.files import write_atomic
from van_deploy.manifest import MANIFEST, inside

_GONE = ".gone"


def commit(folder: Path, staging: Path, manifest: str, gone: Sequence[str]) -> None:
    """Make what lies in ``staging`` count: one rename, then the moves.

    Args:
        folder: of the bundle.
        staging: folder inside it, with the new files where they belong.
        manifest: the new manifest's text.
        gone: files of the bundle that the new manifest no longer names.
    """
    write_atomic(staging / MANIFEST, manifest)
    write_atomic(staging / _GONE, json.dumps(gone))
    staging.rename(folder / PENDING)
    finish_commit(folder)


def finish_commit(folder: Path) -> None:
    """Move a committed draft's files to their places; can be repeated at any point."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    refuse_links(folder, pending)
    try:
        _move_in(folder, pending)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise BundleError(
            f"What an interrupted command left in '{pending}' does not fit the bundle: {error}.",
            "Do not use this bundle: van-deploy does not leave it so. Make it again.",
        ) from error


def _move_in(folder: Path, pending: Path) -> None:
    gone = pending / _GONE
    for relative in _names_in(gone) if gone.exists() else []:
        removed = folder / relative
        refuse_links(folder, removed.parent)
        removed.unlink(missing_ok=True)
    files = [path for path in pending.rglob("*") if path.is_file() and path != gone]
    for path in sorted(files, key=lambda path: path.name == MANIFEST):  # the manifest last
        target = folder / path.relative_to(pending)
        refuse_links(folder, target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(pending)


def _names_in(gone: Path) -> list[str]:
    try:
        return [inside(str(name)) for name in json_from(text_from(gone))]
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"'{gone}', of an interrupted command, is damaged: {error}.",
            "Make the bundle again.",
        ) from error
