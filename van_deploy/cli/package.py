"""``van-deploy package``: a bundle as a Triton model repository, and its check."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark
from van_deploy.cli.options import with_options
from van_deploy.cli.shared import BundlePath, RequireSignature, opened
from van_deploy.config import PackageSettings
from van_deploy.errors import GateFailed

__all__ = ["Server", "package"]


class Server(str, enum.Enum):
    """What a package can be for."""

    TRITON = "triton"


@with_options
def package(
    server: Annotated[Server, typer.Argument(help="What serves it.")],
    bundle: BundlePath,
    settings: PackageSettings,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the package; BUNDLE-triton by default."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; check the package that is there.")
    ] = False,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Write a Triton model repository with its configuration, client and manifests.

    Example: van-deploy package triton dist/van_b1 --output dist/van_b1-triton
    """
    report = opened(bundle, require_signature).package(output, settings, only_check=check)
    if report.files:
        remark(f"Wrote {report.files} files to {report.path}.")
    from van_deploy.report.document import checks_table

    findings = report.findings
    emit(report, as_json, lambda _: checks_table((f.outcome, f.name, f.detail) for f in findings))
    if not report:
        wrong = ", ".join(finding.name for finding in findings if finding.outcome is False)
        raise GateFailed(
            f"The package '{report.path}' is not what the bundle says: {wrong}.",
            "Package the bundle again.",
        )
