"""Open a bundle, verify files against its manifest, lock its folder, and commit drafts atomically.

A commit is one rename, followed by moves that any later process can finish.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from van_deploy.documents import parse_json, read_text_file
from van_deploy.errors import BundleError
from van_deploy.files import check_external_files, external_files, file_sha256, write_atomic
from van_deploy.manifest import MANIFEST, Artifact, Manifest, read_manifest, require_relative_path

SIGNATURE = "manifest.json.sig"  # in the bundle's folder; see van_deploy.signing
LOCK, PENDING, STAGING = ".lock", ".pending", ".staging-"
_REMOVED = ".gone"  # in a committed draft: the list of files to remove
LOCK_WAIT_S = 60.0


@dataclass(frozen=True)
class Bundle:
    """A bundle opened for reading; :func:`edit_bundle` changes one.

    Attributes:
        path: the folder.
        manifest: its content.
    """

    path: Path
    manifest: Manifest

    @staticmethod
    def exists(path: Path) -> bool:
        """Return whether a path is a bundle, its manifest, or one whose commit was interrupted."""
        folder = path.parent if path.name == MANIFEST else path
        return (folder / MANIFEST).exists() or (folder / PENDING).is_dir()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Return the bundle at ``path``, finishing an interrupted commit first.

        Raises:
            BundleError: there is no bundle, or its manifest cannot be read.
        """
        folder = Path(path)
        if folder.name == MANIFEST:
            folder = folder.parent
        if not folder.is_dir():
            raise BundleError(
                f"There is no bundle at '{path}'.",
                "Create one with `van-deploy export MODEL --output DIR`.",
            )
        if (folder / PENDING).is_dir():
            with locked(folder):
                finish_commit(folder)
        return cls(folder, read_manifest(folder))

    def __fspath__(self) -> str:
        """Return the folder's path."""
        return str(self.path)

    @property
    def name(self) -> str:
        """The model's name, such as ``van_b1``."""
        return self.manifest.name

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """Artifacts by name, in the order of their creation."""
        return self.manifest.artifacts

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file in the manifest, by relative path."""
        digests = dict(self.manifest.files)
        for artifact in self.artifacts.values():
            digests.update(artifact.files)
        return digests

    def artifact(self, name: str) -> Artifact:
        """Return the artifact ``name``.

        Raises:
            BundleError: the bundle has no artifact of that name.
        """
        artifacts = self.artifacts
        if name not in artifacts:
            command = "export" if name == "fp32" else f"quantize {self.path} --precision {name}"
            raise BundleError(
                f"The bundle '{self.path}' has no artifact '{name}'; "
                f"it has: {', '.join(artifacts) or 'none'}.",
                f"Create it with `van-deploy {command}`."
                if name in {"fp32", "fp16", "bf16", "int8"}
                else "Use one of these names, or create the artifact first.",
            )
        return artifacts[name]

    def verified_path(self, name: str, *, only_file: bool = False) -> Path:
        """Return the path of an artifact's file after verifying the digests of its files.

        Args:
            name: of the artifact.
            only_file: verify the main file only.

        Raises:
            BundleError: a file is missing or its digest is not the manifest's, or another command
                changed the bundle since it was opened.
            InputError: the artifact's weights are in a file that is not in the manifest.
        """
        artifact = self.artifact(name)
        for relative, expected in artifact.files.items():
            if relative == artifact.file or not only_file:
                self.verify(relative, expected)
        path = self.path / artifact.file
        if artifact.kind in {"onnx", "serving"}:
            folder = PurePosixPath(artifact.file).parent
            names = [posixpath.relpath(file, folder) for file in artifact.files]
            check_external_files(path, external_files(path), names)
        return path

    def verify(self, relative: str, expected: str) -> None:
        """Check that a file has the SHA-256 ``expected`` (hexadecimal).

        Raises:
            BundleError: the file is missing or has another digest, or another command changed the
                bundle since it was opened.
        """
        path = self.path / relative
        actual = file_sha256(path) if path.is_file() else ""
        if actual == expected:
            return
        if Bundle.open(self.path).manifest != self.manifest:
            raise BundleError(
                f"The bundle '{self.path}' was changed while this command was using it.",
                "Run the command again.",
            )
        raise BundleError(
            f"'{path}' was changed after the manifest was written: "
            f"its SHA-256 is {actual[:12]}..., the manifest has {expected[:12]}...."
            if actual
            else f"'{path}' is in the manifest, but the file is missing.",
            "Restore the file, or create the bundle again with `van-deploy export`.",
        )

    def rebuild_reason(self, name: str, made_with: Mapping[str, Any]) -> str:
        """Return why an artifact has to be built, or "" if it exists with the same cache key.

        Args:
            name: of the artifact.
            made_with: the inputs that determine the artifact (the cache key).
        """
        try:
            artifact = self.artifact(name)
            self.verified_path(name)
        except BundleError as error:
            return error.message if name in self.artifacts else "new"
        new, old = json.loads(json.dumps(made_with)), artifact.made_with
        changed = [key for key in {**new, **old} if new.get(key) != old.get(key)]
        return f"changed since: {', '.join(changed)}" if changed else ""

    def removed_since(self, before: Bundle | None) -> str:
        """Return a remark on the artifacts of an earlier state that are gone; "" if there are none.

        They were made from a graph that was replaced.
        """
        names = [name for name in before.artifacts if name not in self.artifacts] if before else []
        return f"; removed, made from the previous graph: {', '.join(names)}" if names else ""

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each artifact: its main file and its external weights.

        Missing files count as 0; :meth:`problems` lists them.
        """
        return {
            name: sum(
                (self.path / file).stat().st_size
                for file in artifact.files
                if (file == artifact.file or ".onnx" in file) and (self.path / file).is_file()
            )
            for name, artifact in self.artifacts.items()
        }

    def problems(self) -> list[str]:
        """Return one message for each file that is missing or changed."""
        messages = []
        for relative, expected in self.digests.items():
            try:
                self.verify(relative, expected)
            except BundleError as error:  # noqa: PERF203 - report every file
                messages.append(error.message)
        return messages

    def unlisted_files(self) -> list[str]:
        """Return the files in the folder that are not in the manifest, sorted.

        Symbolic links to folders are included.
        """
        listed = {*self.digests, MANIFEST, SIGNATURE, LOCK}
        unlisted = []
        for parent, folders, files in os.walk(self.path):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            paths = [Path(parent, name).relative_to(self.path) for name in (*files, *links)]
            unlisted += [path.as_posix() for path in paths if path.as_posix() not in listed]
        return sorted(unlisted)


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
