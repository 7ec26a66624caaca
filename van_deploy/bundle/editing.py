"""Edit a bundle in a draft that is committed completely or discarded."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy.bundle.folder import LOCK, PENDING, STAGING, Bundle, commit, finish_commit, locked
from van_deploy.errors import BundleError
from van_deploy.files import file_sha256
from van_deploy.manifest import (
    MANIFEST,
    SCHEMA,
    Artifact,
    Manifest,
    NetworkInfo,
    read_manifest,
    require_relative_path,
)
from van_deploy.provenance import current_timestamp

LOCK_ATTEMPTS = 10


@dataclass
class Draft:
    """Uncommitted changes to a bundle, created by :func:`edit_bundle`.

    Attributes:
        path: the bundle's folder.
        staging: folder for new files until the commit.
        description: of the network; a new bundle needs one before the commit.
        artifacts: by name; see :meth:`record` and :meth:`drop`.
        checks: the latest result of each check, by its name.
        files: SHA-256 of the files that belong to no artifact; the commit adds new ones.
    """

    path: Path
    staging: Path
    description: NetworkInfo | None = None
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def file(self, relative: str) -> Path:
        """Return the path at which to write the bundle's file ``relative``."""
        target = self.staging / require_relative_path(relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def record(self, artifact: Artifact) -> None:
        """Add ``artifact`` to the manifest, and drop artifacts made from its previous version.

        The digests of its ``files`` are computed here; only their names are used.
        """
        files = {relative: file_sha256(self.file(relative)) for relative in artifact.files}
        artifact = artifact.model_copy(update={"files": files})
        self.artifacts[artifact.name] = artifact
        self._drop_made_from(artifact.name, keep=artifact.sha256)

    def drop(self, name: str) -> None:
        """Remove the artifact ``name``, if it exists, its own check, and all made from it."""
        if self.artifacts.pop(name, None) is not None:
            self.checks.pop(f"embedded {name}", None)
            self._drop_made_from(name, keep=None)

    def _drop_made_from(self, name: str, keep: str | None) -> None:
        for other, artifact in list(self.artifacts.items()):
            origin = artifact.made_from
            if origin.name == name and origin.sha256 != keep:
                self.drop(other)

    def manifest(self) -> Manifest:
        """Return the new manifest.

        Raises:
            ValueError: a new bundle has no description.
        """
        if self.description is None:
            raise ValueError("a new bundle needs a description")
        network = {key: getattr(self.description, key) for key in NetworkInfo.model_fields}
        return Manifest(
            schema=SCHEMA,
            written=current_timestamp(),
            artifacts=self.artifacts,
            checks=self.checks,
            files=self.files,
            **network,
        )


@contextlib.contextmanager
def edit_bundle(path: str | Path, *, name: str | None = None) -> Iterator[Draft]:
    """Yield a draft of the bundle at ``path``, and commit its changes on exit without an error.

    Args:
        path: the bundle's folder.
        name: create the bundle with this model name if it does not exist;
            None requires an existing bundle.

    Raises:
        BundleError: the folder contains other files or another model's bundle,
            cannot be created, or is locked by another process for longer
            than :data:`~van_deploy.bundle.folder.LOCK_WAIT_S` seconds.
        OSError: an existing bundle is read-only.
    """
    folder = Path(path)
    with contextlib.ExitStack() as lock:
        created = _acquire_lock(folder, lock, create=name is not None)
        try:
            finish_commit(folder)
            for stale in folder.glob(f"{STAGING}*"):  # of a process that died
                if stale.is_dir():  # rmtree would block on a pipe
                    shutil.rmtree(stale, ignore_errors=True)
            present = read_manifest(folder) if (folder / MANIFEST).exists() else None
            if present and name not in (None, present.name):
                raise BundleError(  # noqa: TRY301 - the handler removes a new folder
                    f"'{folder}' contains the bundle of '{present.name}', not of '{name}'.",
                    "Nothing was written. Use another --output DIR, or remove that bundle first.",
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
                _list_other_files(draft)
                # Parsing the text before the commit ensures that the manifest can be read.
                manifest = read_manifest(folder, draft.manifest().text())
                unchanged = present and present.model_copy(update={"written": manifest.written})
                if manifest == unchanged and not any(staging.iterdir()):
                    return  # a signature stays valid
                old_files = _artifact_files(present.artifacts if present else {})
                removed = old_files - _artifact_files(manifest.artifacts)
                commit(folder, staging, manifest.text(), sorted(removed))
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except BaseException:  # while the lock is held, since another process may wait for it
            if created and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _prepare(folder: Path, *, create: bool) -> bool:
    """Check or create the folder of a bundle; return whether it was created."""
    if not create:
        Bundle.open(folder)
        return False
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        printable = str(folder).encode(errors="replace").decode()
        raise BundleError(
            f"The folder name '{printable}' is not UTF-8; runtimes cannot open files in it.",
            "Rename the folder, or use another --output DIR.",
        ) from None
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"'{folder}' is a file, not a folder.", "Use another --output DIR.")
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        other_files = [
            entry.name
            for entry in folder.iterdir()
            if entry.name not in {MANIFEST, LOCK, PENDING} and not entry.name.startswith(STAGING)
        ]
    except OSError as error:
        raise BundleError(
            f"'{folder}' cannot be written: {error.strerror or error}.",
            "Change its permissions, or use another folder.",
        ) from error
    if other_files and not Bundle.exists(folder):
        raise BundleError(
            f"'{folder}' is not a bundle and contains {', '.join(sorted(other_files)[:3])}.",
            "Nothing was written. Use an empty or a new folder with --output DIR.",
        )
    return created


def _acquire_lock(folder: Path, lock: contextlib.ExitStack, *, create: bool) -> bool:
    """Lock the folder until ``lock`` is closed; return whether the folder was created.

    The process that held the lock before may have failed and removed the new folder together
    with the lock file. The folder is then created again.
    """
    for _ in range(LOCK_ATTEMPTS):
        created = _prepare(folder, create=create)
        with contextlib.ExitStack() as attempt:
            try:
                attempt.enter_context(locked(folder))
            except FileNotFoundError:  # removed while this process waited
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
        f"Other processes create and remove '{folder}' repeatedly.",
        "Wait for them to end, or use another --output DIR.",
    )


def _artifact_files(artifacts: Mapping[str, Artifact]) -> set[str]:
    """Return the relative paths of all files of the artifacts."""
    return {file for artifact in artifacts.values() for file in artifact.files}


def _list_other_files(draft: Draft) -> None:
    """Add files that belong to no artifact, such as a report, to the manifest's ``files``."""
    artifact_files = _artifact_files(draft.artifacts)
    files = {file: sha256 for file, sha256 in draft.files.items() if (draft.path / file).is_file()}
    for path in draft.staging.rglob("*"):
        if path.is_file():
            files[path.relative_to(draft.staging).as_posix()] = file_sha256(path)
    draft.files = {file: files[file] for file in sorted(files) if file not in artifact_files}
