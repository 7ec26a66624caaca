"""Writing reports where they belong: into a bundle, a job's summary, or a CI server's JUnit."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle, writing
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.files import write_atomic
from van_deploy.report.document import Document
from van_deploy.report.render_html import html_from_document
from van_deploy.report.render_markdown import markdown_from_document
from van_deploy.report.sections_checks import check_blocks, counts_text

if TYPE_CHECKING:
    from van_deploy.checks.regression import CheckReport, CheckRow


def write_report(document: Document, bundle: Bundle, output: Path | None) -> list[Path]:
    """Write a document as HTML and Markdown and return the two paths.

    Args:
        document: what to write.
        bundle: where to, unless ``output`` is given.
        output: the HTML file; the Markdown goes beside it.

    Raises:
        InputError: ``output`` is called as the Markdown would be, or cannot be written.
        BundleError: the bundle cannot be written.
    """
    page = output or bundle.path / "report.html"
    other = page.with_suffix(".md")
    if page == other:
        raise InputError(f"'{page}' is where the Markdown would go.", "Name the HTML file x.html.")
    texts = {page: html_from_document(document), other: markdown_from_document(document)}
    if output is None:
        with writing(bundle.path) as draft:
            for path, text in texts.items():
                draft.file(path.name).write_text(text, encoding="utf-8")
    else:
        for path, text in texts.items():
            write_text(path, text)
    return list(texts)


def append_summary(report: CheckReport, path: Path) -> None:
    """Append a check to a file in GitHub's Markdown, as to ``$GITHUB_STEP_SUMMARY``."""
    entry = plain(report)
    document = Document(
        title=f"van-deploy: {report.model} {'passed' if report.passed else 'failed'}",
        subtitle=report.images,
        state="PASS" if report.passed else "FAIL",
        note=counts_text(entry),
        sections={"Gates and baseline": check_blocks(entry)},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown_from_document(document, level=2))


def write_junit(report: CheckReport, path: Path) -> None:
    """Write a check as JUnit XML, which every CI server reads: a suite a kind of row.

    What was not shown and nobody allowed is a failure there, as it is for the exit code.
    """
    root = ElementTree.Element("testsuites", name="van-deploy check")
    for kind, rows in groupby(sorted(report.rows, key=_kind), key=_kind):
        suite = ElementTree.SubElement(root, "testsuite", name=f"{report.model}.{kind}")
        for row in rows:
            found, name = row.finding, row.name.partition("/")[2]
            place = {"classname": f"{report.model}.{kind}", "name": name, "time": "0"}
            case = ElementTree.SubElement(suite, "testcase", place)
            if not report.allowed.holds(found):
                words = {"skipped": "not checked: ", "inconclusive": "undecided: "}
                message = f"{words.get(row.finding.outcome.value, '')}{found.message}"
                failure = ElementTree.SubElement(case, "failure", message=message, type="gate")
                failure.text = f"baseline {row.baseline}, now {found.value}: {message}"
            elif row.finding.outcome.value != "pass":
                ElementTree.SubElement(case, "skipped", message=found.message)
    for element in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped",) * 2):
            element.set(attribute, str(len(element.findall(f".//{tag}"))))
        element.set("errors", "0")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _kind(row: CheckRow) -> str:
    return row.name.partition("/")[0]


def write_text(path: Path, text: str) -> None:
    """Write a file that somebody asked for, and its folder.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise InputError(
            f"'{path}' cannot be written: {error.strerror or error}.", "Choose another file."
        ) from error
