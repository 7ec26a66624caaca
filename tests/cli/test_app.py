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
from van_deploy.cli.app import COMMANDS, CommandGroup, user_error
from van_deploy.errors import BundleError, ConversionError, GateFailed, MissingDependency
from van_deploy.model.variants import VARIANTS

HEAVY = ("torch", "timm", "onnx", "onnxruntime", "numpy", "PIL", "tensorrt", "tensorrt_rtx")


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


def test_the_help_of_the_program_and_of_each_command(cli: Cli) -> None:
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


KINDS = {GateFailed: 1, MissingDependency: 3, ConversionError: 4, BundleError: 5}
LONG = "SQNR is low in /a/[red]very/" + "long/" * 40  # neither markup nor wrapped


@each(
    ("error", "code"),
    [
        *((kind(LONG, "Keep [more].\nOr less."), code) for kind, code in KINDS.items()),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_is_its_message_its_remedy_and_its_code(error: BaseException, code: int) -> None:
    result = failing(error)
    assert (result.exit_code, result.stdout) == (code, "")
    told = f"{LONG}\n  Keep [more].\n  Or less." if code != 130 else "Interrupted."
    assert result.stderr == f"error: {told}\n"
    fault = KeyError("weights")  # a fault of the program keeps its traceback
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
    assert user_error(error) is None


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
        "import sys, runpy, pkgutil, importlib, van_deploy.cli as cli\n"
        "for found in pkgutil.iter_modules(cli.__path__, 'van_deploy.cli.'):\n"
        "    importlib.import_module(found.name)\n"
        f"sys.argv = ['van-deploy', *{arguments!r}]\n"
        "try: runpy.run_module('van_deploy', run_name='__main__')\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = python("-c", code)
    assert result.stderr == "[]\n"
    assert result.stdout


def test_output_survives_a_terminal_without_unicode() -> None:
    result = python("-m", "van_deploy", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "doctor" in result.stdout
    version = python("-OO", "-m", "van_deploy", "--version")
    assert (version.returncode, version.stdout) == (0, f"van-deploy {__version__}\n")


def test_a_name_that_no_file_system_takes_is_one_message(cli: Cli) -> None:
    for words in (("info", "a" * 5000), ("inspect", "a" * 300), ("predict", "a" * 300, "x")):
        result = cli(*words)
        assert result.exit_code == 5
        assert "File name too long" in result.stderr


def test_list_names_every_variant_and_the_embedded_network(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    listed = {item["name"]: item for item in json.loads(cli("list", "--json").stdout)}
    assert list(listed) == [*VARIANTS, "van_digits"]
    assert listed["van_b0"] == {
        "name": "van_b0",
        "parameters": 4105800,
        "multiply_adds": VARIANTS["van_b0"].config.mac_count(224),
        "image_size": 224,
        "top1_percent": 75.4,
        "top1_on": "ImageNet-1K validation",
        "weights": "Visual-Attention-Network/VAN-Tiny-original:van_tiny_754.pth.tar",
        "note": "",
        "here": None,
    }
    assert listed["van_b4"]["weights"] is None
    assert "mmpretrain" in listed["van_b4"]["note"]
    assert Path(listed["van_digits"]["here"]).is_file()
    result = cli("list")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = {line.split(" ")[0]: line for line in result.stdout.splitlines()}
    assert max(map(len, lines.values())) <= 100
    assert lines["van_b1"].split() == [
        *("van_b1", "13.9", "M", "2.5", "G", "224", "81.1", "-"),
        "VAN-Small-original:van_small_811.pth.tar",
    ]
    assert lines["van_digits"].endswith("  YES   in this package")
    assert "for commercial use, please contact" in result.stdout
