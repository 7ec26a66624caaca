"""Blocks for a terminal. What is shown is text: nothing in it is taken for Rich's markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from van_deploy.report.document import TONES, Block, Facts, Notice, Paragraph, Plot, Table
from van_deploy.report.figures import TEXTS

STYLES = {
    "good": "bold green",
    "bad": "bold red",
    "open": "bold magenta",
    "warn": "bold yellow",
    "skip": "yellow",
}
GAP = 2  # blanks between columns
LEAST_TEXT = 20  # columns that a text is broken into at least


def rich_from_blocks(blocks: Iterable[Block]) -> RenderableType:
    """Return blocks below each other, an empty line between; plots are left out."""
    parts: list[RenderableType] = []
    for is_notice, group in groupby(blocks, lambda block: isinstance(block, Notice)):
        if is_notice:
            found = [block for block in group if isinstance(block, Notice)]
            parts.append(_pairs((_cell(n.state, "state"), n.text) for n in found))
        else:
            parts += [_rich(block) for block in group if not isinstance(block, Notice | Plot)]
    last = len(parts) - 1
    return Group(*(Padding(part, (0, 0, i != last, 0)) for i, part in enumerate(parts)))


def _rich(block: Paragraph | Facts | Table) -> RenderableType:
    if isinstance(block, Paragraph):
        return Text(block.text.replace("`", ""))
    body: RenderableType = _Fitted(block) if isinstance(block, Table) else Group()
    if isinstance(block, Facts):
        body = _pairs((Text(name, style="dim"), value) for name, value in block.pairs())
    return Group(Text(block.title, style="bold cyan"), body) if block.title else body


def _cell(text: str, form: str) -> Text:
    if form == "state":
        return Text(text, style=STYLES.get(TONES.get(text, ""), ""), no_wrap=True)
    return Text(text, style="dim" if text == "-" else "")


def _pairs(rows: Iterable[tuple[Text, str]]) -> Grid:
    grid = Grid(box=None, pad_edge=False, show_header=False, padding=(0, GAP, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(value))
    return grid


class _Fitted:
    """A table where the width suffices for it, else one list of names and values a row."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        widths = self._widths(options.max_width)
        yield self._grid(widths) if widths else self._records()

    def _widths(self, width: int) -> list[int]:
        """Return the width of each column; nothing where they do not fit beside each other."""
        least, more = [], []
        for index, (header, form) in enumerate(self.table.columns.items()):
            longest = max((cell_len(row[index]) for row in self.table.rows), default=0)
            word = max(map(cell_len, header.split()), default=0)
            least.append(max(word, longest if form else min(longest, LEAST_TEXT)))
            more.append(max(longest, cell_len(header)) - least[-1])
        spare = width - sum(least) - GAP * (len(least) - 1)
        for index in sorted(range(len(least)), key=more.__getitem__) if spare >= 0 else ():
            given = min(more[index], spare)
            least[index], spare = least[index] + given, spare - given
        return least if spare >= 0 else []

    def _grid(self, widths: list[int]) -> Grid:
        padding = (0, GAP - 1, 0, 0)
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=padding)
        for (header, form), width in zip(self.table.columns.items(), widths, strict=True):
            head = Text(header, "bold")
            if form in TEXTS:
                grid.add_column(head, width=width, overflow="fold")
            else:
                grid.add_column(head, justify="right", width=width, overflow="fold")
        for row in self.table.rows:
            grid.add_row(*map(_cell, row, self.table.forms))
        return grid

    def _records(self) -> RenderableType:
        """Return each row as its first cells on a line, and the others named below it."""
        parts: list[RenderableType] = []
        columns = list(self.table.columns.items())
        heads = [i for i, (_, form) in enumerate(columns[:3]) if form in ("state", "name")] or [0]
        for row in self.table.rows:
            parts.append(Text("  ").join(_cell(row[i], columns[i][1]) for i in heads))
            below = [i for i, cell in enumerate(row) if i not in heads and cell not in ("", "-")]
            facts = _pairs((Text(columns[i][0], style="dim"), row[i]) for i in below)
            parts.append(Padding(facts, (0, 0, 0, 2)))
        return Group(*parts)
