"""A report as Markdown: the same document, its plots left to the tables beside them."""

from __future__ import annotations

from collections.abc import Iterable

from van_deploy.report.document import Block, Document, Facts, Figure, Grid, Picture, Text

__all__ = ["markdown_of_document", "markdown_table"]


def markdown_of_document(document: Document) -> str:
    """Return the document as GitHub's Markdown."""
    lines = [
        f"# {document.title}",
        "",
        document.subtitle,
        "",
        f"**{document.verdict}**: {document.verdict_note}",
        "",
    ]
    rows = [(tile.label, tile.value, tile.note) for tile in document.tiles]
    lines += [markdown_table(("", "", ""), rows), ""]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            text = _block(block)
            if text:
                lines += [text, ""]
    lines += ["---", "", document.footer, ""]
    return "\n".join(lines)


def markdown_table(
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    numbers: frozenset[int] = frozenset(),
) -> str:
    r"""Return a table; columns in ``numbers`` are set to the right.

    >>> print(markdown_table(("name", "ms"), [("a|b", "1.5")], frozenset({1})))
    | name | ms |
    | --- | ---: |
    | a\|b | 1.5 |
    """
    names = list(columns)
    rule = ["---:" if index in numbers else "---" for index in range(len(names))]
    lines = [names, rule, *([_escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Facts):
        return "\n".join(f"- **{name}**: {value}" for name, value in block.values.items())
    if isinstance(block, Grid):
        table = markdown_table(block.columns, block.rows, block.numbers)
        return f"{block.caption}:\n\n{table}" if block.caption else table
    if isinstance(block, Figure):
        return ""  # every plot has its table beside it
    return _picture(block)


def _picture(picture: Picture) -> str:
    return f"({picture.caption}: see the HTML report.)"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
