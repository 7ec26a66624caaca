"""A bundle packaged for Triton, and checked."""

from __future__ import annotations

from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.config import PackageSettings
from van_deploy.errors import MissingDependency
from van_deploy.results import PackageReport
from van_deploy.serve.triton import package_triton
from van_deploy.serve.triton_check import check_package

__all__ = ["package"]


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
