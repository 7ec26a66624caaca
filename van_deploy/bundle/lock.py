"""A bundle's folder: the names of its own files, no links, and one writer at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from van_deploy.errors import BundleError

SIGNATURE = "manifest.json.sig"  # beside the manifest; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"
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
