"""Blocks for a terminal. What is shown is text: nothing in it is taken for Rich's markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text

from van_deploy.report.document import (
    TONES,
    Block,
    Facts,
    Notice,
    Paragraph,
    Table,
)
from van_deploy.report.figures import TEXTS

__all__ = ["rich_from_blocks"]

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
    for kind, group in groupby(blocks, type):
        if kind is Notice:
            found = [block for block in group if isinstance(block, Notice)]
            parts.append(_pairs([(_state(n.state), n.text) for n in found]))
        else:
            parts += [part for block in group if (part := _rich(block)) is not None]
    last = len(parts) - 1
    return Group(*(Padding(part, (0, 0, i != last, 0)) for i, part in enumerate(parts)))


def _rich(block: Block) -> RenderableType | None:
    if isinstance(block, Paragraph):
        return Text(block.text.replace("`", ""))
    if isinstance(block, Facts):
        facts = _pairs([(Text(name, style="dim"), value) for name, value in block.pairs()])
        return _titled(block.title, facts)
    if isinstance(block, Table):
        return _titled(block.title, _Fitted(block))
    return None


def _state(word: str) -> Text:
    return Text(word, style=STYLES.get(TONES.get(word, ""), ""), no_wrap=True)


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(title, style="bold cyan"), body) if title else body


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
        self.table, self.cells = table, table.rows

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        widths = self._widths(options.max_width)
        yield self._grid(widths) if widths else self._records()

    def _widths(self, width: int) -> list[int]:
        """Return the width of each column; nothing where they do not fit beside each other."""
        least, natural = [], []
        for index, (header, form) in enumerate(self.table.columns.items()):
            longest = max((cell_len(row[index]) for row in self.cells), default=0)
            word = max(map(cell_len, header.split()), default=0)
            least.append(max(word, longest if form else min(longest, LEAST_TEXT)))
            natural.append(max(longest, cell_len(header)))
        spare = width - sum(least) - GAP * (len(least) - 1)
        if spare < 0:
            return []
        for index in sorted(range(len(least)), key=lambda i: natural[i] - least[i]):
            more = min(natural[index] - least[index], spare)
            least[index], spare = least[index] + more, spare - more
        return least

    def _grid(self, widths: Sequence[int]) -> Grid:
        grid = Grid(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            header_style="bold",
            show_edge=False,
            padding=(0, GAP - 1, 0, 0),
        )
        for (header, form), width in zip(self.table.columns.items(), widths, strict=True):
            left = form in TEXTS
            grid.add_column(
                Text(header), justify="left" if left else "right", width=width, overflow="fold"
            )
        for row in self.cells:
            grid.add_row(*map(self._cell, row, self.table.forms))
        return grid

    @staticmethod
    def _cell(text: str, form: str) -> Text:
        return _state(text) if form == "state" else Text(text, style="dim" if text == "-" else "")

    def _records(self) -> RenderableType:
        """Return each row as its first cells on a line, and the others named below it."""
        parts: list[RenderableType] = []
        names, forms = list(self.table.columns), self.table.forms
        heads = [i for i, form in enumerate(forms[:3]) if form in ("state", "name")] or [0]
        for row in self.cells:
            head = Text("  ").join(self._cell(row[i], forms[i]) for i in heads)
            facts = [
                (Text(names[i], style="dim"), cell)
                for i, cell in enumerate(row)
                if i not in heads and cell not in ("", "-")
            ]
            parts += [head, Padding(_pairs(facts), (0, 0, 0, 2))]
        return Group(*parts)
