"""What a command or a report says, free of how it looks: sections of blocks.

``report/sections_*.py`` make blocks from results in their JSON form, the one that ``--json``
prints and the manifest keeps. :mod:`van_deploy.report.render_rich` draws them in a terminal,
:mod:`~van_deploy.report.render_html` as one page and :mod:`~van_deploy.report.render_markdown` as
a job's summary, so none can say what the others do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from van_deploy.report.figures import shown, state_of

__all__ = [
    "TONES",
    "Block",
    "Document",
    "Entry",
    "Facts",
    "Notice",
    "Paragraph",
    "Plot",
    "Section",
    "Table",
    "Tile",
    "checks_table",
    "facts",
    "notices",
    "table",
    "worst",
]

Entry: TypeAlias = Mapping[str, Any]
"""A result in its JSON form (:func:`van_deploy.documents.plain`)."""

TONES: Mapping[str, str] = {
    **dict.fromkeys(("PASS", "OK", "YES", "HERE"), "good"),
    "FAIL": "bad",
    "INCONCLUSIVE": "open",
    **dict.fromkeys(("WARNING", "STALE", "NO", "MISSING"), "warn"),
    **dict.fromkeys(("SKIPPED", "NOTE", "LIMIT"), "skip"),
}
"""The states that have a colour, and which. A state is always written out as well."""


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; what stands between backticks is code."""

    text: str


@dataclass(frozen=True)
class Notice:
    """One sentence with a state before it. Neighbours are set as one list."""

    state: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values below each other; what has no value is left out."""

    values: Mapping[str, object]
    title: str = ""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield names and values as text."""
        for name, value in self.values.items():
            if value not in (None, ""):
                yield name, shown(value, "")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headers, with the unit, and the form of what stands below each (see
            :func:`~van_deploy.report.figures.shown`). Numbers are set to the right.
        rows: cells as text, as many as there are columns.
        title: one line above.
        folded: shown closed at first, where that is possible.
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False

    @property
    def forms(self) -> list[str]:
        """The form of each column."""
        return list(self.columns.values())


@dataclass(frozen=True)
class Plot:
    """A plot; where there are no drawings, a table beside it has its numbers.

    Attributes:
        svg: an ``<svg>`` element that takes its colours from the page.
        caption: what it shows.
        wide: whether it wants the whole width.
    """

    svg: str
    caption: str
    wide: bool = True


Block: TypeAlias = Paragraph | Notice | Facts | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading and what is below it. Neighbouring plots share a row."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """One number that matters, large: what it is, the number with its unit, and a remark."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: what it is about.
        subtitle: what that is, on one line.
        state: PASS, FAIL, INCONCLUSIVE or SKIPPED, for everything together.
        note: how many checks said what.
        notices: what has to be known before the numbers: results of other files.
        tiles: the numbers at the top.
        sections: the rest.
        footer: who wrote it and when.
    """

    title: str
    subtitle: str
    state: str
    note: str
    notices: Sequence[Notice] = ()
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def table(
    rows: Iterable[Any], columns: str, title: str = "", *, folded: bool = False
) -> list[Block]:
    """Return a table of the rows, or nothing where there are none.

    Args:
        rows: mappings or sequences.
        columns: ``header = where form``, separated by ``;``. Where is a path such as
            ``limit.value``, or the position in a sequence; the form is text where none is given.
            A column in which no row has a value is left out.
        title: one line above.
        folded: shown closed at first, where that is possible.

    >>> table([{"at": {"ms": 4.2}, "no": None}], "latency ms = at.ms .2f; left out = no")
    [Table(columns={'latency ms': '.2f'}, rows=[['4.20']], title='', folded=False)]
    """
    found = list(rows)
    forms, cells = {}, []
    for header, where, form in _places(columns):
        values = [_at(row, where) for row in found]
        if any(value not in (None, "") for value in values):
            forms[header] = form
            cells.append([shown(value, form) for value in values])
    return [Table(forms, [list(row) for row in zip(*cells, strict=True)], title, folded)] * bool(
        cells
    )


def facts(entry: Entry, places: str, title: str = "") -> list[Block]:
    """Return some of a result's values, named as the columns of :func:`table` are.

    >>> facts({"at": {"bytes": 2048}}, "size = at.bytes bytes; left out = no")
    [Facts(values={'size': '2.0 KiB'}, title='')]
    """
    found = {name: (_at(entry, where), form) for name, where, form in _places(places)}
    known = {n: shown(v, form) for n, (v, form) in found.items() if v not in (None, "", [], {})}
    return [Facts(known, title)] if known else []


def _places(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield header, path and form of each part of ``header = path form; ...``."""
    for part in text.split(";"):
        header, _, place = part.strip().partition(" = ")
        where, _, form = place.partition(" ")
        yield header, where, form


def _at(value: Any, path: str) -> Any:
    """Return what a path leads to; None where it leads nowhere."""
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif value is not None:
            value = value[int(part)]
    return value


def checks_table(rows: Iterable[tuple[str | bool | None, str, str]]) -> list[Block]:
    """Return one line a check: its outcome, its name, and what was shown, or why it was skipped."""
    found = [(state_of(outcome), name, said) for outcome, name, said in rows]
    return table(found, "verdict = 0 state; check = 1 name; measured = 2")


def notices(state: str, lines: Iterable[str]) -> list[Notice]:
    """Return one notice a line."""
    return [Notice(state, line) for line in lines]


def worst(states: Iterable[str]) -> str:
    """Return what several states say together; SKIPPED for none.

    >>> worst(["PASS", "INCONCLUSIVE", "SKIPPED"]), worst([])
    ('INCONCLUSIVE', 'SKIPPED')
    """
    found = set(states)
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    return next((state for state in order if state in found), "SKIPPED")
