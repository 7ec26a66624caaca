"""Writing a report where it belongs."""

from __future__ import annotations

from pathlib import Path

from van_deploy.bundle import Bundle, writing
from van_deploy.errors import InputError
from van_deploy.files import write_atomic
from van_deploy.report.document import Document
from van_deploy.report.html import html_of_document
from van_deploy.report.markdown import markdown_of_document

__all__ = ["REPORT_FILES", "write_report"]

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
    texts = (html_of_document(document), markdown_of_document(document))
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
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, text in zip(paths, texts, strict=True):
            write_atomic(path, text)
    except OSError as error:
        raise InputError(
            f"'{output}' cannot be written: {error.strerror or error}.",
            "Choose another --output FILE.",
        ) from error
    return paths
