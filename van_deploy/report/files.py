"""Writing reports where they belong."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.bundle import Bundle, writing
from van_deploy.documents import plain
from van_deploy.errors import InputError
from van_deploy.files import write_atomic
from van_deploy.report.document import Document, Section
from van_deploy.report.plots import Axis, rows_chart
from van_deploy.report.render_html import STYLE, html_from_document
from van_deploy.report.render_markdown import markdown_from_document
from van_deploy.report.sections_checks import check_blocks, counts_text, drift_marks

if TYPE_CHECKING:
    from van_deploy.checks.drift import DriftReport
    from van_deploy.checks.regression import CheckReport, CheckRow


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
    page = output or bundle.path / "report.html"
    texts = {
        page: html_from_document(document),
        page.with_suffix(".md"): markdown_from_document(document),
    }
    if output is None:
        with writing(bundle.path) as draft:
            for path, text in texts.items():
                draft.file(path.name).write_text(text, encoding="utf-8")
    elif len(texts) == 1:
        raise InputError(
            f"'{output}' is where the Markdown would go.", "Name the HTML file: --output x.html."
        )
    else:
        try:
            for path, text in texts.items():
                _write(path, text)
        except OSError as error:
            raise InputError(
                f"'{output}' cannot be written: {error.strerror or error}.",
                "Choose another --output FILE.",
            ) from error
    return list(texts)


def append_summary(report: CheckReport, path: Path) -> None:
    """Append a check to a file in GitHub's Markdown, as to ``$GITHUB_STEP_SUMMARY``."""
    entry = plain(report)
    document = Document(
        title=f"van-deploy: {report.model} {'passed' if report.passed else 'failed'}",
        subtitle=report.images,
        state="PASS" if report.passed else "FAIL",
        note=counts_text(entry),
        sections=(Section("Gates and baseline", check_blocks(entry)),),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown_from_document(document, level=2))


def write_drift_plot(report: DriftReport, path: Path) -> None:
    """Write the error that each part of each artifact adds as an SVG file of its own."""
    label = f"RMS of the error that each {report.level} adds over RMS of its result"
    svg = rows_chart(drift_marks(plain(report)), Axis(label, log=True))
    light = " ".join(STYLE[STYLE.index("{") + 1 : STYLE.index("}")].split())
    own = f'xmlns="http://www.w3.org/2000/svg" style="{light} background: var(--surface)" '
    _write(path, svg.replace("<svg ", f'<svg {own}font-family="sans-serif" ', 1) + "\n")


def write_junit(report: CheckReport, path: Path) -> None:
    """Write a check as JUnit XML, which every CI server reads: a suite a kind of row.

    What was not shown and nobody allowed is a failure there, as it is for the exit code.
    """
    root = ElementTree.Element("testsuites", name="van-deploy check")
    for kind, rows in groupby(sorted(report.rows, key=_kind), key=_kind):
        suite = ElementTree.SubElement(root, "testsuite", name=f"{report.model}.{kind}")
        for row in rows:
            _add_case(suite, row, report)
    for element in (root, *root):
        for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped",) * 2):
            element.set(attribute, str(len(element.findall(f".//{tag}"))))
        element.set("errors", "0")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    _write(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n')


def _kind(row: CheckRow) -> str:
    return row.name.partition("/")[0]


def _add_case(suite: ElementTree.Element, row: CheckRow, report: CheckReport) -> None:
    kind, _, name = row.name.partition("/")
    found, outcome = row.finding, row.finding.outcome.value
    place = {"classname": f"{report.model}.{kind}", "name": name, "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", place)
    if not report.allowed.holds(found):
        said = {"skipped": "not checked: ", "inconclusive": "undecided: "}.get(outcome, "")
        message = f"{said}{found.message}"
        failure = ElementTree.SubElement(case, "failure", message=message, type="gate")
        failure.text = f"baseline {row.baseline}, now {found.value}: {message}"
    elif outcome != "pass":
        ElementTree.SubElement(case, "skipped", message=found.message)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
