"""A bundle packaged for Triton, and whether a package is still what was written."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from van_deploy.bundle import Bundle
from van_deploy.config import PackageSettings
from van_deploy.errors import InputError, UsageError, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.schema import Versioned, read_versioned
from van_deploy.serve.triton import write_repository
from van_deploy.serve.triton_model import triton_models, usual_artefacts
from van_deploy.serve.triton_release import chosen_release, release_named

PACKAGE_FILE = "package.json"
AGAIN = "Package the bundle again."


class PackageRecord(Versioned):
    """``package.json``: what a package holds and where it came from.

    Attributes:
        bundle: the model's name.
        release: of Triton.
        backend: of ONNX artefacts.
        models: of each model, the artefact behind each file of its version.
        files: SHA-256 of every file, by its path in the package.
    """

    schema_: Literal["van-deploy/triton/2"] = Field(alias="schema")
    bundle: str
    release: str
    backend: str
    models: dict[str, dict[str, str]]
    files: dict[str, str]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: of the model and the check.
        outcome: whether it is as it should be; None if that could not be checked.
        detail: what was found.
    """

    name: str
    outcome: bool | None
    detail: str


@dataclass(frozen=True)
class PackageReport:
    """A package that was written, or only checked.

    Attributes:
        path: the folder.
        files: how many were written.
        findings: what was found on reading it again.
    """

    path: Path
    files: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.outcome is not False for finding in self.findings)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed


def package(
    bundle: Bundle, output: Path | None, settings: PackageSettings, only_check: bool
) -> PackageReport:
    """Return the package of a bundle, written and checked, or only checked.

    The folder appears whole; an older package there is replaced, anything else is refused.

    Raises:
        BundleError: an artefact is missing or was changed.
        ConversionError: the packages of an execution environment cannot be had.
        InputError: Triton cannot load an artefact, or there is no package to check.
        MissingDependency: Triton's schema is not installed.
        UsageError: ``output`` holds something else, or the release cannot load a model.
    """
    folder = output or bundle.path.with_name(f"{bundle.path.resolve().name}-triton")
    if only_check:
        return check_package(folder, bundle)
    artefacts = settings.artefacts or usual_artefacts(bundle)
    models = triton_models(bundle, artefacts, settings.backend)
    release = chosen_release(models, settings.triton_release)
    if folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not (folder / PACKAGE_FILE).is_file()
    ):
        raise UsageError(
            f"'{folder}' holds something else and no package.",
            "Nothing was written. Choose an empty or a new folder with --output DIR.",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        made = Path(workshop) / "package"
        write_repository(made, models, settings, release)
        record = PackageRecord(
            schema="van-deploy/triton/2",
            bundle=bundle.name,
            release=release.name,
            backend=settings.backend,
            models={m.name: {file: name for file, (_, name) in m.files.items()} for m in models},
            files={
                path.relative_to(made).as_posix(): file_sha256(path)
                for path in sorted(made.rglob("*"))
                if path.is_file()
            },
        )
        (made / PACKAGE_FILE).write_text(record.text(), encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(workshop) / "old")
        os.replace(made, folder)
    return PackageReport(folder, len(record.files) + 1, check_package(folder, bundle).findings)


def check_package(path: Path, bundle: Bundle) -> PackageReport:
    """Return whether the files in ``path`` are those that were written, and the bundle's still.

    Raises:
        InputError: there is no package, or it is another bundle's.
    """
    given = (PackageRecord, path / PACKAGE_FILE, "package record", InputError)
    record = read_versioned(*given, AGAIN)
    if record.bundle != bundle.name:
        raise InputError(
            f"'{path}' was made from '{record.bundle}', not from '{bundle.name}'.", AGAIN
        )
    wrong = [file for file, digest in record.files.items() if _digest(path / file) != digest]
    known = {*record.files, PACKAGE_FILE}
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    wrong += sorted(found - known)
    text = f"{', '.join(wrong)}: missing, changed or added" if wrong else "as they were written"
    findings = [Finding("files", not wrong, text)]
    release, written = release_named(record.release), set(record.files.values())
    for name, sources in record.models.items():
        try:
            (model,) = triton_models(bundle, tuple(sources.values()), record.backend)
        except VanDeployError as error:
            findings.append(Finding(f"{name}: artefact", False, error.message))
            continue
        old = [file for file, (source, _) in model.files.items() if _digest(source) not in written]
        text = f"{', '.join(old)}: made anew in the bundle since" if old else "the bundle's"
        findings.append(Finding(f"{name}: artefact", not old, text))
        findings.append(Finding(f"{name}: release", *release.judged(model)))
    return PackageReport(path, 0, tuple(findings))


def _digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""
