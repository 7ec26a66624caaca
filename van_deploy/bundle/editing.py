"""A draft of a bundle: written beside it, committed whole or thrown away."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy.bundle.commit import (
    LOCK,
    PENDING,
    STAGING,
    commit,
    finish_commit,
    locked,
    unwritable,
)
from van_deploy.bundle.reading import Bundle
from van_deploy.errors import BundleError
from van_deploy.files import file_sha256
from van_deploy.manifest import (
    MANIFEST,
    SCHEMA,
    Artifact,
    Manifest,
    NetworkInfo,
    manifest_from,
    read_manifest,
    require_relative_path,
)
from van_deploy.provenance import current_timestamp

LOCK_ATTEMPTS = 10


@dataclass
class Draft:
    """Changes to a bundle that are not there yet. Made by :func:`edit_bundle`; free to change.

    Attributes:
        path: the bundle's folder.
        staging: where new files are written until the end.
        description: of the network; a new bundle has none, and needs one before the end.
        artifacts: by name; see :meth:`record` and :meth:`drop`.
        checks: the newest result of each check, by its name.
        files: SHA-256 of the files that belong to no artifact; new ones are found by themselves.
    """

    path: Path
    staging: Path
    description: NetworkInfo | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def file(self, relative: str) -> Path:
        """Return where to write the file that will be ``relative`` in the bundle."""
        target = self.staging / require_relative_path(relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def record(self, artifact: Artifact) -> None:
        """Enter ``artifact`` in the manifest, and drop what was made from an older one of its name.

        Its ``files`` are digested here; only their names need to be right.
        """
        files = {relative: file_sha256(self.file(relative)) for relative in artifact.files}
        artifact = artifact.model_copy(update={"files": files})
        self.artifacts[artifact.name] = artifact
        self._drop_made_from(artifact.name, keep=artifact.sha256)

    def drop(self, name: str) -> None:
        """Remove the artifact called ``name``, if there, and all that was made from it."""
        if self.artifacts.pop(name, None) is not None:
            self._drop_made_from(name, keep=None)

    def _drop_made_from(self, name: str, keep: str | None) -> None:
        for other, artifact in list(self.artifacts.items()):
            origin = artifact.made_from
            if origin.name == name and origin.sha256 != keep:
                self.drop(other)

    def manifest(self) -> Manifest:
        """Return the manifest to be.

        Raises:
            ValueError: a new bundle was not given a description.
        """
        if self.description is None:
            raise ValueError("a new bundle needs a description")
        described = {key: getattr(self.description, key) for key in NetworkInfo.model_fields}
        return Manifest(
            schema=SCHEMA,
            written=current_timestamp(),
            artifacts=self.artifacts,
            checks=self.checks,
            files=self.files,
            **described,
        )


@contextlib.contextmanager
def edit_bundle(path: str | Path, *, name: str | None = None) -> Iterator[Draft]:
    """Give a draft of the bundle at ``path``; commit it on leaving without an error.

    Args:
        path: the bundle's folder.
        name: create the bundle under this model name if it is not there yet;
            None requires it to be there.

    Raises:
        BundleError: the folder holds something else or another model's bundle,
            cannot be written, or is being written by another process for longer
            than :data:`~van_deploy.bundle.commit.LOCK_WAIT_S` seconds.
    """
    folder = Path(path)
    with contextlib.ExitStack() as lock:
        created = _hold(folder, lock, create=name is not None)
        try:
            finish_commit(folder)
            for left in folder.glob(f"{STAGING}*"):  # of a process that died
                if left.is_dir():  # rmtree would wait for a pipe
                    shutil.rmtree(left, ignore_errors=True)
            present = read_manifest(folder) if (folder / MANIFEST).exists() else None
            if present and name not in (None, present.name):
                raise BundleError(  # noqa: TRY301 - a folder made just now goes again
                    f"'{folder}' holds the bundle of '{present.name}', not of '{name}'.",
                    "Nothing was written. Choose another --output DIR, or remove that bundle "
                    "first.",
                )
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
            try:
                draft = Draft(folder, staging)
                if present:
                    draft.description = present
                    draft.artifacts |= present.artifacts
                    draft.checks |= present.checks
                    draft.files |= present.files
                yield draft
                _name_others(draft)
                # Read back before it counts: what is written can be read, and written again.
                manifest = manifest_from(draft.manifest().text(), folder / MANIFEST)
                gone = _owned(present.artifacts if present else {}) - _owned(manifest.artifacts)
                commit(folder, staging, manifest.text(), sorted(gone))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except BaseException:  # while the lock is held: the next process may be waiting for it
            if created and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _prepare(folder: Path, *, create: bool) -> bool:
    """Make sure ``folder`` can hold the bundle; return whether it was made just now."""
    if not create:
        Bundle.open(folder)
        return False
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        shown = str(folder).encode(errors="replace").decode()
        raise BundleError(
            f"The name of the folder '{shown}' is not UTF-8; runtimes cannot open files there.",
            "Rename it, or choose another --output DIR.",
        ) from None
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"'{folder}' is a file, not a folder.", "Choose another --output DIR.")
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [
            entry.name
            for entry in folder.iterdir()
            if entry.name not in {MANIFEST, LOCK, PENDING} and not entry.name.startswith(STAGING)
        ]
    except OSError as error:
        raise unwritable(folder, error) from error
    if strangers and not (folder / MANIFEST).exists() and not (folder / PENDING).exists():
        raise BundleError(
            f"'{folder}' holds something else ({', '.join(sorted(strangers)[:3])}) and no bundle.",
            "Nothing was written. Choose an empty or a new folder with --output DIR.",
        )
    return created


def _hold(folder: Path, lock: contextlib.ExitStack, *, create: bool) -> bool:
    """Lock the folder for as long as ``lock`` lives; return whether the folder was made just now.

    The process that held it before may have made the folder, failed, and removed it
    with the file that this one was waiting for: then it is made again.
    """
    for _ in range(LOCK_ATTEMPTS):
        created = _prepare(folder, create=create)
        with contextlib.ExitStack() as attempt:
            try:
                attempt.enter_context(locked(folder))
            except FileNotFoundError:  # removed while this one waited
                continue
            except BaseException:
                if created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                raise
            if (folder / LOCK).exists():
                lock.push(attempt.pop_all())
                return created
    raise BundleError(
        f"Other processes keep making and removing '{folder}'.",
        "Wait for them to end, or choose another --output DIR.",
    )


def _owned(artifacts: Mapping[str, Artifact]) -> set[str]:
    """Return the files that belong to an artifact, by relative path."""
    return {file for artifact in artifacts.values() for file in artifact.files}


def _name_others(draft: Draft) -> None:
    """Enter files that belong to no artifact, such as a report, in the manifest's ``files``."""
    owned = _owned(draft.artifacts)
    files = {file: sha256 for file, sha256 in draft.files.items() if (draft.path / file).is_file()}
    for path in draft.staging.rglob("*"):
        if path.is_file():
            files[path.relative_to(draft.staging).as_posix()] = file_sha256(path)
    draft.files = {file: files[file] for file in sorted(files) if file not in owned}
