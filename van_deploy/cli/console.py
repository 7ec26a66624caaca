"""What every command prints with.

The convention: results go to stdout, progress and remarks to stderr. With
``--json`` stdout carries one JSON document and nothing else; an error stays
text on stderr, and the exit code tells which kind it was. Numbers JSON cannot
spell are the strings ``"inf"``, ``"-inf"`` and ``"nan"``, which ``float()`` reads.

Rich is imported when something is printed, not before.
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

PIPE_WIDTH = 100  # columns where output does not go to a terminal


@dataclass(frozen=True)
class CommandOutput:
    """What a command prints.

    Attributes:
        result: plain data: mappings, sequences, frozen dataclasses, numbers.
        blocks: makes what a person reads from the result in its JSON form.
        remarks: lines for stderr.
        failure: what the command ends with; None where it is done.
    """

    result: object
    blocks: Callable[[Any], Iterable[Block]]
    remarks: Iterable[str] = ()
    failure: Exception | None = None


def print_output(shown: CommandOutput, as_json: bool) -> None:
    """Print what a command returned, and raise what it ends with."""
    for text in shown.remarks:
        print_note(text)
    print_result(shown.result, as_json, shown.blocks)
    if shown.failure is not None:
        raise shown.failure


def print_result(result: object, as_json: bool, blocks: Callable[[Any], Iterable[Block]]) -> None:
    """Write a command's result to stdout.

    Args:
        result: see :class:`CommandOutput`.
        as_json: write one JSON document instead.
        blocks: see :class:`CommandOutput`.
    """
    if as_json:
        text = json_text(plain(result), indent=2) + "\n"
    else:
        from van_deploy.report.render_rich import rich_from_blocks

        console = _console(sys.stdout)
        with console.capture() as capture:
            console.print(rich_from_blocks(blocks(plain(result)), console.width))
        text = capture.get()
        if not console.is_terminal:  # no cell padding at the ends of lines in files and pipes
            text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    sys.stdout.write(text)
    sys.stdout.flush()


def json_text(value: object, indent: int | None = None) -> str:
    r"""Return JSON that a terminal may be shown: control characters are escaped, all of them.

    >>> json_text("\x9b2Jé")
    '"\\u009b2Jé"'
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return CONTROL_CHARACTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


@contextlib.contextmanager
def progress_bar(first: str = "Loading PyTorch") -> Iterator[Progress]:
    """Give a function that shows on stderr what is being done, and how much of it is done.

    It is silent where stderr is not a terminal.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = _console(sys.stderr)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(first, total=None)

        def tell(text: str, done: int = 0, total: int | None = None, /) -> None:
            bar.update(task, description=text, completed=done, total=total)

        yield tell


def print_note(text: str) -> None:
    """Write one line to stderr that is neither a result nor an error."""
    _console(sys.stderr).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def print_error(message: str, remedy: str = "") -> None:
    """Write an error to stderr: what failed, and below it what to do next."""
    from rich.text import Text

    lines = Text.assemble(("error: ", "bold red"), message)
    for line in remedy.splitlines():
        lines.append(f"\n  {line}")
    _console(sys.stderr).print(lines, highlight=False, soft_wrap=True)


def _console(file: IO[str]) -> Console:
    """Return a console for ``file``, of fixed width where that is not a terminal."""
    from van_deploy.report.render_rich import HarmlessConsole

    console = HarmlessConsole(file=file)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = HarmlessConsole(file=file, width=PIPE_WIDTH)
    return console
