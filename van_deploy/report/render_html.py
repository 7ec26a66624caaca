"""A document as one HTML file that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib import resources
from itertools import groupby
from string import Template

from van_deploy import __version__
from van_deploy.report.document import TONES, Block, Document, Facts, Notice, Paragraph, Plot, Table
from van_deploy.report.figures import TEXTS

CODE = re.compile(r"`([^`]+)`")
FOLDER = resources.files("van_deploy.report")
STYLE = FOLDER.joinpath("style.css").read_text(encoding="utf-8").strip()
"""The page's style sheet; its first rule has the light colours."""


def html_from_document(document: Document) -> str:
    """Return the document as a whole HTML page, light or dark as the reader's system is."""
    anchors = {s.title: "-".join(re.findall(r"\w+", s.title.lower())) for s in document.sections}
    links = (f'<a href="#{at}">{escape(title)}</a>' for title, at in anchors.items())
    tiles = (
        f'<div class="tile {tile.tone}"><span>{escape(tile.label)}</span>'
        f"<strong>{escape(tile.value)}</strong><small>{escape(tile.note)}</small></div>"
        for tile in document.tiles
    )
    sections = (
        f'<section id="{anchors[section.title]}">\n<h2>{escape(section.title)}</h2>\n'
        f"{_body(section.blocks)}\n</section>"
        for section in document.sections
    )
    return Template(FOLDER.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        version=escape(__version__),
        style=STYLE,
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        state=_badge(document.state),
        note=escape(document.note),
        notices="\n".join(map(_block, document.notices)),
        tiles="\n".join(tiles),
        navigation=" ".join(links),
        sections="\n".join(sections),
        footer=escape(document.footer),
    )


def _body(blocks: Iterable[Block]) -> str:
    parts = []
    for in_row, group in groupby(blocks, lambda block: isinstance(block, Plot)):
        drawn = "\n".join(map(_block, group))
        parts.append(f'<div class="row">\n{drawn}\n</div>' if in_row else drawn)
    return "\n".join(parts)


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
    head = _row("th", ((name, form.replace("state", "")) for name, form in table.columns.items()))
    body = "\n".join(_row("td", zip(row, table.forms, strict=True)) for row in table.rows)
    title = escape(table.title)
    caption = f"<caption>{title}</caption>" if title and not table.folded else ""
    drawn = (
        f'<div class="scroll"><table>{caption}<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    return f"<details><summary>{title}</summary>{drawn}</details>" if table.folded else drawn


def _row(tag: str, cells: Iterable[tuple[str, str]]) -> str:
    drawn = []
    for text, form in cells:
        kind = f' class="{form if form in TEXTS else "number"}"' if form else ""
        body = _badge(text) if form == "state" and text in TONES else _text(text)
        drawn.append(f"<{tag}{kind}>{body}</{tag}>")
    return f"<tr>{''.join(drawn)}</tr>"


def _text(text: str) -> str:
    return CODE.sub(r"<code>\1</code>", escape(text))


def _badge(word: str) -> str:
    return f'<span class="badge {TONES.get(word, "skip")}">{escape(word)}</span>'
