"""The program as a whole: help, version, exit codes, errors, speed of importing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.conftest import Cli
from tests.each import each
from van_deploy import __version__
from van_deploy.cli.app import COMMANDS, CommandGroup, translated
from van_deploy.errors import BundleError, ConversionError, GateFailed, MissingDependency

HEAVY = ("torch", "timm", "onnx", "onnxruntime", "numpy", "PIL", "tensorrt", "tensorrt_rtx")
WORKFLOW = (
    *("export", "run", "list", "info", "inspect", "doctor", "quantize", "build", "verify"),
    *("evaluate", "drift", "check", "bench", "predict", "package", "serve", "report"),
    *("sign", "verify-signature"),
)


def failing(error: BaseException) -> Result:
    """Run a program whose only command raises ``error``, with the real error handling."""
    program = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False)
    program.callback()(lambda: None)  # a program with sub-commands

    @program.command()
    def fail() -> None:
        raise error

    return CliRunner().invoke(program, ["fail"])


def python(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100", **extra},
    )


def test_version() -> None:
    result = python("-m", "van_deploy", "--version")
    assert (result.returncode, result.stdout) == (0, f"van-deploy {__version__}\n")


def test_the_help_of_the_program_and_of_each_command(cli: Cli) -> None:
    assert set(COMMANDS) == set(WORKFLOW)
    overview = cli("--help").stdout
    listed = {line.strip(" │").split(" ")[0] for line in overview.splitlines()}
    assert set(COMMANDS) <= listed
    pages = {name: cli(name, "--help").stdout for name in COMMANDS}
    for name, page in {"": overview, **pages}.items():
        assert max(map(len, page.splitlines())) <= 100, name
        assert "…" not in page, name
    for name, page in pages.items():
        assert f"Example: van-deploy {name}" in " ".join(page.split())
        assert "--json" in page


@each("arguments", [("nonsense",), ("list", "--nonsense"), ("doctor", "x")])
def test_wrong_usage_ends_with_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert arguments[-1] in result.stderr


@each(
    ("error", "code"),
    [
        (GateFailed("SQNR 12.0 dB is below 20.0 dB.", "Keep more in FP16."), 1),
        (MissingDependency("SQNR 12.0 dB is below 20.0 dB.", "Keep more in FP16."), 3),
        (ConversionError("SQNR 12.0 dB is below 20.0 dB.", "Keep more in FP16."), 4),
        (BundleError("SQNR 12.0 dB is below 20.0 dB.", "Keep more in FP16."), 5),
    ],
)
def test_an_error_is_its_message_its_remedy_and_its_code(error: Exception, code: int) -> None:
    result = failing(error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == "error: SQNR 12.0 dB is below 20.0 dB.\n  Keep more in FP16.\n"


def test_an_error_is_not_taken_for_markup_and_not_wrapped() -> None:
    path = "/a/[red]very/" + "long/" * 40
    assert failing(BundleError(f"No bundle in {path}")).stderr == f"error: No bundle in {path}\n"


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    fault = KeyError("weights")
    assert failing(fault).exception is fault


NO_MEMORY = "There is not enough memory for this"
ALLOC = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
NO_TEMPORARY = "No usable temporary directory found in ['/tmp']"


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "dist/place")


@each(
    ("failure", "code", "message", "remedy"),
    [
        (os_error(errno.ENOSPC), 3, "'dist/place': No space left on device.", "Free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "Cannot wr", "Free"),
        (MemoryError(), 3, NO_MEMORY, "Use a smaller batch"),
        (RuntimeError(ALLOC), 3, f"{NO_MEMORY} ([enforce", "Use a smaller batch"),
        (RuntimeError("std::bad_alloc"), 3, NO_MEMORY, "Use a smaller batch"),
        (os_error(errno.EFBIG), 3, "'dist/place'", "ulimit -f"),
        (os_error(errno.EIO), 3, "'dist/place'", "choose another place"),
        (os_error(errno.ENAMETOOLONG), 5, "'dist/place'", "Choose a shorter name."),
        (os_error(errno.ELOOP), 5, "'dist/place'", "circle"),
        (os_error(errno.ENOTDIR), 5, "'dist/place'", "is a file, not a folder"),
        (os_error(errno.EISDIR), 5, "'dist/place'", "a file is wanted"),
        (FileNotFoundError(errno.ENOENT, NO_TEMPORARY), 3, "no folder for temp", "TMPDIR to one."),
        (ModuleNotFoundError("No torch", name="torch.nn"), 3, "This needs torch", "pip install"),
    ],
)
def test_what_the_machine_refuses_is_one_message(
    failure: Exception, code: int, message: str, remedy: str
) -> None:
    result = failing(failure)
    assert result.exit_code == code
    told, advice = result.stderr.splitlines()
    assert told.startswith("error: ")
    assert message in told
    assert remedy in advice


@each("error", [OSError(errno.EINVAL, "odd"), RuntimeError("a bug"), ValueError()])
def test_other_failures_are_not_explained_away(error: Exception) -> None:
    assert translated(error) is None


def test_ctrl_c_ends_with_130() -> None:
    result = failing(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "error: Interrupted.\n")


@pytest.mark.skipif(os.name == "nt", reason="a pipe breaks in another way on Windows")
@each("arguments", [("list",), ("list", "--json")])
def test_a_broken_pipe_is_quiet(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "van_deploy", *arguments],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


@each("arguments", [["--help"], ["list"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['van-deploy', *{arguments!r}]\n"
        "try: runpy.run_module('van_deploy', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = python("-c", code)
    assert result.stderr == "[]\n"
    assert result.stdout


def test_importing_every_command_imports_nothing_heavy(repository: Path) -> None:
    names = [f"van_deploy.cli.{path.stem}" for path in (repository / "van_deploy/cli").glob("*.py")]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    result = python("-c", code + f"print([name for name in {HEAVY!r} if name in sys.modules])")
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_output_survives_a_terminal_without_unicode() -> None:
    result = python("-m", "van_deploy", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "doctor" in result.stdout


def test_json_is_one_document_and_nothing_else(cli: Cli) -> None:
    result = cli("doctor", "--json", "--require", "onnxruntime")
    assert json.loads(result.stdout)["environment"]["van_deploy"] == __version__
    assert result.stderr == ""


def test_a_name_that_no_file_system_takes_is_one_message(cli: Cli) -> None:
    for words in (("info", "a" * 5000), ("inspect", "a" * 300), ("predict", "a" * 300, "x")):
        result = cli(*words)
        assert result.exit_code == 5
        assert "File name too long" in result.stderr
