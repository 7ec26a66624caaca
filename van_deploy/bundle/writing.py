"""A draft of a bundle: written beside it, committed whole or thrown away."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from van_deploy.bundle.artefact import Artefact
from van_deploy.bundle.commit import commit, finish_commit
from van_deploy.bundle.lock import locked, unwritable
from van_deploy.bundle.names import LOCK, MANIFEST, PENDING, STAGING, inside
from van_deploy.bundle.reading import Bundle
from van_deploy.bundle.record import SCHEMA, owned_files, plain, read_manifest
from van_deploy.errors import BundleError
from van_deploy.files import file_sha256

__all__ = ["Draft", "writing"]

LOCK_ATTEMPTS = 10


@dataclass
class Draft:
    """Changes to a bundle that are not there yet. Made by :func:`writing`.

    Attributes:
        path: the bundle's folder.
        staging: where new files are written until the end.
        manifest: the manifest to be, free to change.
    """

    path: Path
    staging: Path
    manifest: dict[str, Any]

    def file(self, relative: str) -> Path:
        """Return where to write the file that will be ``relative`` in the bundle."""
        target = self.staging / inside(relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def record(self, artefact: Artefact) -> None:
        """Enter ``artefact`` in the manifest, and drop what was made from an older one of its name.

        Its ``files`` are digested here; only their names need to be right.
        """
        entry = {key: value for key, value in vars(artefact).items() if key != "name"}
        entry["files"] = {relative: file_sha256(self.file(relative)) for relative in artefact.files}
        self.manifest["artefacts"][artefact.name] = plain(entry)
        sha256 = entry["files"][artefact.file]
        self._drop_made_from(artefact.name, keep=sha256)

    def drop(self, name: str) -> None:
        """Remove the artefact called ``name``, if there, and all that was made from it."""
        if self.manifest["artefacts"].pop(name, None) is not None:
            self._drop_made_from(name, keep=None)

    def _drop_made_from(self, name: str, keep: str | None) -> None:
        for other, entry in list(self.manifest["artefacts"].items()):
            origin = entry.get("made_from", {})
            if origin.get("name") == name and origin.get("sha256") != keep:
                self.drop(other)


@contextlib.contextmanager
def writing(path: str | Path, *, name: str | None = None) -> Iterator[Draft]:
    """Give a draft of the bundle at ``path``; commit it on leaving without an error.

    Args:
        path: the bundle's folder.
        name: create the bundle under this model name if it is not there yet;
            None requires it to be there.

    Raises:
        BundleError: the folder holds something else or another model's bundle,
            cannot be written, or is being written by another process for longer
            than :data:`~van_deploy.bundle.lock.LOCK_WAIT_S` seconds.
    """
    folder = Path(path)
    with contextlib.ExitStack() as lock:
        created = _hold(folder, lock, create=name is not None)
        try:
            finish_commit(folder)
            for left in folder.glob(f"{STAGING}*"):  # of a process that died
                if left.is_dir():  # rmtree would wait for a pipe
                    shutil.rmtree(left, ignore_errors=True)
            manifest = _starting_manifest(folder, name)
            before = owned_files(manifest)
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
            try:
                draft = Draft(folder, staging, copy.deepcopy(manifest))
                yield draft
                _commit(draft, before)
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
            f"The name of the folder '{shown}' is not UTF-8; run times cannot open files there.",
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


def _starting_manifest(folder: Path, name: str | None) -> dict[str, Any]:
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if name is not None and manifest["name"] != name:
            raise BundleError(
                f"'{folder}' holds the bundle of '{manifest['name']}', not of '{name}'.",
                "Nothing was written. Choose another --output DIR, or remove that bundle first.",
            )
        return manifest
    return {"schema": SCHEMA, "name": name, "artefacts": {}, "checks": {}}


def _commit(draft: Draft, before: set[str]) -> None:
    draft.manifest["written"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _name_others(draft)
    text = json.dumps(plain(draft.manifest), indent=2, ensure_ascii=False) + "\n"
    commit(draft.path, draft.staging, text, sorted(before - owned_files(draft.manifest)))


def _name_others(draft: Draft) -> None:
    """Enter files that belong to no artefact, such as a report, in the manifest's ``files``."""
    owned = owned_files(draft.manifest)
    kept = {
        relative: sha256
        for relative, sha256 in draft.manifest.get("files", {}).items()
        if relative not in owned and (draft.path / relative).is_file()
    }
    staged = {
        path.relative_to(draft.staging).as_posix(): path
        for path in draft.staging.rglob("*")
        if path.is_file()
    }
    new = {name: file_sha256(path) for name, path in staged.items() if name not in owned}
    draft.manifest["files"] = dict(sorted({**kept, **new}.items()))
