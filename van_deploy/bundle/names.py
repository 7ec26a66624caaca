"""What lies in a bundle's folder: the names of its own files, and which others are allowed."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from van_deploy.documents import LONGEST_TEXT
from van_deploy.errors import BundleError

__all__ = ["LOCK", "MANIFEST", "PENDING", "SIGNATURE", "STAGING", "inside", "refuse_links"]

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"  # beside the manifest; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"
LONGEST_NAME_BYTES = 255  # of one file, on every file system in use


def inside(relative: str) -> PurePosixPath:
    """Return ``relative`` if it stays inside the bundle.

    Raises:
        BundleError: it is absolute or climbs out.
    """
    path = PurePosixPath(relative)
    too_long = any(len(part.encode(errors="replace")) > LONGEST_NAME_BYTES for part in path.parts)
    if too_long or len(relative) > LONGEST_TEXT or not relative.isprintable():
        raise BundleError(
            f"The manifest names {relative[:100]!r}, which is no name of a file.",
            "Do not use this bundle: its manifest was not written by van-deploy.",
        )
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative:
        raise BundleError(
            f"The manifest names '{relative}', which is outside the bundle.",
            "Do not use this bundle: its manifest was not written by van-deploy.",
        )
    return path


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
