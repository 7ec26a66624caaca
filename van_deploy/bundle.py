"""A bundle on disk: a folder of artefacts and the manifest that vouches for them.

Writing is all or nothing. A command collects its files in a staging folder
inside the bundle; one ``rename`` of that folder to ``.pending`` is the moment
it counts. The files are then moved to their places, the manifest last, and if
the process dies half-way the next one to open the bundle finishes the moves.
So a reader sees the old bundle or the new one, never a mixture.

Reading believes nothing whose SHA-256 is not the manifest's.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from van_deploy.documents import json_from, text_from
from van_deploy.errors import BundleError
from van_deploy.external_weights import external_files, require_beside
from van_deploy.forms import LONGEST_TEXT
from van_deploy.manifest import Section, require_manifest

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "SIGNATURE",
    "Artefact",
    "Bundle",
    "Draft",
    "content_key",
    "file_sha256",
    "write_atomic",
    "writing",
]

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"  # beside the manifest; see van_deploy.signing
SCHEMA = "van-deploy/bundle/1"
LOCK_WAIT_S = 60.0
LOCK_ATTEMPTS = 10
LONGEST_NAME_BYTES = 255  # of one file, on every file system in use

_LOCK, _PENDING, _STAGING = ".lock", ".pending", ".staging-"


@dataclass(frozen=True)
class Artefact:
    """One thing in a bundle that can be run or read.

    Attributes:
        name: what the manifest calls it: ``fp32``, ``fp16``, ``int8``, or an
            engine's name.
        kind: ``onnx`` or ``engine``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        file: the file to open, relative to the bundle.
        files: every file that belongs to it (external weights, a sidecar), with
            its SHA-256 in hexadecimal.
        made_from: ``name`` and ``sha256`` of what it was made from.
        made_with: everything that decided what is in it; its digest is ``key``.
        key: digest of ``made_with`` (see :func:`content_key`).
        facts: what is worth knowing about it: operator counts, sizes, ranges.
    """

    name: str
    kind: str
    precision: str
    file: str
    files: Mapping[str, str]
    made_from: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file to open."""
        return self.files[self.file]


@dataclass(frozen=True)
class Bundle:
    """A bundle as its manifest describes it, opened for reading.

    Attributes:
        path: the folder.
        manifest: the manifest's contents; not to be changed (see :func:`writing`).
    """

    path: Path
    manifest: Mapping[str, Any]

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
                "Make one with `van-deploy export MODEL --output DIR`.",
            )
        if (folder / _PENDING).is_dir():
            with _locked(folder):
                _finish_commit(folder)
        return cls(folder, _read_manifest(folder))

    @property
    def name(self) -> str:
        """The model's name, such as ``van_b1``."""
        return str(self.manifest["name"])

    @property
    def artefacts(self) -> dict[str, Artefact]:
        """Every artefact by name, in the order they were made."""
        found = self.manifest["artefacts"]
        return {name: Artefact(name=name, **entry) for name, entry in found.items()}

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file the manifest names, artefacts' and others, by relative path."""
        found = dict(self.manifest.get("files", {}))
        for artefact in self.artefacts.values():
            found.update(artefact.files)
        return found

    def artefact(self, name: str) -> Artefact:
        """Return the artefact called ``name``.

        Raises:
            BundleError: the bundle has none of that name.
        """
        artefacts = self.artefacts
        if name not in artefacts:
            command = "export" if name == "fp32" else f"quantize {self.path} --precision {name}"
            raise BundleError(
                f"The bundle '{self.path}' has no artefact '{name}'; "
                f"it has: {', '.join(artefacts) or 'none'}.",
                f"Make it with `van-deploy {command}`."
                if name in {"fp32", "fp16", "int8"}
                else "Choose one of those, or make it first.",
            )
        return artefacts[name]

    def verified(self, name: str, *, only_file: bool = False) -> Path:
        """Return the path of an artefact's file after checking every digest.

        Args:
            name: of the artefact.
            only_file: check the file itself and not what lies beside it.

        Raises:
            BundleError: a file is missing or is not the one the manifest names.
            InputError: the artefact's weights are in a file that the manifest does not name.
        """
        artefact = self.artefact(name)
        for relative, expected in artefact.files.items():
            if relative == artefact.file or not only_file:
                _verify(self.path / relative, expected)
        path = self.path / artefact.file
        if artefact.kind == "onnx":
            folder = PurePosixPath(artefact.file).parent
            named = [file for file in map(PurePosixPath, artefact.files) if folder in file.parents]
            beside = [file.relative_to(folder).as_posix() for file in named]
            require_beside(path, external_files(path), beside)
        return path

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each artefact that a run time loads: its file and its weights.

        What is missing has none; :meth:`problems` names it.
        """
        return {
            name: sum(
                (self.path / file).stat().st_size
                for file in artefact.files
                if (file == artefact.file or ".onnx" in file) and (self.path / file).is_file()
            )
            for name, artefact in self.artefacts.items()
        }

    def problems(self) -> list[str]:
        """Return one sentence for each file that is missing or changed; empty is good."""
        found = []
        for relative, expected in self.digests.items():
            try:
                _verify(self.path / relative, expected)
            except BundleError as error:  # noqa: PERF203 - each file on its own
                found.append(error.message)
        return found

    def unnamed(self) -> list[str]:
        """Return what lies in the folder and is not in the manifest, sorted.

        Links to folders count: what is behind them is not the bundle's.
        """
        known = {*self.digests, MANIFEST, SIGNATURE, _LOCK}
        found = []
        for parent, folders, files in os.walk(self.path):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            paths = [Path(parent, name).relative_to(self.path) for name in (*files, *links)]
            found += [path.as_posix() for path in paths if path.as_posix() not in known]
        return sorted(found)


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
        target = self.staging / _inside(relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def record(self, artefact: Artefact) -> None:
        """Enter ``artefact`` in the manifest, and drop what was made from an older one of its name.

        Its ``files`` are digested here; only their names need to be right.
        """
        entry = {key: value for key, value in vars(artefact).items() if key != "name"}
        entry["files"] = {relative: file_sha256(self.file(relative)) for relative in artefact.files}
        self.manifest["artefacts"][artefact.name] = _plain(entry)
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
            than :data:`LOCK_WAIT_S` seconds.
    """
    folder = Path(path)
    with contextlib.ExitStack() as lock:
        created = _hold(folder, lock, create=name is not None)
        try:
            _finish_commit(folder)
            for left in folder.glob(f"{_STAGING}*"):  # of a process that died
                shutil.rmtree(left, ignore_errors=True)
            manifest = _starting_manifest(folder, name)
            before = _owned_files(manifest)
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
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


def content_key(ingredients: Mapping[str, Any]) -> str:
    """Return the SHA-256 of ``ingredients`` as canonical JSON.

    >>> content_key({"b": 1, "a": [2]}) == content_key({"a": (2,), "b": 1})
    True
    """
    text = json.dumps(ingredients, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
            if entry.name not in {MANIFEST, _LOCK, _PENDING} and not entry.name.startswith(_STAGING)
        ]
    except OSError as error:
        raise _unwritable(folder, error) from error
    if strangers and not (folder / MANIFEST).exists() and not (folder / _PENDING).exists():
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
                attempt.enter_context(_locked(folder))
            except FileNotFoundError:  # removed while this one waited
                continue
            except BaseException:
                if created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                raise
            if (folder / _LOCK).exists():
                lock.push(attempt.pop_all())
                return created
    raise BundleError(
        f"Other processes keep making and removing '{folder}'.",
        "Wait for them to end, or choose another --output DIR.",
    )


def _starting_manifest(folder: Path, name: str | None) -> dict[str, Any]:
    if (folder / MANIFEST).exists():
        manifest = _read_manifest(folder)
        if name is not None and manifest["name"] != name:
            raise BundleError(
                f"'{folder}' holds the bundle of '{manifest['name']}', not of '{name}'.",
                "Nothing was written. Choose another --output DIR, or remove that bundle first.",
            )
        return manifest
    return {"schema": SCHEMA, "name": name, "artefacts": {}, "checks": {}}


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    _refuse_links(folder, folder / _LOCK)  # taking a lock empties the file
    try:
        with FileLock(folder / _LOCK, timeout=LOCK_WAIT_S):
            yield
    except Timeout as error:
        raise BundleError(
            f"Another process has been writing '{folder}' for over {LOCK_WAIT_S:.0f} s.",
            "Wait for it to end, or choose another --output DIR.",
        ) from error
    except (PermissionError, IsADirectoryError) as error:
        raise _unwritable(folder, error) from error


def _unwritable(folder: Path, error: OSError) -> BundleError:
    return BundleError(
        f"'{folder}' cannot be written: {error.strerror or error}.",
        "Choose another --output DIR, or change its permissions.",
    )


def _commit(draft: Draft, before: set[str]) -> None:
    """Make the draft count: one rename, then the moves."""
    draft.manifest["written"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _name_others(draft)
    gone = sorted(before - _owned_files(draft.manifest))
    text = json.dumps(_plain(draft.manifest), indent=2, ensure_ascii=False) + "\n"
    write_atomic(draft.staging / MANIFEST, text)
    write_atomic(draft.staging / ".gone", json.dumps(gone))
    draft.staging.rename(draft.path / _PENDING)
    _finish_commit(draft.path)


def _names_in(gone: Path) -> list[str]:
    try:
        return [str(name) for name in json_from(text_from(gone))]
    except (OSError, ValueError, TypeError) as error:
        raise BundleError(
            f"'{gone}', of an interrupted command, is damaged: {error}.",
            "Make the bundle again.",
        ) from error


def _name_others(draft: Draft) -> None:
    """Enter files that belong to no artefact, such as a report, in the manifest's ``files``."""
    owned = _owned_files(draft.manifest)
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


def _finish_commit(folder: Path) -> None:
    """Move a committed draft's files to their places; can be repeated at any point."""
    pending = folder / _PENDING
    if not pending.is_dir():
        return
    _refuse_links(folder, pending)
    try:
        _move_in(folder, pending)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
        raise BundleError(
            f"What an interrupted command left in '{pending}' does not fit the bundle: {error}.",
            "Do not use this bundle: van-deploy does not leave it so. Make it again.",
        ) from error


def _move_in(folder: Path, pending: Path) -> None:
    gone = pending / ".gone"
    for relative in _names_in(gone) if gone.exists() else []:
        removed = folder / _inside(relative)
        _refuse_links(folder, removed.parent)
        removed.unlink(missing_ok=True)
    files = [path for path in pending.rglob("*") if path.is_file() and path != gone]
    for path in sorted(files, key=lambda path: path.name == MANIFEST):  # the manifest last
        target = folder / path.relative_to(pending)
        _refuse_links(folder, target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(pending)


def _refuse_links(folder: Path, path: Path) -> None:
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


def _owned_files(manifest: Mapping[str, Any]) -> set[str]:
    return {file for entry in manifest["artefacts"].values() for file in entry["files"]}


def _read_manifest(folder: Path) -> dict[str, Any]:
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
                _inside(relative)
            artefact.sha256  # noqa: B018 - the file to open must be among the files
        for relative, sha256 in manifest.get("files", {}).items():
            _inside(relative)
            str.lower(sha256)  # a digest is text
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"The manifest '{path}' is damaged: {type(error).__name__}: {error}.",
            "Export the model again; nothing in this bundle can be trusted.",
        ) from error
    return manifest


def _inside(relative: str) -> PurePosixPath:
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


def _verify(path: Path, expected: str) -> None:
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


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON types (tuples as lists, mappings as dicts, paths as text)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value
