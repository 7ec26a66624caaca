"""A report as one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib import resources
from itertools import groupby
from string import Template

from van_deploy import __version__
from van_deploy.report.document import (
    Block,
    Document,
    Facts,
    Figure,
    Grid,
    Picture,
    Section,
    Text,
    Tile,
)

__all__ = ["html_of_document"]

WORDS = {"PASS", "FAIL", "SKIPPED", "WARNING"}


def html_of_document(document: Document) -> str:
    """Return the document as a whole HTML page, light or dark as the reader's system is."""
    folder = resources.files("van_deploy.report")
    page = Template(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        version=escape(__version__),
        style=folder.joinpath("style.css").read_text(encoding="utf-8").strip(),
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        verdict=_badge(document.verdict),
        verdict_note=escape(document.verdict_note),
        tiles="\n".join(map(_tile, document.tiles)),
        navigation=" ".join(_link(section) for section in document.sections),
        sections="\n".join(map(_section, document.sections)),
        footer=escape(document.footer),
    )


def _tile(tile: Tile) -> str:
    tone = f" {tile.tone}" if tile.tone else ""
    return (
        f'<div class="tile{tone}"><span>{escape(tile.label)}</span>'
        f"<strong>{escape(tile.value)}</strong><small>{escape(tile.note)}</small></div>"
    )


def _link(section: Section) -> str:
    return f'<a href="#{_anchor(section)}">{escape(section.title)}</a>'


def _anchor(section: Section) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in section.title.lower()).split())


def _section(section: Section) -> str:
    parts = []
    for side_by_side, blocks in groupby(section.blocks, lambda b: isinstance(b, Figure | Picture)):
        drawn = "\n".join(_block(block) for block in blocks)
        parts.append(f'<div class="row">\n{drawn}\n</div>' if side_by_side else drawn)
    body = "\n".join(parts)
    return (
        f'<section id="{_anchor(section)}">\n<h2>{escape(section.title)}</h2>\n{body}\n</section>'
    )


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Facts):
        return _facts(block)
    if isinstance(block, Grid):
        return _grid(block)
    if isinstance(block, Picture):
        return (
            f'<figure class="photo" style="width:{block.width}px"><img src="{block.data_uri}" '
            f'width="{block.width}" height="{block.height}" alt="{escape(block.caption)}">'
            f"<figcaption>{escape(block.caption)}</figcaption></figure>"
        )
    wide = ' class="wide"' if block.wide else ""
    return f"<figure{wide}>{block.svg}<figcaption>{escape(block.caption)}</figcaption></figure>"


def _facts(block: Facts) -> str:
    pairs = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in block.values.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _grid(grid: Grid) -> str:
    head = "".join(_cell("th", text, index, grid) for index, text in enumerate(grid.columns))
    body = "".join(f"<tr>{_cells(row, grid)}</tr>\n" for row in grid.rows)
    caption = f"<caption>{escape(grid.caption)}</caption>" if not grid.folded else ""
    table = (
        f'<div class="scroll"><table>{caption if grid.caption else ""}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )
    if grid.folded:
        return f"<details><summary>{escape(grid.caption)}</summary>{table}</details>"
    return table


def _cells(row: Iterable[str], grid: Grid) -> str:
    return "".join(_cell("td", text, index, grid) for index, text in enumerate(row))


def _cell(tag: str, text: str, index: int, grid: Grid) -> str:
    kind = ' class="number"' if index in grid.numbers else ""
    return f"<{tag}{kind}>{_badge(text) if text in WORDS else escape(text)}</{tag}>"


def _badge(word: str) -> str:
    return f'<span class="badge {word.lower()}">{escape(word)}</span>'
