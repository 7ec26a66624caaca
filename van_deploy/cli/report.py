"""``van-deploy report``: a bundle's whole story as one HTML file, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit
from van_deploy.cli.shared import BundlePath, opened

__all__ = ["report"]


def report(
    bundle: BundlePath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The HTML file; report.html in the bundle by default. The Markdown goes beside "
            "it, with the suffix .md.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML file, and the same as Markdown, about a bundle.

    Example: van-deploy report dist/van_b1
    """
    from van_deploy.report.document import Facts, Notice
    from van_deploy.report.figures import bytes_text

    written = opened(bundle, None).report(output)
    sizes = {f"wrote {path}": bytes_text(size) for path, size in written.sizes.items()}
    emit(written, as_json, lambda _: [Notice(written.verdict, written.checks), Facts(sizes)])
