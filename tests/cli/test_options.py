"""Commands created from functions and tables: parsing, validation and help."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.testing import CliRunner, Result

from tests.each import each
from van_deploy.cli.app import CommandGroup
from van_deploy.cli.options import OptionValues, with_options
from van_deploy.config import BatchRange
from van_deploy.config.fields import ByteSize, Table, option
from van_deploy.config.named_options import RUN, Changes

HOW = "How it is done"


class Inner(Table):
    """A table inside the table.

    Attributes:
        seconds: At least.
    """

    PANEL = HOW

    seconds: float = option(3.0, gt=0)


class Options(Table):
    """One option of every kind.

    Attributes:
        count: How many.
        kind: Which.
        fold: Make the [exact] rewrites.
        batch: Sizes.
        file: A file.
        sides: In pixels.
    """

    count: int = option(20, ge=1, le=40)
    kind: Literal["fast", "good"] | None = option(None)
    fold: bool = option(True)
    force: bool = option(False, key="always")
    batch: BatchRange = option(BatchRange)
    size: ByteSize | None = option(None)
    names: tuple[str, ...] = option((), flags=["--name", "-n"])
    patterns: tuple[str, ...] = option((), commas=False)
    sides: tuple[int, ...] = option((1, 2))
    file: Path | None = option(None)
    inner: Inner = option(Inner)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.force and not self.fold:
            yield "{always} and no {fold} conflict.", "Remove {fold}."


def run(*words: str) -> tuple[Result, list[object]]:
    """Run a program with one command; return its result and its arguments."""
    program = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    program.callback()(lambda: None)  # a program with sub-commands
    called: list[object] = []

    @program.command()
    @with_options
    def make(
        place: str,
        table: Annotated[OptionValues, Options],
        changes: Annotated[Changes, RUN],
        quiet: bool = False,
    ) -> None:
        """Make it."""
        called.extend([place, table.table, {k: c.value for k, c in changes.items()}, quiet])

    result = CliRunner().invoke(program, ["make", *words], env={"COLUMNS": "100", "NO_COLOR": "1"})
    return result, called


def test_every_type_of_option_is_parsed() -> None:
    assert run("here")[1] == ["here", Options(), {}, False]
    words = (
        "here --count 3 --kind good --no-fold --batch 1:2:4 --size 1GiB -n a,b --name c "
        "--patterns a{1,2} --sides 3,4 --file x.txt --seconds 0.5 --quiet --target sm_89 "
        "--engine fp16"
    )
    result, called = run(*words.split())
    assert result.exit_code == 0, result.stderr
    assert called[1] == Options(
        count=3,
        kind="good",
        fold=False,
        batch=BatchRange(1, 2, 4),
        size=1 << 30,
        names=("a", "b", "c"),
        patterns=("a{1,2}",),
        sides=(3, 4),
        file=Path("x.txt"),
        inner=Inner(seconds=0.5),
    )
    changed = {("engines", "targets"): ["sm_89"], ("engines", "precisions"): ["fp16"]}
    assert called[2:] == [changed, True]


@each(
    ("words", "message"),
    [
        ("--count 41", "'--count' is 41: it should be less than or equal to 40.\n"),
        ("--count many", "'--count' is 'many': it should be a whole number.\n"),
        ("--count 3.0", "'--count' is '3.0': it should be a whole number.\n"),
        ("--kind slow", "'--kind' is 'slow': it should be 'fast' or 'good'.\n"),
        ("--batch 1:2", "'--batch' is '1:2': it should be min:opt:max, such as 1:8:32, or one si"),
        ("--size lots", "'--size' is 'lots': it should be a number and a unit, such as 4GiB."),
        ("--sides 1,x", "'--sides' is 'x': it should be a whole number.\n"),
        ("--seconds nan", "'--seconds' is nan: it should be a finite number.\n"),
        ("--seconds 0", "'--seconds' is 0.0: it should be greater than 0.\n"),
        ("--always --no-fold", "--always and no --no-fold conflict.\n  Remove --no-fold."),
    ],
)
def test_mistake_names_the_option(words: str, message: str) -> None:
    result, called = run("here", *words.split())
    assert (result.exit_code, called) == (2, [])
    assert result.stderr.startswith(f"error: {message}")


def test_help_shows_choices_default_and_limits() -> None:
    text = " ".join(run("--help")[0].stdout.replace("│", " ").split())
    for words in (
        "--count INTEGER How many. [default: 20; from 1 up to 40]",
        "--kind fast|good Which.",
        "--fold --no-fold Make the [exact] rewrites.",
        "--batch MIN:OPT:MAX Sizes. [default: 1:8:32]",
        "--name -n TEXT,...",
        "--sides INTEGER,... In pixels. [default: 1,2]",
        "--file PATH A file.",
        "--seconds NUMBER At least. [default: 3.0; above 0]",
        "--engine TEXT,... fp32, fp16, bf16, int8 or another ONNX artifact",
    ):
        assert words in text
    assert f"─ {HOW} ─" in text
