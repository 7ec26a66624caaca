"""The program: help, version, exit codes, errors, and output."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from tests.conftest import Cli
from tests.each import each
from van_deploy import __version__
from van_deploy.cli.app import COMMANDS, CommandGroup
from van_deploy.cli.console import print_error, print_note, print_result, progress_bar
from van_deploy.documents import plain
from van_deploy.errors import BundleError, ConversionError, GateFailed, MissingDependency
from van_deploy.model.variants import VARIANTS
from van_deploy.report.document import checks_table, table


def failing(error: BaseException) -> Result:
    """Run a program whose only command raises ``error``, with the real error handling."""
    program = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    program.callback()(lambda: None)  # a program with sub-commands

    @program.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(program, ["fail"])


def test_help_lists_every_command_with_its_options_and_an_example(cli: Cli) -> None:
    overview = cli("--help").stdout
    listed = {line.strip(" │").split(" ")[0] for line in overview.splitlines()}
    assert set(COMMANDS) <= listed
    pages = {name: cli(name, "--help").stdout for name in COMMANDS}
    for name, page in {"": overview, **pages}.items():
        assert max(map(len, page.splitlines())) <= 100, name
        assert "…" not in page, name
    for name, shown in (
        ("bench", "--batches INTEGER,... Batch sizes. Unless given, a static graph"),
        ("bench", "[default: 3.0; above 0]"),
        ("build", "--batch MIN:OPT:MAX,... Batch sizes"),
        ("serve", "--instances INTEGER Batches that run at the same time, per model. [default: 1;"),
        ("sign", "* --key PATH The private key"),
        ("build", "[auto, tensorrt, tensorrt-rtx, inductor; default: auto]"),
        ("quantize", "--precision -p fp16|bf16|int8 Precision to make. [default: int8]"),
        ("quantize", "─ Images ─"),
    ):
        assert shown in " ".join(pages[name].replace("│", " ").split())
    for name, page in pages.items():
        assert f"Example: van-deploy {name}" in " ".join(page.split())
        assert "--json" in page


KINDS = {GateFailed: 1, MissingDependency: 3, ConversionError: 4, BundleError: 5}
LONG = "SQNR is low in /a/[red]very/" + "long/" * 40  # neither markup nor wrapped
REMEDY = "Keep [more].\n  Or less."
NO_MEMORY = "There is not enough memory for this"
ALLOC = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
NO_TEMPORARY = "No usable temporary directory found in ['/tmp']"


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "dist/place")


@each(
    ("failure", "code", "message", "remedy"),
    [
        *(
            (kind(LONG, "Keep [more].\nOr less."), c, f"{LONG}\n", REMEDY)
            for kind, c in KINDS.items()
        ),
        (KeyboardInterrupt(), 130, "Interrupted.", ""),
        (os_error(errno.ENOSPC), 3, "'dist/place': No space left on device.", "Free some space"),
        (OSError(errno.ENOSPC, "", "a", None, "dist/place"), 3, "'dist/place': No s", "Free some"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "Cannot wr", "Free"),
        (MemoryError(), 3, NO_MEMORY, "Use a smaller batch"),
        (RuntimeError(ALLOC), 3, f"{NO_MEMORY} ([enforce", "Use a smaller batch"),
        (RuntimeError("std::bad_alloc"), 3, NO_MEMORY, "Use a smaller batch"),
        (os_error(errno.EFBIG), 3, "'dist/place'", "ulimit -f"),
        (os_error(errno.ENAMETOOLONG), 5, "'dist/place'", "Choose a shorter name."),
        (os_error(errno.ELOOP), 5, "'dist/place'", "circle"),
        (os_error(errno.ENOTDIR), 5, "'dist/place'", "is a file, not a folder"),
        (os_error(errno.EISDIR), 5, "'dist/place'", "not a file"),
        (FileNotFoundError(errno.ENOENT, NO_TEMPORARY), 3, "no writable folder", "TMPDIR to one."),
        (ModuleNotFoundError("No torch", name="torch.nn"), 3, "This needs torch", "pip install"),
    ],
)
def test_errors_become_a_message_and_a_remedy(
    failure: BaseException, code: int, message: str, remedy: str
) -> None:
    result = failing(failure)
    assert (result.exit_code, result.stdout) == (code, "")
    found, _, advice = result.stderr.partition("\n  ")
    assert found.startswith("error: ")
    assert message in f"{found}\n"
    assert remedy in advice


@each("error", [KeyError("weights"), OSError(errno.EINVAL, "odd"), RuntimeError("a bug")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    assert failing(error).exception is error


@each("arguments", ["list", "list --json", "--version"])
def test_closed_pipe_and_full_disk(arguments: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "van_deploy", *arguments.split()]
    for output, expected in (
        (write, (128 + signal.SIGPIPE, "")),
        (os.open("/dev/full", os.O_WRONLY), (3, "error: Cannot write or read: No space left on")),
    ):
        with open(output, "w") as stdout:
            result = subprocess.run(
                command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (result.returncode, result.stderr[: len(expected[1])]) == expected


def test_output_without_unicode_and_without_docstrings(cli: Cli) -> None:
    assert cli.passes("--version") == f"van-deploy {__version__}\n"
    command = [sys.executable, "-OO", "-m", "van_deploy", "--help"]
    odd = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "0"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=odd)
    assert "doctor" in result.stdout


def test_list_shows_every_variant(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    variants = {item["name"]: item for item in cli.document("list")}
    assert list(variants) == [*VARIANTS, "van_digits"]
    assert variants["van_b0"]["multiply_adds"] == VARIANTS["van_b0"].config.mac_count(224)
    assert (variants["van_b0"]["here"], variants["van_b4"]["weights"]) == (None, None)
    output = cli.passes("list")
    assert "for commercial use, please contact" in output
    lines = {line.split(" ")[0]: line for line in output.splitlines()}
    assert max(map(len, lines.values())) <= 100
    assert lines["van_b1"].split()[:7] == ["van_b1", "13.9", "M", "2.5", "G", "224", "81.1"]
    assert lines["van_digits"].endswith("  YES   in this package")


# --- output -----------------------------------------------------------------------------------

Printed = pytest.CaptureFixture[str]
Colour = Enum("Colour", {"RED": "red"})
HOSTILE = "\x1b]0;mine\x07\x1b[2J\x9b31mcat\u202egod\r"


def test_plain_converts_every_type_of_a_result() -> None:
    value = {
        "numbers": [math.inf, -math.inf, math.nan, np.float32(0.5), np.int64(3)],
        "logits": np.array([[1.0, math.nan]]),
        Colour.RED: (Path("a") / "b", None, True, 1, Colour.RED),
    }
    expected = {"numbers": ["inf", "-inf", "nan", 0.5, 3], "logits": [[1.0, "nan"]]}
    expected["Colour.RED"] = ["a/b", None, True, 1, "red"]
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain({"error": object()})


def test_output_is_a_table_or_one_json_document(capsys: Printed) -> None:
    row = {"name": HOSTILE, "é": 1, "[bold]": 2}
    differ = ("failed", "top-1", "[bold]3 of 8 differ")
    checks = checks_table([(True, "SQNR", ""), differ, (None, "x", "no GPU")])
    rows = table([row], "name = name name; [bold] = é d")
    with progress_bar("Loading") as progress:  # prints nothing without a terminal
        progress("Downloading", 1, 2)
    print_result(row, as_json=False, blocks=lambda _: [*rows, *checks])
    print_error(HOSTILE, HOSTILE)
    print_note(HOSTILE)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["name", "[bold]"]
    assert [line.split()[0] for line in lines[-3:]] == ["PASS", "FAIL", "SKIPPED"]
    assert lines[-2].endswith("[bold]3 of 8 differ")
    assert err.count("\n") == 3
    for text in (out, err):
        assert "cat" in text
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(text)
    print_result(row, as_json=True, blocks=list)
    text = capsys.readouterr().out
    assert json.loads(text) == row
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "é" in text
