"""Content of a command's output or a report, independent of the format: sections of blocks.

``report/sections_*.py`` create blocks from results in their JSON form, which ``--json`` prints and
the manifest stores. :mod:`van_deploy.report.render_rich` renders blocks in a terminal,
:mod:`~van_deploy.report.render_html` as one page and :mod:`~van_deploy.report.render_markdown` as
Markdown, so all formats have the same content.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from van_deploy.config.sizes import format_size

# A result in its JSON form (:func:`van_deploy.documents.plain`).
Entry: TypeAlias = Mapping[str, Any]

# Left-aligned formats: text that may wrap, a name that may not, and a state.
TEXT_FORMATS = ("", "name", "state")

# Colour class of each state; other states have none. The state itself is always shown as text.
STATE_COLOURS: Mapping[str, str] = {
    **dict.fromkeys(("PASS", "OK", "YES", "HERE"), "good"),
    "FAIL": "bad",
    "INCONCLUSIVE": "open",
    **dict.fromkeys(("WARNING", "STALE", "NO", "MISSING"), "warn"),
    **dict.fromkeys(("SKIPPED", "NOTE", "LIMIT"), "skip"),
}
STATE_NAMES = {True: "PASS", False: "FAIL", None: "SKIPPED", "passed": "PASS", "failed": "FAIL"}
LONGEST_LIST = 12  # longer lists are abbreviated


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; text between backticks is code."""

    text: str


@dataclass(frozen=True)
class Properties:
    """A list of names and values, or of states and messages.

    Attributes:
        pairs: names and values as text.
        title: title of the list.
        states: whether the names are states.
    """

    pairs: Sequence[tuple[str, str]]
    title: str = ""
    states: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: format of each column (see :func:`format_value`) by header, which has the unit.
            Numbers are right-aligned.
        rows: cells as text, one per column.
        title: title of the table. A long table with a title is collapsed in HTML.
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot, shown in HTML only; a table in the same section has its numbers.

    Attributes:
        svg: an ``<svg>`` element that takes its colours from the page.
        caption: caption of the plot.
    """

    svg: str
    caption: str


Block: TypeAlias = Paragraph | Properties | Table | Plot


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: name of the model or check.
        subtitle: description in one line.
        state: overall state: PASS, FAIL, INCONCLUSIVE or SKIPPED.
        note: number of checks by outcome.
        sections: blocks by heading.
        notices: blocks above the sections, such as results of other files.
        footer: version and date.
    """

    title: str
    subtitle: str
    state: str
    note: str
    sections: Mapping[str, Sequence[Block]]
    notices: Sequence[Block] = ()
    footer: str = ""


def table(rows: Iterable[Any], columns: str, title: str = "") -> list[Block]:
    """Return a table of the rows, or nothing if there are no values.

    Args:
        rows: mappings or sequences.
        columns: ``header = path format``, separated by ``;``. A path is a chain of keys such as
            ``limit.value``, or an index of a sequence. The default format is text, the default
            header the last key. Columns and rows without values are left out.
        title: title of the table.

    >>> table([{"at": {"ms": 4.2}, "no": None}, {}], "latency = at.ms .2f; at.ms .1f; none = no")
    [Table(columns={'latency': '.2f', 'ms': '.1f'}, rows=[['4.20', '4.2']], title='')]
    """
    specs = list(_parse_columns(columns))
    values = [[_lookup(row, path) for _, path, _ in specs] for row in rows]
    values = [row for row in values if not all(map(_is_empty, row))]
    used = [i for i in range(len(specs)) if not all(_is_empty(row[i]) for row in values)]
    cells = [[format_value(row[i], specs[i][2]) for i in used] for row in values]
    return [Table({specs[i][0]: specs[i][2] for i in used}, cells, title)] if used else []


def properties(entry: Entry, columns: str, title: str = "") -> list[Block]:
    """Return a list of a result's values; ``columns`` as in :func:`table`.

    >>> properties({"at": {"bytes": 2048}}, "size = at.bytes bytes; left out = no")
    [Properties(pairs=[('size', '2.0 KiB')], title='', states=False)]
    """
    values = [(name, _lookup(entry, path), form) for name, path, form in _parse_columns(columns)]
    pairs = [(name, format_value(v, form)) for name, v, form in values if not _is_empty(v)]
    return [Properties(pairs, title)] if pairs else []


def key_values(values: Mapping[str, object], title: str = "") -> list[Block]:
    """Return a list of values by name, without the empty ones."""
    pairs = [(k, format_value(value, "")) for k, value in values.items() if not _is_empty(value)]
    return [Properties(pairs, title)] if pairs else []


def _parse_columns(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield header, path and format of each part of ``header = path format; ...``."""
    for part in text.split(";"):
        header, _, spec = part.strip().rpartition(" = ")
        path, _, form = spec.partition(" ")
        yield header or path.rpartition(".")[2].replace("_", " "), path, form


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _lookup(value: Any, path: str) -> Any:
    """Return the value at a path, or None."""
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif value is not None:
            value = value[int(part)] if int(part) < len(value) else None
    return value


def checks_table(rows: Iterable[tuple[str | bool | None, str, str]]) -> list[Block]:
    """Return a table of checks from outcome, name, and measurement or reason of each."""
    cells = [(state_text(outcome), name, message) for outcome, name, message in rows]
    return table(cells, "verdict = 0 state; check = 1 name; measured = 2")


def nested_rows(rows: Iterable[Entry], key: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the mappings under a key of each row, at most ``limit`` per row, with its ``about``.

    >>> nested_rows([{"about": "fp16", "batches": [{"batch": 1}, {"batch": 2}]}], "batches", 1)
    [{'about': 'fp16', 'batch': 1}]
    """
    return [{"about": row["about"], **nested} for row in rows for nested in row[key][:limit]]


def notices(state: str, lines: Iterable[str]) -> list[Block]:
    """Return a list of messages with a state, or nothing if there are no messages."""
    pairs = [(state, line) for line in lines]
    return [Properties(pairs, states=True)] if pairs else []


# --- values ------------------------------------------------------------------------------------


def format_value(value: Any, form: str) -> str:
    """Return a value as the text of a cell.

    Args:
        value: the value as in JSON; None is ``-``, or empty in text.
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
        short = len(value) <= LONGEST_LIST
        return join_values(value) if short else f"{join_values(value[:8])} ... ({len(value)})"
    return format(value, form if form[:1] in tuple("+,.dg") else "g" * isinstance(value, float))


def _entry(key: str, value: Any) -> str:
    form = "bytes" if key.endswith("_bytes") else ""
    return f"{key.removesuffix('_bytes').replace('_', ' ')} {format_value(value, form)}"


def state_text(outcome: str | bool | None) -> str:
    """Return the state of an outcome as text.

    >>> state_text(True), state_text("pass"), state_text("missing")
    ('PASS', 'PASS', 'MISSING')
    """
    return STATE_NAMES.get(outcome, str(outcome).upper())


def scale_to_unit(value: float, step: float, units: Sequence[str]) -> str:
    """Return a number in the largest unit up to it; each unit is ``step`` times the previous."""
    power = 0
    while abs(value) >= step and power + 1 < len(units):
        value, power = value / step, power + 1
    return f"{value:.1f} {units[power]}" if power else f"{value:g} {units[0]}".rstrip()


def bytes_text(size: float) -> str:
    """Return a size in bytes in a binary unit.

    >>> bytes_text(512), bytes_text(16_500_000), bytes_text(25_276_502_016)
    ('512 B', '15.7 MiB', '23.5 GiB')
    """
    return scale_to_unit(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def count_text(count: float) -> str:
    """Return a count in a decimal unit.

    >>> count_text(431), count_text(4_103_176), count_text(2_506_000_000)
    ('431', '4.1 M', '2.5 G')
    """
    return scale_to_unit(count, 1000, ("", "k", "M", "G"))


def ms_text(value: float) -> str:
    """Return milliseconds with three digits.

    >>> ms_text(0.4213), ms_text(12.345), ms_text(4321.0)
    ('0.421', '12.3', '4,321')
    """
    return f"{value:,.{sum(value < limit for limit in (1, 10, 100))}f}"


def ratio_text(ratio: Entry) -> str:
    """Return a ratio, and its interval if it has more than one round, such as ``4.1 (4.0-4.3)``."""
    interval = f" ({ratio['low']:.2f}-{ratio['high']:.2f})" if ratio["rounds"] > 1 else ""
    return f"{ratio['median']:.2f}{interval}"


def join_values(values: Iterable[object], separator: str = " ") -> str:
    """Return values joined in one line, floats without trailing zeros."""
    return separator.join(f"{v:g}" if isinstance(v, float) else format_value(v, "") for v in values)


# Named formats: "dotted" for versions, "percent" for a share and "percents" for an interval of
# shares, "points" for an interval in points, and "size" for height x width.
FORMATTERS: Mapping[str, Callable[[Any], str]] = {
    "bytes": bytes_text,
    "count": count_text,
    "dotted": lambda parts: ".".join(map(str, parts)),
    "ms": ms_text,
    "percent": lambda share: f"{100 * share:.2f}",
    "percents": lambda ends: f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}",
    "points": lambda ends: f"{ends[0]:+.2f} to {ends[1]:+.2f}",
    "ratio": ratio_text,
    "size": format_size,
}
