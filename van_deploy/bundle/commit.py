"""Lock a bundle's folder, refuse symbolic links, and commit drafts atomically.

A commit is one rename, followed by moves that any later process can finish.
"""

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

SIGNATURE = "manifest.json.sig"  # in the bundle's folder; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"
_REMOVED = ".gone"  # in a committed draft: the list of files to remove
LOCK_WAIT_S = 60.0


def refuse_links(folder: Path, path: Path) -> None:
    """Refuse to write through a symbolic link, which could point outside the bundle.

    Raises:
        BundleError: ``path``, or a folder between it and the bundle, is a symbolic link.
    """
    while path != folder:
        if path.is_symlink():
            raise BundleError(
                f"'{path}' is a link, and its target would be overwritten.",
                "Do not use this bundle: van-deploy creates no symbolic links.",
            )
        path = path.parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock for the duration of a ``with`` block.

    Raises:
        BundleError: another process holds the lock for longer than :data:`LOCK_WAIT_S` seconds,
            or the lock file is a link.
        OSError: the folder is read-only, or the lock file is a folder.
    """
    refuse_links(folder, folder / LOCK)  # acquiring a lock truncates the file
    try:
        with FileLock(folder / LOCK, timeout=LOCK_WAIT_S):
            yield
    except Timeout as error:
        raise BundleError(
            f"Another process has been writing '{folder}' for over {LOCK_WAIT_S:.0f} s.",
            "Wait for it to end, or use another folder.",
        ) from error


def commit(folder: Path, staging: Path, manifest: str, removed: Sequence[str]) -> None:
    """Commit the files in ``staging``: one rename, then the moves.

    Args:
        folder: of the bundle.
        staging: folder inside it, with the new files at their relative paths.
        manifest: text of the new manifest.
        removed: files of the bundle that are not in the new manifest.
    """
    write_atomic(staging / MANIFEST, manifest)
    write_atomic(staging / _REMOVED, json.dumps(removed))
    staging.rename(folder / PENDING)
    finish_commit(folder)


def finish_commit(folder: Path) -> None:
    """Move a committed draft's files to their final paths; can be repeated after any failure."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    refuse_links(folder, pending)
    listing = pending / _REMOVED
    try:
        text = read_text_file(listing) if listing.exists() else "[]"
        names = [require_relative_path(str(name)) for name in parse_json(text)]
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"'{listing}', of an interrupted command, is damaged: {error}.",
            "Create the bundle again with `van-deploy export`.",
        ) from error
    try:
        for removed in (folder / name for name in names):
            refuse_links(folder, removed.parent)
            removed.unlink(missing_ok=True)
        files = [path for path in pending.rglob("*") if path.is_file() and path != listing]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):  # the manifest last
            target = folder / path.relative_to(pending)
            refuse_links(folder, target.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        shutil.rmtree(pending)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise BundleError(
            f"The pending changes in '{pending}' do not fit the bundle: {error}.",
            "Do not use this bundle: van-deploy did not write these files. Create it again.",
        ) from error
