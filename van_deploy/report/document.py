"""What a report says, free of how it looks: sections of blocks.

:mod:`van_deploy.report.html` and :mod:`van_deploy.report.markdown` draw the same
document, so neither can say what the other does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Document", "Facts", "Figure", "Grid", "Picture", "Section", "Text", "Tile"]


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and values below each other."""

    values: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        columns: headers, with the unit if there is one.
        rows: cells as text, as many as there are columns. ``PASS``, ``FAIL``,
            ``SKIPPED`` and ``WARNING`` are coloured.
        numbers: which columns hold numbers, from 0: they are set to the right.
        caption: one line above.
        folded: shown closed at first, where that is possible.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        svg: the drawing, an ``<svg>`` element that takes its colours from the page.
        caption: what it shows, with what was measured where.
        wide: whether it wants the whole width.
    """

    svg: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Picture:
    """A photograph.

    Attributes:
        data_uri: the image itself.
        caption: what it is.
        width: in CSS pixels.
        height: in CSS pixels.
    """

    data_uri: str
    caption: str
    width: int
    height: int


Block = Text | Facts | Grid | Figure | Picture


@dataclass(frozen=True)
class Section:
    """A heading and what is below it. Neighbouring figures and pictures share a row."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Tile:
    """One number that matters, large.

    Attributes:
        label: what it is.
        value: the number with its unit.
        note: one line below.
        tone: ``good``, ``bad``, ``warn`` or "".
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        title: the model's name.
        subtitle: what it is, on one line.
        verdict: ``PASS``, ``FAIL`` or ``SKIPPED``, for all checks together.
        verdict_note: how many of each.
        tiles: the numbers at the top.
        sections: the rest.
        footer: who wrote it and when.
    """

    title: str
    subtitle: str
    verdict: str
    verdict_note: str
    tiles: Sequence[Tile]
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""
