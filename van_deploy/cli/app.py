"""The ``van-deploy`` program: its commands, and where errors become messages and exit codes.

Exit codes: 0 done, 1 a gate failed, 2 wrong usage, 3 something is missing from
the environment, 4 a conversion or a build failed, 5 bad weights, images, recipe
or bundle, 130 interrupted. Anything else that goes wrong is a fault of this
program and shows its traceback.

To add a command: write a function of its name in the module of its heading, whose docstring
opens with one line and carries an ``Example:``, and add its name to :data:`HEADINGS`. The help
of the whole program reads these first lines from the source, so that it imports no command.
"""

from __future__ import annotations

import ast
import errno
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from van_deploy import __version__
from van_deploy.cli.console import print_error
from van_deploy.errors import InputError, MissingDependency, VanDeployError

HEADINGS: Mapping[str, tuple[str, str]] = {
    "make": ("Main job", "export quantize build run"),
    "gates": ("Gates", "verify evaluate drift check"),
    "look": ("Look around", "list info inspect doctor"),
    "use": ("Use", "bench predict package serve sign verify-signature report"),
}
"""The heading and the commands of each module here, in the order in which people need them."""

COMMANDS = {name: module for module, (_, names) in HEADINGS.items() for name in names.split()}
"""The module of each command, in the order of the help."""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

OTHER_PLACE = "choose another place"
HERE, INPUT = MissingDependency, InputError
OS_REMEDIES: Mapping[int, tuple[type[VanDeployError], str]] = {
    errno.ENOSPC: (HERE, f"Free some space there, or {OTHER_PLACE} with --output."),
    errno.EDQUOT: (HERE, f"Your quota is used up: free some space, or {OTHER_PLACE}."),
    errno.EROFS: (HERE, f"That file system is read-only: {OTHER_PLACE} with --output."),
    errno.EACCES: (HERE, f"Change the permissions, or {OTHER_PLACE}."),
    errno.EPERM: (HERE, f"Change the permissions, or {OTHER_PLACE}."),
    errno.EMFILE: (HERE, "Raise the limit on open files (`ulimit -n`)."),
    errno.ENFILE: (HERE, "The machine has too many files open: close other programs."),
    errno.EFBIG: (HERE, f"Raise the limit on a file's size (`ulimit -f`), or {OTHER_PLACE}."),
    errno.EIO: (HERE, f"The disk or the network behind it fails: try again, or {OTHER_PLACE}."),
    errno.ESTALE: (HERE, "The network file system lost the file: try again."),
    errno.ENAMETOOLONG: (INPUT, "Choose a shorter name."),
    errno.ELOOP: (INPUT, "The links there lead in a circle: remove one of them."),
    errno.ENOTDIR: (INPUT, "A part of that path is a file, not a folder: check it."),
    errno.EISDIR: (INPUT, "That is a folder where a file is wanted: check the path."),
}
EXPORTING = {"torch", "timm", "torchvision", "onnxscript", "onnxsim", "onnx_ir", "safetensors"}
EXPORTING |= {"huggingface_hub"}
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "Failed to allocate memory")


class CommandGroup(TyperGroup):
    """The commands, each imported when it is asked for; where errors become exit codes."""

    def __init__(self, **settings: Any) -> None:
        """Enter a command without options for each of :data:`COMMANDS`, for the program's help."""
        super().__init__(**settings)
        for module, (panel, names) in HEADINGS.items():
            source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
            functions = [
                node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
            ]
            said = {
                node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in functions
            }
            for name in names.split():
                summary = said[_function(name)]
                self.commands[name] = TyperCommand(name, help=summary, rich_help_panel=panel)

    def invoke(self, ctx: Any) -> object:  # typer.Context, or Click's own in older Typers
        """Run the command and leave with the exit code of what went wrong.

        Raises:
            typer.Exit: the command failed for a reason the user can do something about.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # stdout is pointed at nothing, so that closing it at exit does not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except (VanDeployError, MemoryError, OSError, RuntimeError, ImportError) as failure:
            error = user_error(failure)
            if error is None:
                raise
            print_error(error.message, error.remedy)
            raise typer.Exit(error.exit_code) from failure

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` ask for, with its options."""
        if args and args[0] in COMMANDS:
            from van_deploy.cli.options import with_options

            name, module = args[0], COMMANDS[args[0]]
            program = typer.Typer(add_completion=False, rich_markup_mode="rich")
            function = getattr(importlib.import_module(f"van_deploy.cli.{module}"), _function(name))
            program.command(name)(with_options(function))
            self.commands[name] = typer.main.get_command(program)
        return super().resolve_command(ctx, args)


def _function(name: str) -> str:
    return "list_" if name == "list" else name.replace("-", "_")


app = typer.Typer(
    cls=CommandGroup,
    name="van-deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a gate failed, 2 wrong usage, 3 something is missing here, "
    "4 a conversion failed, 5 bad input. Every command has --json.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"van-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn Visual Attention Network checkpoints into checked ONNX files and TensorRT engines.

    Start with: van-deploy export van_b1
    """


def user_error(failure: BaseException) -> VanDeployError | None:
    """Return what to tell the user, or None if the failure is a fault of this program.

    A full disk, missing permissions and exhausted memory come out of many
    libraries in many types; here each becomes one message.
    """
    if isinstance(failure, VanDeployError):
        return failure
    text = str(failure)
    package = (getattr(failure, "name", None) or "").partition(".")[0]
    if isinstance(failure, ModuleNotFoundError) and package in EXPORTING:
        return MissingDependency(
            f"This needs {package}, which is not installed.",
            "Install everything with `pip install van-deploy`; requirements-runtime.txt is for "
            "hosts that verify, predict, serve and inspect.",
        )
    if isinstance(failure, MemoryError) or any(sign in text for sign in OUT_OF_MEMORY):
        said = f" ({text.strip().splitlines()[0][:200]})" if text.strip() else ""
        return MissingDependency(
            f"There is not enough memory for this{said}.",
            "Use a smaller batch or image size, close other programs, or take a larger machine.",
        )
    if isinstance(failure, OSError) and (number := failure.errno or 0) in OS_REMEDIES:
        kind, remedy = OS_REMEDIES[number]
        place = f" '{str(failure.filename)[:200]}'" if failure.filename else ""
        return kind(f"Cannot write or read{place}: {os.strerror(number)}.", remedy)
    if "No usable temporary directory found" in text:
        return MissingDependency(
            "There is no folder for temporary files that may be written.",
            "Set the environment variable TMPDIR to one.",
        )
    if "No space left on device" in text:
        return MissingDependency(f"Cannot write: {text}", OS_REMEDIES[errno.ENOSPC][1])
    return None


def main() -> NoReturn:
    """Run ``van-deploy`` with the arguments of this process and exit."""
    _require_utf8()
    # A service or a shell (``>&-``) may have closed a stream: it gets a place to go.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - for good
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        os.getcwd()
    except OSError as error:  # the folder is gone: native libraries abort there
        print_error(f"The working folder cannot be used: {error.strerror}.", "Change to another.")
        raise SystemExit(InputError.exit_code) from error
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows '?'
            stream.reconfigure(errors="replace")
    app(prog_name="van-deploy")
    raise SystemExit(0)


def _require_utf8() -> None:
    """Start again in UTF-8 mode where the locale has file names in another encoding.

    In the C locale without Python's coercion a name such as ``Größe.png`` becomes text that
    native libraries (ONNX Runtime, TensorRT) do not take. This process's own programs
    inherit the mode.
    """
    ours = os.path.basename(sys.argv[0]) in {"van-deploy", "__main__.py"}
    if sys.getfilesystemencoding().lower() in {"utf-8", "utf8"} or not ours or os.name != "posix":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
