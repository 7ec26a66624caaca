"""Blocks for a terminal. What is shown is text: nothing in it is taken for Rich's markup.

A class name, a tensor's name or a file's may hold escape sequences: a terminal that is sent them
moves its cursor, changes its title, or worse, and Rich passes them on. :class:`HarmlessConsole`
does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table as Grid
from rich.text import Text

from van_deploy.documents import CONTROL_CHARACTERS
from van_deploy.report.document import (
    STATE_COLOURS,
    TEXT_FORMATS,
    Block,
    Paragraph,
    Plot,
    Properties,
    Table,
)

STYLES = {
    "good": "bold green",
    "bad": "bold red",
    "open": "bold magenta",
    "warn": "bold yellow",
    "skip": "yellow",
}
GAP = 2  # blanks between columns
LEAST_TEXT = 20  # columns that a text is broken into at least
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class HarmlessConsole(Console):
    """Shows a control character as ``\N{REPLACEMENT CHARACTER}``; colours in a text are left out.

    Libraries put colours into messages.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of what is printed, each without control characters."""
        for segment in super().render(renderable, options):
            if not segment.control and CONTROL_CHARACTERS.search(segment.text):
                text = CONTROL_CHARACTERS.sub(
                    "\N{REPLACEMENT CHARACTER}", COLOUR.sub("", segment.text)
                )
                segment = Segment(text, segment.style)
            yield segment


def rich_from_blocks(blocks: Iterable[Block], width: int) -> RenderableType:
    """Return blocks below each other, an empty line between; plots are left out.

    Args:
        blocks: what to show.
        width: columns of the terminal. A table that does not fit becomes a list of each row.
    """
    parts = [_rich(block, width) for block in blocks if not isinstance(block, Plot)]
    last = len(parts) - 1
    return Group(*(Padding(part, (0, 0, i != last, 0)) for i, part in enumerate(parts)))


def _rich(block: Block, width: int) -> RenderableType:
    if isinstance(block, Properties):
        form = "state" if block.states else "dim"
        body: RenderableType = _pairs((_cell(n, form), Text(value)) for n, value in block.pairs)
    elif isinstance(block, Table):
        widths = _widths(block, width)
        body = _grid(block, widths) if widths else _records(block)
    else:
        return Text(block.text.replace("`", "") if isinstance(block, Paragraph) else "")
    return Group(Text(block.title, "bold cyan"), body) if block.title else body


def _cell(text: str, form: str) -> Text:
    if form == "state":
        return Text(text, STYLES.get(STATE_COLOURS.get(text, ""), ""), no_wrap=True)
    return Text(text, "dim" if text == "-" or form == "dim" else "")


def _pairs(rows: Iterable[tuple[Text, Text]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, show_header=False, padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _widths(table: Table, width: int) -> list[int]:
    """Return the width of each column; nothing where they do not fit beside each other."""
    least, more = [], []
    for index, (header, form) in enumerate(table.columns.items()):
        longest = max((cell_len(row[index]) for row in table.rows), default=0)
        word = max(map(cell_len, header.split()), default=0)
        least.append(max(word, longest if form else min(longest, LEAST_TEXT)))
        more.append(max(longest, cell_len(header)) - least[-1])
    spare = width - sum(least) - GAP * (len(least) - 1)
    for index in sorted(range(len(least)), key=more.__getitem__) if spare >= 0 else ():
        given = min(more[index], spare)
        least[index], spare = least[index] + given, spare - given
    return least if spare >= 0 else []


def _grid(table: Table, widths: list[int]) -> Grid:
    padding = (0, GAP - 1, 0, 0)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding)
    for (header, form), width in zip(table.columns.items(), widths, strict=True):
        side: JustifyMethod = "left" if form in TEXT_FORMATS else "right"
        grid.add_column(Text(header, "bold"), justify=side, width=width, overflow="fold")
    for row in table.rows:
        grid.add_row(*map(_cell, row, table.columns.values()))
    return grid


def _records(table: Table) -> RenderableType:
    """Return each row as a list of its columns that say something."""
    records: list[RenderableType] = []
    for row in table.rows:
        named = zip(table.columns.items(), row, strict=True)
        said = ((_cell(n, "dim"), _cell(t, form)) for (n, form), t in named if t not in ("", "-"))
        records.append(Padding(_pairs(said), (0, 0, len(records) + 1 < len(table.rows), 0)))
    return Group(*records)
