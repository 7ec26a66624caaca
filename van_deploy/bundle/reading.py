"""A bundle opened for reading. Nothing is believed whose SHA-256 is not the manifest's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from van_deploy.bundle.commit import LOCK, PENDING, SIGNATURE, finish_commit, locked
from van_deploy.errors import BundleError
from van_deploy.files import check_external_files, external_files, file_sha256
from van_deploy.manifest import MANIFEST, Artifact, Manifest, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle as its manifest describes it, opened for reading.

    Attributes:
        path: the folder.
        manifest: what it says (to change it, see :func:`edit_bundle`).
    """

    path: Path
    manifest: Manifest

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
        """Every artifact by name, in the order they were made."""
        return self.manifest.artifacts

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of every file the manifest names, artifacts' and others, by relative path."""
        found = dict(self.manifest.files)
        for artifact in self.artifacts.values():
            found.update(artifact.files)
        return found

    def artifact(self, name: str) -> Artifact:
        """Return the artifact called ``name``.

        Raises:
            BundleError: the bundle has none of that name.
        """
        artifacts = self.artifacts
        if name not in artifacts:
            command = "export" if name == "fp32" else f"quantize {self.path} --precision {name}"
            raise BundleError(
                f"The bundle '{self.path}' has no artifact '{name}'; "
                f"it has: {', '.join(artifacts) or 'none'}.",
                f"Make it with `van-deploy {command}`."
                if name in {"fp32", "fp16", "bf16", "int8"}
                else "Choose one of those, or make it first.",
            )
        return artifacts[name]

    def verified_path(self, name: str, *, only_file: bool = False) -> Path:
        """Return the path of an artifact's file after checking every digest.

        Args:
            name: of the artifact.
            only_file: check the file itself and not what lies beside it.

        Raises:
            BundleError: a file is missing or is not the one the manifest names.
            InputError: the artifact's weights are in a file that the manifest does not name.
        """
        artifact = self.artifact(name)
        for relative, expected in artifact.files.items():
            if relative == artifact.file or not only_file:
                verify(self.path / relative, expected)
        path = self.path / artifact.file
        if artifact.kind == "onnx":
            folder = PurePosixPath(artifact.file).parent
            named = [file for file in map(PurePosixPath, artifact.files) if folder in file.parents]
            beside = [file.relative_to(folder).as_posix() for file in named]
            check_external_files(path, external_files(path), beside)
        return path

    def rebuild_reason(self, name: str, made_with: Mapping[str, Any]) -> str:
        """Return why an artifact has to be made, or "" if it is there from the same ingredients.

        Args:
            name: of the artifact.
            made_with: everything that decides what will be in it.
        """
        try:
            artifact = self.artifact(name)
            self.verified_path(name)
        except BundleError as error:
            return error.message if name in self.artifacts else "new"
        wanted, had = json.loads(json.dumps(made_with)), artifact.made_with
        changed = [key for key in {**wanted, **had} if wanted.get(key) != had.get(key)]
        return f"changed since: {', '.join(changed)}" if changed else ""

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each artifact that a runtime loads: its file and its weights.

        What is missing has none; :meth:`problems` names it.
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
        """Return one sentence for each file that is missing or changed; empty is good."""
        found = []
        for relative, expected in self.digests.items():
            try:
                verify(self.path / relative, expected)
            except BundleError as error:  # noqa: PERF203 - each file on its own
                found.append(error.message)
        return found

    def unlisted_files(self) -> list[str]:
        """Return what lies in the folder and is not in the manifest, sorted.

        Links to folders count: what is behind them is not the bundle's.
        """
        known = {*self.digests, MANIFEST, SIGNATURE, LOCK}
        found = []
        for parent, folders, files in os.walk(self.path):
            links = [name for name in folders if Path(parent, name).is_symlink()]
            paths = [Path(parent, name).relative_to(self.path) for name in (*files, *links)]
            found += [path.as_posix() for path in paths if path.as_posix() not in known]
        return sorted(found)


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
