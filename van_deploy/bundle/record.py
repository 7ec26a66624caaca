"""The manifest as a file: reading it, and what it says of the other files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from van_deploy.bundle.artefact import Artefact
from van_deploy.bundle.names import MANIFEST, inside
from van_deploy.documents import json_from, text_from
from van_deploy.errors import BundleError
from van_deploy.files import file_sha256
from van_deploy.manifest import Section, require_manifest

__all__ = ["SCHEMA", "owned_files", "plain", "read_manifest", "verify"]

SCHEMA = "van-deploy/bundle/1"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of the bundle in ``folder``; its form is checked, not its files.

    Raises:
        BundleError: there is none, it is damaged, of another schema, or names files outside.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST}.",
            "Make one with `van-deploy export MODEL --output DIR`.",
        )
    try:
        manifest = json_from(text_from(path), Section)
        if manifest["schema"] != SCHEMA:
            raise BundleError(
                f"'{path}' has schema '{manifest['schema']}'; this version reads '{SCHEMA}'.",
                "Export the model again with this version of van-deploy.",
            )
        require_manifest(manifest)
        for name, entry in manifest["artefacts"].items():
            artefact = Artefact(name=name, **entry)
            for relative in (artefact.file, *artefact.files):
                inside(relative)
            artefact.sha256  # noqa: B018 - the file to open must be among the files
        for relative, sha256 in manifest.get("files", {}).items():
            inside(relative)
            str.lower(sha256)  # a digest is text
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"The manifest '{path}' is damaged: {type(error).__name__}: {error}.",
            "Export the model again; nothing in this bundle can be trusted.",
        ) from error
    return manifest


def owned_files(manifest: Mapping[str, Any]) -> set[str]:
    """Return the files that belong to an artefact, by relative path."""
    return {file for entry in manifest["artefacts"].values() for file in entry["files"]}


def verify(path: Path, expected: str) -> None:
    """Return if the file at ``path`` has the SHA-256 ``expected`` (hexadecimal).

    Raises:
        BundleError: it is missing or has another.
    """
    if not path.is_file():
        raise BundleError(
            f"'{path}' is named in the manifest and missing.", "Make the bundle again."
        )
    actual = file_sha256(path)
    if actual != expected:
        raise BundleError(
            f"'{path}' was changed after the manifest was written: "
            f"its SHA-256 is {actual[:12]}..., the manifest says {expected[:12]}....",
            "Make the bundle again, or restore the file.",
        )


def plain(value: Any) -> Any:
    """Return ``value`` as JSON types (tuples as lists, mappings as dicts, paths as text)."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
