"""Output of the commands.

Results go to stdout, progress and notes to stderr. With ``--json`` stdout has one JSON
document and nothing else; an error is text on stderr, and the exit code is its class.
Infinity and NaN are ``"inf"``, ``"-inf"`` and ``"nan"``, which ``float()`` reads.

Rich is imported on first use.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from van_deploy.documents import CONTROL_CHARACTERS, plain

if TYPE_CHECKING:
    from rich.console import Console

    from van_deploy.report.document import Block
    from van_deploy.stopwatch import Progress

PIPE_WIDTH = 100  # columns of output that is not a terminal


@dataclass(frozen=True)
class Output:
    """Output of a command.

    Attributes:
        result: plain data: mappings, sequences, frozen dataclasses, numbers.
        blocks: function from the result in JSON types to the tables and texts to print.
        remarks: lines for stderr.
        failure: exception to raise at the end; None on success.
    """

    result: object
    blocks: Callable[[Any], Iterable[Block]]
    remarks: Iterable[str] = ()
    failure: Exception | None = None


def print_output(shown: Output, as_json: bool) -> None:
    """Print the output of a command, and raise its failure."""
    for text in shown.remarks:
        print_note(text)
    print_result(shown.result, as_json, shown.blocks)
    if shown.failure is not None:
        raise shown.failure


def print_result(result: object, as_json: bool, blocks: Callable[[Any], Iterable[Block]]) -> None:
    """Write a command's result to stdout.

    Args:
        result: see :class:`Output`.
        as_json: write one JSON document instead of tables.
        blocks: see :class:`Output`.
    """
    if as_json:
        text = json_text(plain(result), indent=2) + "\n"
    else:
        from van_deploy.report.render_rich import rich_from_blocks

        console = _console(sys.stdout)
        with console.capture() as capture:
            console.print(rich_from_blocks(blocks(plain(result)), console.width))
        text = capture.get()
        if not console.is_terminal:  # no padding at the ends of lines in files and pipes
            text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.write(text)
    sys.stdout.flush()


def json_text(value: object, indent: int | None = None) -> str:
    r"""Return JSON that is safe to print: all control characters are escaped.

    >>> json_text("\x9b2Jé")
    '"\\u009b2Jé"'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


@contextlib.contextmanager
def progress_bar(first: str = "Loading PyTorch") -> Iterator[Progress]:
    """Yield a function that shows progress on stderr, if stderr is a terminal."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = _console(sys.stderr)
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(30)]
    columns.append(TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(first, total=None)

        def update(text: str, done: int = 0, total: int | None = None, /) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield update


def print_note(text: str) -> None:
    """Write a note of one line to stderr."""
    _console(sys.stderr).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, remedy: str = "") -> None:
    """Write an error to stderr: the message, and the remedy below it."""
    from rich.text import Text

    lines = Text.assemble(("error: ", "bold red"), message)
    for line in remedy.splitlines():
        lines.append(f"\n  {line}")
    _console(sys.stderr).print(lines, highlight=False, soft_wrap=True)


def _console(file: IO[str]) -> Console:
    """Return a console for ``file``; its width is fixed if that is not a terminal."""
    from van_deploy.report.render_rich import HarmlessConsole

    has_width = file.isatty() or "COLUMNS" in os.environ
    return HarmlessConsole(file=file, width=None if has_width else PIPE_WIDTH)
