"""A drift report as one SVG file that needs nothing around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from van_deploy.files import write_atomic
from van_deploy.report.svg import Axis, Bar, bar_chart

if TYPE_CHECKING:
    from van_deploy.checks.drift import ArtefactDrift, DriftReport

__all__ = ["drift_svg", "write_drift_plot"]

TITLE_HEIGHT = 30
RUINED_DB = 0.0  # where a part's error is as large as its result, or it does not run

COLOURS: Mapping[str, str] = {
    "--series-1": "#2f6fde",
    "--ink": "#1b1f24",
    "--muted": "#5b6470",
    "--grid": "#d8dde3",
    "--surface": "#ffffff",
}


def write_drift_plot(report: DriftReport, path: Path) -> None:
    """Write the plot, with the folders it is to be in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, drift_svg(report))


def drift_svg(report: DriftReport) -> str:
    """Return the error each part of each artefact adds, one chart below the other, as SVG."""
    charts = [(entry, _chart(entry)) for entry in report.artefacts.values()]
    parts, y, width = [], 0.0, 0.0
    for entry, (chart, chart_width, height) in charts:
        parts.append(
            f'<text x="8" y="{y + 20:.0f}" font-weight="bold">'
            f"{escape(entry.artefact)}: error that each {report.level} adds</text>"
        )
        parts.append(f'<g transform="translate(0 {y + TITLE_HEIGHT:.0f})">{chart}</g>')
        y, width = y + TITLE_HEIGHT + height + 12, max(width, chart_width)
    style = ";".join(f"{name}:{colour}" for name, colour in COLOURS.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{y:.0f}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}" style="{style};background:var(--surface)" '
        f'font-family="system-ui, sans-serif" font-size="12">{"".join(parts)}</svg>\n'
    )


def _chart(entry: ArtefactDrift) -> tuple[str, float, float]:
    """Return one artefact's bars with their width and height."""
    bars = [
        Bar(row.name, 10 ** (-_finite(row.isolated_db) / 20), f"{row.isolated_db:.1f} dB")
        for row in entry.rows
        if row.isolated_db is not None
    ]
    axis = Axis("RMS of the added error over RMS of the part's result", log=True)
    chart = bar_chart(bars, axis)
    head = chart[: chart.index(">")]
    width, height = (
        float(head.split(f'{name}="')[1].split('"')[0]) for name in ("width", "height")
    )
    return chart, width, height


def _finite(added_db: float) -> float:
    """Return a figure a logarithmic axis can show."""
    if math.isinf(added_db):
        return 300.0 if added_db > 0 else RUINED_DB
    return added_db
