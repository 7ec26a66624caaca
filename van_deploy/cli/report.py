"""``van-deploy report``: a bundle's whole story as one HTML file, and as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["report"]


def report(
    bundle: Annotated[Path, typer.Argument(help="A bundle, such as dist/van_b1.")],
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
    from van_deploy.bundle import Bundle
    from van_deploy.report.content import document_of
    from van_deploy.report.files import write_report

    opened = Bundle.open(bundle)
    document = document_of(opened)
    files = write_report(document, opened, output)
    result = {
        "verdict": document.verdict,
        "checks": document.verdict_note,
        "files": {str(path): path.stat().st_size for path in files},
    }
    emit(result, as_json, _table)


def _table(result: dict[str, Any]) -> RenderableType:
    from van_deploy.report.tables import bytes_text, facts_table, verdict

    sizes = {f"wrote {path}": bytes_text(size) for path, size in result["files"].items()}
    return facts_table({verdict(result["verdict"]).plain: result["checks"], **sizes})
