"""A document as one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import groupby
from string import Template

from van_deploy import __version__
from van_deploy.report.document import (
    TONES,
    Block,
    Document,
    Facts,
    Notice,
    Paragraph,
    Plot,
    Section,
    Table,
    Tile,
)
from van_deploy.report.figures import TEXTS

__all__ = ["html_from_document"]

CODE = re.compile(r"`([^`]+)`")


def html_from_document(document: Document) -> str:
    """Return the document as a whole HTML page, light or dark as the reader's system is."""
    folder = resources.files("van_deploy.report")
    page = Template(folder.joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        version=escape(__version__),
        style=folder.joinpath("style.css").read_text(encoding="utf-8").strip(),
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        state=_badge(document.state),
        note=escape(document.note),
        notices="\n".join(map(_block, document.notices)),
        tiles="\n".join(map(_tile, document.tiles)),
        navigation=" ".join(_link(section) for section in document.sections),
        sections="\n".join(map(_section, document.sections)),
        footer=escape(document.footer),
    )


def _tile(tile: Tile) -> str:
    return (
        f'<div class="tile {tile.tone}"><span>{escape(tile.label)}</span>'
        f"<strong>{escape(tile.value)}</strong><small>{escape(tile.note)}</small></div>"
    )


def _link(section: Section) -> str:
    return f'<a href="#{_anchor(section)}">{escape(section.title)}</a>'


def _anchor(section: Section) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in section.title.lower()).split())


def _section(section: Section) -> str:
    parts = []
    for in_row, blocks in groupby(section.blocks, lambda block: isinstance(block, Plot)):
        drawn = "\n".join(map(_block, blocks))
        parts.append(f'<div class="row">\n{drawn}\n</div>' if in_row else drawn)
    title, body = escape(section.title), "\n".join(parts)
    return f'<section id="{_anchor(section)}">\n<h2>{title}</h2>\n{body}\n</section>'


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Notice):
        return f'<p class="notice">{_badge(block.state)} <span>{_text(block.text)}</span></p>'
    if isinstance(block, Facts):
        title = f"<h3>{escape(block.title)}</h3>" if block.title else ""
        pairs = (f"<dt>{escape(name)}</dt><dd>{_text(value)}</dd>" for name, value in block.pairs())
        return f"{title}<dl>{''.join(pairs)}</dl>"
    if isinstance(block, Table):
        return _table(block)
    kind, caption = "wide" if block.wide else "half", _text(block.caption)
    drawn = f'<div class="scroll">{block.svg}</div>'
    return f'<figure class="{kind}">{drawn}<figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    head = _row(
        "th", list(table.columns), [form if form != "state" else "" for form in table.forms]
    )
    body = "\n".join(_row("td", row, table.forms) for row in table.rows)
    caption = escape(table.title)
    inside = f"<caption>{caption}</caption>" if caption and not table.folded else ""
    drawn = (
        f'<div class="scroll"><table>{inside}<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    if table.folded:
        return f"<details><summary>{caption}</summary>{drawn}</details>"
    return drawn


def _row(tag: str, texts: Sequence[str], forms: Sequence[str]) -> str:
    cells = []
    for text, form in zip(texts, forms, strict=True):
        kind = form if form in TEXTS else "number"
        body = _badge(text) if form == "state" and text in TONES else _text(text)
        cells.append(f'<{tag} class="{kind}">{body}</{tag}>' if kind else f"<{tag}>{body}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return CODE.sub(r"<code>\1</code>", escape(text))


def _badge(word: str) -> str:
    return f'<span class="badge {TONES.get(word, "skip")}">{escape(word)}</span>'
