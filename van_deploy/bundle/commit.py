"""A bundle's folder: no links, one writer at a time, and the moment at which a draft counts.

That moment is one rename, with moves after it that any later process can finish.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from van_deploy.documents import parse_json, read_text_file
from van_deploy.errors import BundleError
from van_deploy.files import write_atomic
from van_deploy.manifest import MANIFEST, require_relative_path

SIGNATURE = "manifest.json.sig"  # beside the manifest; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"
_GONE = ".gone"  # in a committed draft: which files go
LOCK_WAIT_S = 60.0


def refuse_links(folder: Path, path: Path) -> None:
    """Refuse to write through a link: a bundle from elsewhere could point it anywhere.

    Raises:
        BundleError: ``path``, or a folder between it and the bundle, is a symbolic link.
    """
    while path != folder:
        if path.is_symlink():
            raise BundleError(
                f"'{path}' is a link, and what is behind it would be written to.",
                "Do not use this bundle: van-deploy makes no links.",
            )
        path = path.parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the length of a ``with`` block.

    Raises:
        BundleError: another process holds it for longer than :data:`LOCK_WAIT_S` seconds,
            or its file cannot be written or is a link.
    """
    refuse_links(folder, folder / LOCK)  # taking a lock empties the file
    try:
        with FileLock(folder / LOCK, timeout=LOCK_WAIT_S):
            yield
    except Timeout as error:
        raise BundleError(
            f"Another process has been writing '{folder}' for over {LOCK_WAIT_S:.0f} s.",
            "Wait for it to end, or choose another --output DIR.",
        ) from error
    except (PermissionError, IsADirectoryError) as error:
        raise unwritable(folder, error) from error


def unwritable(folder: Path, error: OSError) -> BundleError:
    """Return what to tell a user whose bundle cannot be written."""
    return BundleError(
        f"'{folder}' cannot be written: {error.strerror or error}.",
        "Choose another --output DIR, or change its permissions.",
    )


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
    gone = pending / _GONE
    try:
        names = (
            [require_relative_path(str(name)) for name in parse_json(read_text_file(gone))]
            if gone.exists()
            else []
        )
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"'{gone}', of an interrupted command, is damaged: {error}.", "Make the bundle again."
        ) from error
    try:
        for removed in (folder / name for name in names):
            refuse_links(folder, removed.parent)
            removed.unlink(missing_ok=True)
        files = [path for path in pending.rglob("*") if path.is_file() and path != gone]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):  # the manifest last
            target = folder / path.relative_to(pending)
            refuse_links(folder, target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(pending)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise BundleError(
            f"What an interrupted command left in '{pending}' does not fit the bundle: {error}.",
            "Do not use this bundle: van-deploy does not leave it so. Make it again.",
        ) from error
