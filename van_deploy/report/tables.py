"""Rich tables in one style, made from the plain results the other rooms return.

Verdicts are words (``PASS``, ``FAIL``, ``SKIPPED``, ``MISSING``, ``WARNING``) that
are coloured where there is colour, so output without colour reads the same.
Every value is shown as text: nothing in it is taken for Rich markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

__all__ = [
    "Column",
    "bytes_text",
    "checks_table",
    "count_text",
    "facts_table",
    "notes",
    "rows_table",
    "stack",
    "verdict",
]

VERDICT_STYLES = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "SKIPPED": "yellow",
    "INCONCLUSIVE": "bold magenta",
    "WARNING": "bold yellow",
    "MISSING": "yellow",
    "OK": "green",
    "YES": "green",
    "NO": "yellow",
    "HERE": "green",
}
VERDICT_WORDS = {
    True: "PASS",
    False: "FAIL",
    None: "SKIPPED",
    "passed": "PASS",
    "failed": "FAIL",
    "skipped": "SKIPPED",
}


@dataclass(frozen=True)
class Column:
    """How one column of a table looks.

    Attributes:
        header: what stands above it, with the unit if there is one.
        justify: ``right`` for numbers, ``left`` for words.
        wrap: whether long cells may go over several lines.
        style: a Rich style for the whole column.
    """

    header: str
    justify: Literal["left", "right"] = "left"
    wrap: bool = False
    style: str = ""


def verdict(outcome: str | bool | None) -> Text:
    """Return the coloured word for an outcome.

    Args:
        outcome: a verdict word, or True (PASS), False (FAIL), None (SKIPPED), or
            ``passed``, ``failed``, ``skipped`` as the manifest spells them.

    >>> verdict(True).plain, verdict("skipped").plain, verdict("MISSING").plain
    ('PASS', 'SKIPPED', 'MISSING')
    """
    word = VERDICT_WORDS.get(outcome, str(outcome).upper())
    return Text(word, style=VERDICT_STYLES.get(word, ""))


def rows_table(
    columns: Sequence[Column | str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    indent: int = 0,
) -> RenderableType:
    """Return a table with one line a row.

    Args:
        columns: what each column is called and how it is set.
        rows: the cells, as many as there are columns; None is shown as ``-``.
        title: a line above the table.
        indent: blanks to the left of the table.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for column in columns:
        column = Column(column) if isinstance(column, str) else column
        table.add_column(
            column.header,
            justify=column.justify,
            no_wrap=not column.wrap,
            overflow="fold",
            style=column.style,
        )
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return _titled(title, table, indent)


def facts_table(facts: Mapping[str, object], title: str = "") -> RenderableType:
    """Return names and values below each other, the names dimmed."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), _cell(value))
    return _titled(title, table, indent=0)


def checks_table(checks: Iterable[Mapping[str, object]], title: str = "") -> RenderableType:
    """Return one line a check: its verdict, its name, and what was measured.

    Args:
        checks: mappings with ``name``, ``outcome`` (see :func:`verdict`) and
            ``detail``; the detail of a skipped check is the reason.
        title: a line above the table.
    """
    rows = ((verdict(_outcome(c["outcome"])), c["name"], c.get("detail", "")) for c in checks)
    return rows_table(["verdict", "check", Column("measured", wrap=True)], rows, title)


def notes(lines: Iterable[str], outcome: str = "WARNING") -> RenderableType:
    """Return each line behind a verdict word, wrapped under itself."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(verdict(outcome), Text(line))
    return table


def stack(*parts: RenderableType | None) -> RenderableType:
    """Return the parts below each other, an empty line between, None left out."""
    present = [part for part in parts if part is not None]
    last = len(present) - 1
    return Group(*(Padding(part, (0, 0, i != last, 0)) for i, part in enumerate(present)))


def bytes_text(size: float) -> str:
    """Return a size in bytes as people read it, in binary units.

    >>> bytes_text(512), bytes_text(16_500_000), bytes_text(25_276_502_016)
    ('512 B', '15.7 MiB', '23.5 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: float) -> str:
    """Return a large count with its decimal unit.

    >>> count_text(431), count_text(4_103_176), count_text(2_506_000_000)
    ('431', '4.1 M', '2.5 G')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:g}"


def _outcome(value: object) -> str | bool | None:
    """Return a mapping's outcome as :func:`verdict` takes it."""
    return value if isinstance(value, bool) or value is None else str(value)


def _cell(value: object) -> RenderableType:
    """Return a cell's text; what is already a Rich ``Text`` keeps its style."""
    if isinstance(value, Text):
        return value
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return Text("-", style="dim") if value is None else Text(str(value))


def _titled(title: str, table: Table, indent: int) -> RenderableType:
    """Return the table below its title, if it has one."""
    body = Padding(table, (0, 0, 0, indent)) if indent else table
    return Group(Text(title, style="bold cyan"), body) if title else body
