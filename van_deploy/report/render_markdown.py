"""A document as GitHub's Markdown, such as a job's summary; plots are left to their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from van_deploy.report.document import TEXTS, Block, Document, Facts, Notice, Paragraph, Table

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "SKIPPED": "⚠️", "STALE": "⚠️"}


def markdown_from_document(document: Document, level: int = 1) -> str:
    """Return the document; ``level`` is that of its first heading."""
    head = "#" * level
    tiles = [(tile.label, tile.value, tile.note) for tile in document.tiles]
    parts = [
        f"{head} {_marked(document.state).split()[0]} {_plain(document.title)}",
        _plain(document.subtitle),
        f"**{document.state}**: {_plain(document.note)}",
        *_blocks(document.notices),
        markdown_table(("", "", ""), tiles) if tiles else "",
    ]
    for title, blocks in document.sections.items():
        parts += [f"{head}# {_plain(title)}", *_blocks(blocks)]
    parts += ["---", _plain(document.footer)] if document.footer else []
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(
    columns: Iterable[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()
) -> str:
    r"""Return a table; columns in ``numbers`` are set to the right.

    >>> print(markdown_table(("name", "ms"), [("a|b", "1.5")], {1}))
    | name | ms |
    | --- | ---: |
    | a\|b | 1.5 |
    """
    names, right = list(columns), set(numbers)
    rule = ["---:" if index in right else "---" for index in range(len(names))]
    lines = [names, rule, *([_plain(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _blocks(blocks: Iterable[Block]) -> Iterable[str]:
    """Return the blocks' texts, neighbouring notices as one list."""
    for kind, group in groupby(blocks, type):
        texts = map(_block, group)
        yield from ["\n".join(texts)] if kind is Notice else texts


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Notice):
        return f"- {_marked(block.state)}: {_plain(block.text)}"
    if isinstance(block, Facts):
        lines = [f"- **{_plain(name)}**: {_plain(value)}" for name, value in block.pairs()]
        return "\n".join([f"**{_plain(block.title)}**\n"] * bool(block.title) + lines)
    if not isinstance(block, Table):
        return ""
    rows = [
        [_marked(cell) if f == "state" else cell for cell, f in zip(row, block.forms, strict=True)]
        for row in block.rows
    ]
    numbers = [index for index, form in enumerate(block.forms) if form not in TEXTS]
    table = markdown_table(map(_plain, block.columns), rows, numbers)
    return f"{_plain(block.title)}:\n\n{table}" if block.title else table


def _marked(state: str) -> str:
    return f"{MARKS[state]} {state}" if state in MARKS else _plain(state)


def _plain(text: str) -> str:
    """Return text on one line that is not taken for HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
