"""A check's verdict as GitHub shows it on a run's page (``$GITHUB_STEP_SUMMARY``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.report.gates_view import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from van_deploy.checks.regression import CheckReport, CheckRow

__all__ = ["append_summary", "summary_from_check"]

MOST_ROWS = 50
MARKS = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "skipped": "⚠️"}


def append_summary(report: CheckReport, path: Path) -> None:
    """Append the report to a file, as GitHub wants it with its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(summary_from_check(report))


def summary_from_check(report: CheckReport) -> str:
    """Return the report in GitHub's Markdown: the verdict, the gates, and what is worse."""
    word, mark = ("passed", "pass") if report.passed else ("failed", "fail")
    tally = Counter(row.outcome.value for row in report.rows)
    counts = ", ".join(f"{tally[outcome]} {outcome}" for outcome in MARKS)
    lines = [f"## {MARKS[mark]} van-deploy: {_cell(report.model)} {word}", "", f"{counts}.", ""]
    gates = [row for row in report.rows if row.name.startswith("gate/")]
    lines += [*_table(gates), ""]
    rest = [row for row in report.rows if row not in gates and row.outcome.value != "pass"]
    if rest:
        lines += ["### Against the baseline", "", *_table(rest), ""]
    skips = {row.finding.skip for row in report.blocking if row.finding.skip}
    if skips:
        leave = " ".join(f"`--allow-skip {kind}`" for kind in sorted(skips))
        lines += [f"What this machine could not check is not allowed: add {leave}.", ""]
    lines.append(f"<sub>{_cell(report.images)}</sub>")
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[CheckRow]) -> list[str]:
    lines = ["| | row | baseline | now | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {MARKS[row.outcome.value]} | `{_cell(row.name)}` | {number(row.baseline) or ''} "
        f"| {number(row.finding.value) or ''} | {_cell(row.finding.message)} |"
        for row in rows[:MOST_ROWS]
    ]
    if len(rows) > MOST_ROWS:
        lines.append(f"| | and {len(rows) - MOST_ROWS} more | | | |")
    return lines


def _cell(text: str) -> str:
    """Return text that stays inside its cell and is not taken for markup."""
    plain = " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("`", "'").replace("|", "\\|")
