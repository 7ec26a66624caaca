"""A check's rows as JUnit XML, which every CI server reads."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from van_deploy.checks.regression import CheckReport, CheckRow

__all__ = ["junit_from_check"]


def junit_from_check(report: CheckReport) -> str:
    """Return the report as JUnit XML: a suite a kind of row, a test case a row.

    What was not shown and nobody allowed is a failure there, as it is for the exit code.
    """
    root = ElementTree.Element("testsuites", name="van-deploy check")
    outcomes = []
    for name, group in groupby(sorted(report.rows, key=_suite), key=_suite):
        suite = ElementTree.SubElement(root, "testsuite", name=f"{report.model}.{name}")
        found = [_case(suite, row, report) for row in group]
        _count(suite, found)
        outcomes += found
    _count(root, outcomes)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _suite(row: CheckRow) -> str:
    return row.name.split("/")[0]


def _count(element: ElementTree.Element, outcomes: list[str]) -> None:
    element.set("tests", str(len(outcomes)))
    element.set("failures", str(outcomes.count("failure")))
    element.set("skipped", str(outcomes.count("skipped")))
    element.set("errors", "0")


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
