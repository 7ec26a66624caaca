"""A check's rows as JUnit XML, which every CI server reads."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.files import write_atomic

if TYPE_CHECKING:
    from van_deploy.checks.regression import CheckReport, CheckRow

__all__ = ["junit_from_check", "write_junit"]


def write_junit(report: CheckReport, path: Path) -> None:
    """Write the report as JUnit XML, with the folders it is to be in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, junit_from_check(report))


def junit_from_check(report: CheckReport) -> str:
    """Return the report as JUnit XML: a suite a kind of row, a test case a row.

    What was not shown and nobody allowed is a failure there, as it is for the exit code.
    """
    root = ElementTree.Element("testsuites", name="van-deploy check")
    total = failures = skipped = 0
    rows = sorted(report.rows, key=_suite)
    for name, group in groupby(rows, key=_suite):
        suite = ElementTree.SubElement(root, "testsuite", name=f"{report.model}.{name}")
        cases = [_case(suite, row, report) for row in group]
        counts = (len(cases), cases.count("failure"), cases.count("skipped"))
        for key, count in zip(("tests", "failures", "skipped"), counts, strict=True):
            suite.set(key, str(count))
        suite.set("errors", "0")
        total, failures, skipped = (
            total + counts[0],
            failures + counts[1],
            skipped + counts[2],
        )
    root.set("tests", str(total))
    root.set("failures", str(failures))
    root.set("skipped", str(skipped))
    root.set("errors", "0")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(row: CheckRow) -> str:
    return row.name.split("/")[0]


def _case(suite: ElementTree.Element, row: CheckRow, report: CheckReport) -> str:
    """Add one row as a test case; return its outcome in JUnit's words."""
    kind, _, name = row.name.partition("/")
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"{report.model}.{kind}", name=name, time="0"
    )
    found, outcome = row.finding, row.outcome.value
    if not report.allowed.holds(found):
        said = {"skipped": "not checked: ", "inconclusive": "undecided: "}.get(outcome, "")
        message = f"{said}{found.message}"
        failure = ElementTree.SubElement(case, "failure", message=message, type="gate")
        failure.text = f"baseline {row.baseline}, now {found.value}: {message}"
        return "failure"
    if outcome != "pass":
        ElementTree.SubElement(case, "skipped", message=found.message)
        return "skipped"
    return "passed"
