"""What lies in a bundle's folder: the names of its own files, and no links."""

from __future__ import annotations

from pathlib import Path

from van_deploy.errors import BundleError
from van_deploy.manifest import MANIFEST

__all__ = ["LOCK", "MANIFEST", "PENDING", "SIGNATURE", "STAGING", "refuse_links"]

SIGNATURE = "manifest.json.sig"  # beside the manifest; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"


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
