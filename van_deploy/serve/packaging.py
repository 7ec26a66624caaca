"""A bundle packaged for Triton, and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import PackageSettings
from van_deploy.errors import MissingDependency
from van_deploy.serve.triton import package_triton
from van_deploy.serve.triton_check import PackageCheck, check_package

__all__ = ["PackageReport", "package"]


@dataclass(frozen=True)
class PackageReport:
    """A bundle packaged for a server.

    Attributes:
        path: the folder.
        files: how many were written; 0 if it was only checked.
        check: what was found on reading it again; None if that was not possible here.
        skipped: why not; "" otherwise.
    """

    path: Path
    files: int
    check: PackageCheck | None
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing that was checked is wrong."""
        return self.check is None or self.check.passed

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, Any]:
        """Return the findings, ready for JSON."""
        if self.check is None:
            return {"path": str(self.path), "check": f"skipped: {self.skipped}"}
        return self.check.as_dict()


def package(
    bundle: Bundle, output: Path | None, settings: PackageSettings, only_check: bool
) -> PackageReport:
    """Return the package of a bundle, written and checked, or only checked.

    Raises:
        VanDeployError: as :meth:`van_deploy.api.Bundle.package`.
    """
    folder = output or bundle.path.with_name(f"{bundle.path.resolve().name}-triton")
    files = 0
    if not only_check:
        files = len(package_triton(bundle, folder, settings.artefacts, settings).files)
    try:
        return PackageReport(folder, files, check_package(folder, bundle))
    except MissingDependency as error:
        if only_check:
            raise
        return PackageReport(folder, files, None, f"{error.message} {error.remedy}")
