"""What a command or a report says, free of how it looks: sections of blocks.

``report/sections_*.py`` make blocks from results in their JSON form, the one that ``--json``
prints and the manifest keeps. :mod:`van_deploy.report.render_rich` draws them in a terminal,
:mod:`~van_deploy.report.render_html` as one page and :mod:`~van_deploy.report.render_markdown` as
a job's summary, so none can say what the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from van_deploy.config.sizes import format_size

# A result in its JSON form (:func:`van_deploy.documents.plain`).
Entry: TypeAlias = Mapping[str, Any]

# Forms of cells that are set to the left: text that may be broken over lines, a name that may
# not, and a state.
TEXT_FORMATS = ("", "name", "state")

# The states that have a colour, and which. A state is always written out as well.
STATE_COLOURS: Mapping[str, str] = {
    **dict.fromkeys(("PASS", "OK", "YES", "HERE"), "good"),
    "FAIL": "bad",
    "INCONCLUSIVE": "open",
    **dict.fromkeys(("WARNING", "STALE", "NO", "MISSING"), "warn"),
    **dict.fromkeys(("SKIPPED", "NOTE", "LIMIT"), "skip"),
}
STATE_NAMES = {True: "PASS", False: "FAIL", None: "SKIPPED", "passed": "PASS", "failed": "FAIL"}
LONGEST_LIST = 12  # of a list that is shown whole


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; what stands between backticks is code."""

    text: str


@dataclass(frozen=True)
class Properties:
    """Names and their values, or states and what is said of each, below each other.

    Attributes:
        pairs: both as text.
        title: one line above.
        states: whether they are states.
    """

    pairs: Sequence[tuple[str, str]]
    title: str = ""
    states: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: headers, with the unit, and the form of what stands below each (see
            :func:`format_value`). Numbers are set to the right.
        rows: cells as text, as many as there are columns.
        title: one line above. A page shows a long table that has one closed at first.
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot; where there are no drawings, a table beside it has its numbers.

    Attributes:
        svg: an ``<svg>`` element that takes its colours from the page.
        caption: what it shows.
    """

    svg: str
    caption: str


Block: TypeAlias = Paragraph | Properties | Table | Plot


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: what it is about.
        subtitle: what that is, on one line.
        state: PASS, FAIL, INCONCLUSIVE or SKIPPED, for everything together.
        note: how many checks said what.
        sections: what stands below each heading.
        notices: what has to be known before the numbers: results of other files.
        footer: who wrote it and when.
    """

    title: str
    subtitle: str
    state: str
    note: str
    sections: Mapping[str, Sequence[Block]]
    notices: Sequence[Block] = ()
    footer: str = ""


def table(rows: Iterable[Any], columns: str, title: str = "") -> list[Block]:
    """Return a table of the rows, or nothing where there are none.

    Args:
        rows: mappings or sequences.
        columns: ``header = where form``, separated by ``;``. Where is a path such as
            ``limit.value``, or the position in a sequence; the form is text where none is given,
            and the header the path's last part. Columns and rows without values are left out.
        title: one line above.

    >>> table([{"at": {"ms": 4.2}, "no": None}, {}], "latency = at.ms .2f; at.ms .1f; none = no")
    [Table(columns={'latency': '.2f', 'ms': '.1f'}, rows=[['4.20', '4.2']], title='')]
    """
    places = list(_places(columns))
    found = [[_at(row, where) for _, where, _ in places] for row in rows]
    found = [values for values in found if not all(map(_missing, values))]
    used = [i for i in range(len(places)) if not all(_missing(values[i]) for values in found)]
    cells = [[format_value(values[i], places[i][2]) for i in used] for values in found]
    forms = {places[i][0]: places[i][2] for i in used}
    return [Table(forms, cells, title)] if used else []


def properties(entry: Entry, places: str, title: str = "") -> list[Block]:
    """Return some of a result's values, named as the columns of :func:`table` are.

    >>> properties({"at": {"bytes": 2048}}, "size = at.bytes bytes; left out = no")
    [Properties(pairs=[('size', '2.0 KiB')], title='', states=False)]
    """
    found = ((name, _at(entry, where), form) for name, where, form in _places(places))
    pairs = [
        (name, format_value(value, form)) for name, value, form in found if not _missing(value)
    ]
    return [Properties(pairs, title)] if pairs else []


def key_values(values: Mapping[str, object], title: str = "") -> list[Block]:
    """Return values by their names; what has none is left out."""
    pairs = [
        (name, format_value(value, "")) for name, value in values.items() if not _missing(value)
    ]
    return [Properties(pairs, title)] if pairs else []


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
            value = value[int(part)] if int(part) < len(value) else None
    return value


def checks_table(rows: Iterable[tuple[str | bool | None, str, str]]) -> list[Block]:
    """Return one line a check: its outcome, its name, and what was shown, or why it was skipped."""
    found = [(state_text(outcome), name, said) for outcome, name, said in rows]
    return table(found, "verdict = 0 state; check = 1 name; measured = 2")


def nested_rows(rows: Iterable[Entry], key: str, most: int | None = None) -> list[dict[str, Any]]:
    """Return the mappings that each row holds under a key, at most so many, with its ``about``.

    >>> nested_rows([{"about": "fp16", "batches": [{"batch": 1}, {"batch": 2}]}], "batches", 1)
    [{'about': 'fp16', 'batch': 1}]
    """
    return [{"about": row["about"], **one} for row in rows for one in row[key][:most]]


def limit_lines(lines: Sequence[str], count: int) -> list[str]:
    """Return the first lines, and how many more there are."""
    return [*lines[:count], *[f"and {len(lines) - count:,} more"] * (len(lines) > count)]


def notices(state: str, lines: Iterable[str]) -> list[Block]:
    """Return sentences with a state before each, or nothing where there are none."""
    pairs = [(state, line) for line in lines]
    return [Properties(pairs, states=True)] if pairs else []


# --- figures -----------------------------------------------------------------------------------


def format_value(value: Any, form: str) -> str:
    """Return a cell's text.

    Args:
        value: what the cell holds, as JSON spells it; None is ``-``, or nothing in text.
        form: one of :data:`TEXT_FORMATS` or :data:`FORMATTERS`, ``number`` (unchanged), or a format
            such as ``.1f``. Text that is not a number is returned unchanged.

    >>> format_value(0.9835, "percent"), format_value(None, ".1f"), format_value([1, 2.5], "")
    ('98.35', '-', '1 2.5')
    """
    if value is None:
        return "-" if form else ""
    if form == "state":
        return state_text(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        if value not in ("inf", "-inf", "nan") or form in TEXT_FORMATS:
            return value
        value = float(value)
    if form in FORMATTERS:
        return FORMATTERS[form](value)
    if isinstance(value, Mapping):
        return ", ".join(_entry(key, item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return (
            join_values(value)
            if len(value) <= LONGEST_LIST
            else f"{join_values(value[:8])} ... ({len(value)})"
        )
    return format(value, form if form[:1] in tuple("+,.dg") else "g" * isinstance(value, float))


def _entry(key: str, value: Any) -> str:
    form = "bytes" if key.endswith("_bytes") else ""
    return f"{key.removesuffix('_bytes').replace('_', ' ')} {format_value(value, form)}"


def state_text(outcome: str | bool | None) -> str:
    """Return the word for an outcome.

    >>> state_text(True), state_text("pass"), state_text("missing")
    ('PASS', 'PASS', 'MISSING')
    """
    return STATE_NAMES.get(outcome, str(outcome).upper())


def scale_to_unit(value: float, step: float, units: Sequence[str]) -> str:
    """Return a number in the largest unit that it fills; each is ``step`` times the one before."""
    power = 0
    while abs(value) >= step and power + 1 < len(units):
        value, power = value / step, power + 1
    return f"{value:.1f} {units[power]}" if power else f"{value:g} {units[0]}".rstrip()


def bytes_text(size: float) -> str:
    """Return a size in bytes as people read it, in binary units.

    >>> bytes_text(512), bytes_text(16_500_000), bytes_text(25_276_502_016)
    ('512 B', '15.7 MiB', '23.5 GiB')
    """
    return scale_to_unit(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count_text(count: float) -> str:
    """Return a large count with its decimal unit.

    >>> count_text(431), count_text(4_103_176), count_text(2_506_000_000)
    ('431', '4.1 M', '2.5 G')
    """
    return scale_to_unit(count, 1000, ("", "k", "M", "G"))


def ms_text(value: float) -> str:
    """Return milliseconds with three figures.

    >>> ms_text(0.4213), ms_text(12.345), ms_text(4321.0)
    ('0.421', '12.3', '4,321')
    """
    return f"{value:,.{sum(value < limit for limit in (1, 10, 100))}f}"


def join_values(values: Iterable[object], separator: str = " ") -> str:
    """Return values in one line, floats without trailing zeros."""
    return separator.join(f"{v:g}" if isinstance(v, float) else format_value(v, "") for v in values)


# Kinds of numbers: the parts of a version, a share and the two ends of an interval in percent, an
# interval in points, a ratio with its 95 % interval, such as ``4.13 (4.00-4.31)``, and height x
# width.
FORMATTERS: Mapping[str, Callable[[Any], str]] = {
    "bytes": bytes_text,
    "count": count_text,
    "dotted": lambda parts: ".".join(map(str, parts)),
    "ms": ms_text,
    "percent": lambda share: f"{100 * share:.2f}",
    "percents": lambda ends: f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}",
    "points": lambda ends: f"{ends[0]:+.2f} to {ends[1]:+.2f}",
    "ratio": lambda ratio: "{median:.2f} ({low:.2f}-{high:.2f})".format(**ratio),
    "size": format_size,
}
