"""Rendering of a document as GitHub Markdown, such as a job summary, without plots."""

from collections.abc import Iterable, Sequence

from van_deploy.report.document import TEXT_FORMATS, Block, Document, Paragraph, Properties, Table

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "SKIPPED": "⚠️", "STALE": "⚠️"}


def markdown_from_document(document: Document, level: int = 1) -> str:
    """Return the document as Markdown; ``level`` is the level of its first heading."""
    head = "#" * level
    parts = [
        f"{head} {_with_mark(document.state).split()[0]} {_escape(document.title)}",
        _escape(document.subtitle),
        f"**{document.state}**: {_escape(document.note)}",
        *map(_render_block, document.notices),
    ]
    for title, blocks in document.sections.items():
        parts += [f"{head}# {_escape(title)}", *map(_render_block, blocks)]
    parts += ["---", _escape(document.footer)] if document.footer else []
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown_table(
    columns: Iterable[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()
) -> str:
    r"""Return a Markdown table; columns whose indices are in ``numbers`` are right-aligned.

    >>> print(markdown_table(("name", "ms"), [("a|b", "1.5")], {1}))
    | name | ms |
    | --- | ---: |
    | a\|b | 1.5 |
    """
    names, right = list(columns), set(numbers)
    rule = ["---:" if index in right else "---" for index in range(len(names))]
    lines = [names, rule, *([_escape(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return _escape(block.text)
    if isinstance(block, Properties):
        drawn = _with_mark if block.states else lambda name: f"**{_escape(name)}**"
        lines = [f"- {drawn(name)}: {_escape(value)}" for name, value in block.pairs]
        return "\n".join([f"**{_escape(block.title)}**\n"] * bool(block.title) + lines)
    if not isinstance(block, Table):
        return ""
    forms = list(block.columns.values())
    rows = [
        [_with_mark(c) if form == "state" else c for c, form in zip(row, forms, strict=True)]
        for row in block.rows
    ]
    numbers = [index for index, form in enumerate(forms) if form not in TEXT_FORMATS]
    table = markdown_table(map(_escape, block.columns), rows, numbers)
    return f"{_escape(block.title)}:\n\n{table}" if block.title else table


def _with_mark(state: str) -> str:
    return f"{MARKS[state]} {state}" if state in MARKS else _escape(state)


def _escape(text: str) -> str:
    """Return text in one line, with HTML escaped."""
    return " ".join(text.split()).replace("<", "&lt;").replace(">", "&gt;")
