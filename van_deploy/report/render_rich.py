"""Rendering of blocks in a terminal, as plain text without Rich markup.

Names of classes, tensors and files may contain escape sequences, which move the cursor, change the
title, or worse, and Rich prints them. :class:`HarmlessConsole` replaces them.
"""

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
from van_deploy.report import document as doc

STYLES = {
    "good": "bold green",
    "bad": "bold red",
    "open": "bold magenta",
    "warn": "bold yellow",
    "skip": "yellow",
}
GAP = 2  # spaces between columns
MIN_TEXT_WIDTH = 20  # characters
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class HarmlessConsole(Console):
    """Console that prints ``\N{REPLACEMENT CHARACTER}`` for each control character.

    Colour codes, which libraries put into messages, are removed.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments without control characters."""
        for segment in super().render(renderable, options):
            if not segment.control and CONTROL_CHARACTERS.search(segment.text):
                text = COLOUR.sub("", segment.text)
                text = CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
                segment = Segment(text, segment.style)
            yield segment


def rich_from_blocks(blocks: Iterable[doc.Block], width: int) -> RenderableType:
    """Return blocks separated by empty lines, without plots.

    Args:
        blocks: blocks to render.
        width: width of the terminal in characters. A table that is wider is rendered as one list
            per row.
    """
    parts = [_rich(block, width) for block in blocks if not isinstance(block, doc.Plot)]
    return Group(*(Padding(one, (0, 0, i < len(parts), 0)) for i, one in enumerate(parts, 1)))


def _rich(block: doc.Block, width: int) -> RenderableType:
    if isinstance(block, doc.Properties):
        form = "state" if block.states else "dim"
        body: RenderableType = _pairs((_cell(n, form), Text(value)) for n, value in block.pairs)
    elif isinstance(block, doc.Table):
        widths = _widths(block, width)
        body = _grid(block, widths) if widths else _records(block)
    else:
        return Text(block.text.replace("`", "") if isinstance(block, doc.Paragraph) else "")
    return Group(Text(block.title, "bold cyan"), body) if block.title else body


def _cell(text: str, form: str) -> Text:
    if form == "state":
        return Text(text, STYLES.get(doc.STATE_COLOURS.get(text, ""), ""), no_wrap=True)
    return Text(text, "dim" if text == "-" or form == "dim" else "")


def _pairs(rows: Iterable[tuple[Text, Text]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, show_header=False, padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _widths(table: doc.Table, width: int) -> list[int]:
    """Return the width of each column, or an empty list if the table is too wide."""
    widths, missing = [], []
    for index, (header, form) in enumerate(table.columns.items()):
        longest = max((cell_len(row[index]) for row in table.rows), default=0)
        word = max(map(cell_len, header.split()), default=0)
        widths.append(max(word, longest if form else min(longest, MIN_TEXT_WIDTH)))
        missing.append(max(longest, cell_len(header)) - widths[-1])
    spare = width - sum(widths) - GAP * (len(widths) - 1)
    for index in sorted(range(len(widths)), key=missing.__getitem__) if spare >= 0 else ():
        extra = min(missing[index], spare)
        widths[index], spare = widths[index] + extra, spare - extra
    return widths if spare >= 0 else []


def _grid(table: doc.Table, widths: list[int]) -> Grid:
    padding = (0, GAP - 1, 0, 0)
    grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding)
    for (header, form), width in zip(table.columns.items(), widths, strict=True):
        side: JustifyMethod = "left" if form in doc.TEXT_FORMATS else "right"
        grid.add_column(Text(header, "bold"), justify=side, width=width, overflow="fold")
    for row in table.rows:
        grid.add_row(*map(_cell, row, table.columns.values()))
    return grid


def _records(table: doc.Table) -> RenderableType:
    """Return each row as a list of its columns that are not empty."""
    records: list[RenderableType] = []
    for row in table.rows:
        cells = zip(table.columns.items(), row, strict=True)
        pairs = ((_cell(n, "dim"), _cell(t, form)) for (n, form), t in cells if t not in ("", "-"))
        records.append(Padding(_pairs(pairs), (0, 0, len(records) + 1 < len(table.rows), 0)))
    return Group(*records)
