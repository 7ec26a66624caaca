"""A document as GitHub's Markdown, such as a job's summary; plots are left to their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from van_deploy.report.document import TEXT_FORMATS, Block, Document, Paragraph, Properties, Table

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "SKIPPED": "⚠️", "STALE": "⚠️"}


def markdown_from_document(document: Document, level: int = 1) -> str:
    """Return the document; ``level`` is that of its first heading."""
    head = "#" * level
    parts = [
        f"{head} {_marked(document.state).split()[0]} {_plain(document.title)}",
        _plain(document.subtitle),
        f"**{document.state}**: {_plain(document.note)}",
        *map(_block, document.notices),
    ]
    for title, blocks in document.sections.items():
        parts += [f"{head}# {_plain(title)}", *map(_block, blocks)]
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


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Properties):
        drawn = _marked if block.states else lambda name: f"**{_plain(name)}**"
        lines = [f"- {drawn(name)}: {_plain(value)}" for name, value in block.pairs]
        return "\n".join([f"**{_plain(block.title)}**\n"] * bool(block.title) + lines)
    if not isinstance(block, Table):
        return ""
    forms = list(block.columns.values())
    rows = [
        [_marked(cell) if form == "state" else cell for cell, form in zip(row, forms, strict=True)]
        for row in block.rows
    ]
    numbers = [index for index, form in enumerate(forms) if form not in TEXT_FORMATS]
    table = markdown_table(map(_plain, block.columns), rows, numbers)
    return f"{_plain(block.title)}:\n\n{table}" if block.title else table


def _marked(state: str) -> str:
    return f"{MARKS[state]} {state}" if state in MARKS else _plain(state)


def _plain(text: str) -> str:
    """Return text on one line that is not taken for HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
