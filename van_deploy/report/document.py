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
            ``limit.value``, or the position in a sequence; the form is text where none is given,
            and the header the path's last part. Columns and rows without values are left out.
        title: one line above.
        folded: shown closed at first, where that is possible.

    >>> table([{"at": {"ms": 4.2}, "no": None}], "latency = at.ms .2f; at.ms .1f; left out = no")
    [Table(columns={'latency': '.2f', 'ms': '.1f'}, rows=[['4.20', '4.2']], title='', folded=False)]
    """
    places = list(_places(columns))
    found = [[_at(row, where) for _, where, _ in places] for row in rows]
    found = [values for values in found if not all(map(_missing, values))]
    used = [i for i in range(len(places)) if not all(_missing(values[i]) for values in found)]
    cells = [[shown(values[i], places[i][2]) for i in used] for values in found]
    forms = {places[i][0]: places[i][2] for i in used}
    return [Table(forms, cells, title, folded)] if used else []


def facts(entry: Entry, places: str, title: str = "") -> list[Block]:
    """Return some of a result's values, named as the columns of :func:`table` are.

    >>> facts({"at": {"bytes": 2048}}, "size = at.bytes bytes; left out = no")
    [Facts(values={'size': '2.0 KiB'}, title='')]
    """
    found = ((name, _at(entry, where), form) for name, where, form in _places(places))
    known = {name: shown(value, form) for name, value, form in found if not _missing(value)}
    return [Facts(known, title)] if known else []


def _places(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield header, path and form of each part of ``header = path form; ...``."""
    for part in text.split(";"):
        header, _, place = part.strip().rpartition(" = ")
        where, _, form = place.partition(" ")
        yield header or where.rpartition(".")[2].replace("_", " "), where, form


def _missing(value: Any) -> bool:
    return value is None or value in ("", [], {})


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


def inner(rows: Iterable[Entry], key: str, most: int | None = None) -> list[dict[str, Any]]:
    """Return the mappings that each row holds under a key, at most so many, with its ``about``.

    >>> inner([{"about": "fp16", "batches": [{"batch": 1}, {"batch": 2}]}], "batches", 1)
    [{'about': 'fp16', 'batch': 1}]
    """
    return [{"about": row["about"], **one} for row in rows for one in row[key][:most]]


def notices(state: str, lines: Iterable[str]) -> list[Notice]:
    """Return one notice a line."""
    return [Notice(state, line) for line in lines]
