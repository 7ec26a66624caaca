"""Rendering of a document as one self-contained HTML file without scripts."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from string import Template

from van_deploy import __version__
from van_deploy.report import document as doc

FOLDER = resources.files("van_deploy.report")
MAX_OPEN_ROWS = 24  # longer tables with a title are collapsed


def html_from_document(document: doc.Document) -> str:
    """Return the document as an HTML page, in the light or dark mode of the reader's system."""
    anchors = {title: "-".join(re.findall(r"\w+", title.lower())) for title in document.sections}
    links = (f'<a href="#{at}">{escape(title)}</a>' for title, at in anchors.items())
    sections = (
        f'<section id="{anchors[title]}">\n<h2>{escape(title)}</h2>\n{_blocks(blocks)}\n</section>'
        for title, blocks in document.sections.items()
    )
    return Template(FOLDER.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        version=escape(__version__),
        style=FOLDER.joinpath("style.css").read_text(encoding="utf-8").strip(),
        title=escape(document.title),
        subtitle=escape(document.subtitle),
        state=_badge(document.state),
        note=escape(document.note),
        notices=_blocks(document.notices),
        navigation=" ".join(links),
        sections="\n".join(sections),
        footer=escape(document.footer),
    )


def _blocks(blocks: Iterable[doc.Block]) -> str:
    return "\n".join(map(_block, blocks))


def _block(block: doc.Block) -> str:
    if isinstance(block, doc.Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, doc.Properties):
        title = f"<h3>{escape(block.title)}</h3>" if block.title else ""
        drawn, kind = (_badge, "notices") if block.states else (escape, "facts")
        pairs = (f"<dt>{drawn(name)}</dt><dd>{_text(value)}</dd>" for name, value in block.pairs)
        return f'{title}<dl class="{kind}">{"".join(pairs)}</dl>'
    if isinstance(block, doc.Table):
        return _table(block)
    caption = f"<figcaption>{_text(block.caption)}</figcaption>"
    return f'<figure><div class="scroll">{block.svg}</div>{caption}</figure>'


def _table(table: doc.Table) -> str:
    forms, title = list(table.columns.values()), escape(table.title)
    head = _row("th", list(table.columns), [form.replace("state", "") for form in forms])
    body = "\n".join(_row("td", row, forms) for row in table.rows)
    # Tables with a verdict or a ratio are never collapsed.
    is_open = len(table.rows) <= MAX_OPEN_ROWS or {"state", "ratio"}.intersection(forms)
    collapsed = title and not is_open
    caption = f"<caption>{title}</caption>" if title and not collapsed else ""
    drawn = (
        f'<div class="scroll"><table>{caption}<thead>{head}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    return f"<details><summary>{title}</summary>{drawn}</details>" if collapsed else drawn


def _row(tag: str, cells: Sequence[str], forms: Sequence[str]) -> str:
    drawn = []
    for text, form in zip(cells, forms, strict=True):
        kind = f' class="{form if form in doc.TEXT_FORMATS else "number"}"' if form else ""
        body = _badge(text) if form == "state" and text in doc.STATE_COLOURS else _text(text)
        drawn.append(f"<{tag}{kind}>{body}</{tag}>")
    return f"<tr>{''.join(drawn)}</tr>"


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _badge(word: str) -> str:
    return f'<span class="badge {doc.STATE_COLOURS.get(word, "skip")}">{escape(word)}</span>'
