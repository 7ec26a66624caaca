"""A check's verdict as GitHub shows it on a run's page (``$GITHUB_STEP_SUMMARY``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.report.gates_view import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from van_deploy.checks.regression import CheckReport, CheckRow

__all__ = ["append_summary", "summary_from_check"]

MOST_ROWS = 50
MARKS = {"passed": "✅", "failed": "❌", "skipped": "⚠️", "new": "🆕"}


def append_summary(report: CheckReport, path: Path) -> None:
    """Append the report to a file, as GitHub wants it with its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(summary_from_check(report))


def summary_from_check(report: CheckReport) -> str:
    """Return the report in GitHub's Markdown: the verdict, the gates, and what is worse."""
    word = "passed" if report.passed else "failed"
    counts = ", ".join(
        f"{len(report.having(outcome))} {outcome}" for outcome in ("passed", "failed", "skipped")
    )
    lines = [f"## {MARKS[word]} van-deploy: {_cell(report.model)} {word}", "", f"{counts}.", ""]
    gates = [row for row in report.rows if row.name.startswith("gate/")]
    lines += [*_table(gates), ""]
    worse = [row for row in report.having("failed") if row not in gates]
    if worse:
        lines += ["### Worse than the baseline", "", *_table(worse), ""]
    skipped = [row for row in report.having("skipped") if row not in gates]
    if skipped or any(row.outcome == "skipped" for row in gates):
        leave = "allowed by --allow-skip" if report.allow_skip else "not allowed: add --allow-skip"
        lines += [f"What this machine could not check is {leave}.", ""]
    if skipped:
        lines += [*_table(skipped), ""]
    lines.append(f"<sub>{_cell(report.images)}</sub>")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[CheckRow]) -> list[str]:
    lines = ["| | row | baseline | now | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {MARKS[row.outcome]} | `{_cell(row.name)}` | {number(row.baseline) or ''} "
        f"| {number(row.now) or ''} | {_cell(row.message)} |"
        for row in rows[:MOST_ROWS]
    ]
    if len(rows) > MOST_ROWS:
        lines.append(f"| | and {len(rows) - MOST_ROWS} more | | | |")
    return lines


def _cell(text: str) -> str:
    """Return text that stays inside its cell and is not taken for markup."""
    plain = " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("`", "'").replace("|", "\\|")
