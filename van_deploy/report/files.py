"""Writing reports where they belong."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle, writing
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.files import write_atomic
from van_deploy.report.document import Document
from van_deploy.report.render_html import html_from_document
from van_deploy.report.render_markdown import markdown_from_document

if TYPE_CHECKING:
    from van_deploy.checks.drift import DriftReport
    from van_deploy.checks.regression import CheckReport

__all__ = ["REPORT_FILES", "append_summary", "write_drift_plot", "write_junit", "write_report"]

REPORT_FILES = ("report.html", "report.md")


def write_report(document: Document, bundle: Bundle, output: Path | None) -> list[Path]:
    """Write a document as HTML and Markdown and return the two paths.

    Args:
        document: what to write.
        bundle: where to, unless ``output`` is given.
        output: the HTML file; the Markdown goes beside it.

    Raises:
        InputError: ``output`` cannot be written.
        BundleError: the bundle cannot be written.
    """
    texts = (html_from_document(document), markdown_from_document(document))
    if output is None:
        with writing(bundle.path) as draft:
            for name, text in zip(REPORT_FILES, texts, strict=True):
                draft.file(name).write_text(text, encoding="utf-8")
        return [bundle.path / name for name in REPORT_FILES]
    paths = [output, output.with_suffix(".md")]
    if paths[0] == paths[1]:
        raise InputError(
            f"'{output}' is where the Markdown would go.", "Name the HTML file: --output x.html."
        )
    try:
        for path, text in zip(paths, texts, strict=True):
            _write(path, text)
    except OSError as error:
        raise InputError(
            f"'{output}' cannot be written: {error.strerror or error}.",
            "Choose another --output FILE.",
        ) from error
    return paths


def write_junit(report: CheckReport, path: Path) -> None:
    """Write a check as JUnit XML, with the folders it is to be in."""
    from van_deploy.report.junit import junit_from_check

    _write(path, junit_from_check(report))


def append_summary(report: CheckReport, path: Path) -> None:
    """Append a check to a file in GitHub's Markdown, as to ``$GITHUB_STEP_SUMMARY``."""
    from van_deploy.report.sections_checks import check_document

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown_from_document(check_document(plain(report)), level=2))


def write_drift_plot(report: DriftReport, path: Path) -> None:
    """Write the error that each part of each artifact adds as an SVG file of its own."""
    from van_deploy.report.plots import Axis, rows_chart, standalone
    from van_deploy.report.sections_checks import drift_marks

    axis = Axis(f"RMS of the error that each {report.level} adds over RMS of its result", log=True)
    style = resources.files("van_deploy.report").joinpath("style.css").read_text(encoding="utf-8")
    light = style[style.index("{") + 1 : style.index("}")]
    _write(path, standalone(rows_chart(drift_marks(plain(report)), axis), light))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
