"""The ``van-deploy`` program: its commands, messages of errors, and exit codes.

Exit codes: 0 success, 1 a gate failed, 2 invalid usage, 3 a package or device is not
available, 4 a conversion or a build failed, 5 invalid weights, images, recipe or bundle,
130 interrupted. Any other failure is a bug in this program and shows its traceback.

To add a command: write a function of its name in the module of its heading, with a docstring
of one line and an ``Example:``, and add the name to :data:`HEADINGS`. The help of the program
reads these lines from the source without importing the commands, which is faster.
"""

import ast
import contextlib
import errno
import faulthandler
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from van_deploy import __version__
from van_deploy.cli.console import print_error
from van_deploy.errors import InputError, MissingDependency, VanDeployError, is_out_of_memory

HEADINGS: Mapping[str, tuple[str, str]] = {
    "make": ("Main commands", "export quantize build run"),
    "gates": ("Gates", "verify evaluate drift check"),
    "look": ("Information", "list info inspect doctor"),
    "use": ("Use", "bench predict package serve sign verify-signature report"),
}
"""The heading and the commands of each module, in the order of use."""

COMMANDS = {name: module for module, (_, names) in HEADINGS.items() for name in names.split()}
"""The module of each command, in the order of the help."""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE

OTHER_PLACE = "choose another place"
OS_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: f"Free some space there, or {OTHER_PLACE}.",
    errno.EDQUOT: f"Your quota is used up: free some space, or {OTHER_PLACE}.",
    errno.EROFS: f"That file system is read-only: {OTHER_PLACE}.",
    errno.EACCES: f"Change the permissions, or {OTHER_PLACE}.",
    errno.EPERM: f"Change the permissions, or {OTHER_PLACE}.",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`).",
    errno.ENFILE: "The machine has too many files open: close other programs.",
    errno.EFBIG: f"Raise the limit on file sizes (`ulimit -f`), or {OTHER_PLACE}.",
    errno.EIO: f"The disk or its network fails: try again, or {OTHER_PLACE}.",
    errno.ESTALE: "The network file system lost the file: try again.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "The links there lead in a circle: remove one of them.",
    errno.ENOTDIR: "A part of that path is a file, not a folder: check it.",
    errno.EISDIR: "That is a folder, not a file: check the path.",
}
INPUT_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
EXPORT_PACKAGES = "torch timm torchvision onnxscript onnxsim onnx_ir safetensors huggingface_hub"


class CommandGroup(TyperGroup):
    """The commands, imported on first use; turns errors into exit codes."""

    def __init__(self, **settings: Any) -> None:
        """Add a command without options for each of :data:`COMMANDS`, for the program's help."""
        super().__init__(**settings)
        for module, (panel, names) in HEADINGS.items():
            source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
            summaries = {
                node.name: (ast.get_docstring(node) or "").partition("\n")[0]
                for node in ast.parse(source).body
                if isinstance(node, ast.FunctionDef)
            }
            for name in names.split():
                summary = summaries[_function_name(name)]
                self.commands[name] = TyperCommand(name, help=summary, rich_help_panel=panel)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Return the context of the arguments; prints the help and the version."""
        with _errors_as_exit_codes():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> object:  # typer.Context, or Click's own in older Typers
        """Run the command, and exit with the code of its error."""
        with _errors_as_exit_codes():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command in ``args``, with its options."""
        if args and args[0] in COMMANDS:
            from van_deploy.cli.options import with_options

            name, module = args[0], COMMANDS[args[0]]
            program = typer.Typer(add_completion=False, rich_markup_mode="rich")
            functions = importlib.import_module(f"van_deploy.cli.{module}")
            program.command(name)(with_options(getattr(functions, _function_name(name))))
            self.commands[name] = typer.main.get_command(program)
        return super().resolve_command(ctx, args)


@contextlib.contextmanager
def _errors_as_exit_codes() -> Iterator[None]:
    """Print an error in the block that the user can fix, and exit with its code.

    Raises:
        typer.Exit: there was such an error.
    """
    try:
        yield
    except KeyboardInterrupt:
        print_error("Interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # Redirect stdout, so that closing it at exit does not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except (VanDeployError, MemoryError, OSError, RuntimeError, ImportError) as failure:
        error = user_error(failure)
        if error is None:
            raise
        print_error(error.message, error.remedy)
        raise typer.Exit(error.exit_code) from failure


def _function_name(name: str) -> str:
    return "list_" if name == "list" else name.replace("-", "_")


app = typer.Typer(
    cls=CommandGroup,
    name="van-deploy",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 a gate failed, 2 invalid usage, 3 something is not available, "
    "4 a conversion failed, 5 invalid input. Every command has --json.",
)


def _print_version(requested: bool) -> None:
    if requested:
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
    """Export Visual Attention Networks to verified ONNX files and TensorRT engines.

    Start with: van-deploy export van_b1
    """


def user_error(failure: BaseException) -> VanDeployError | None:
    """Return the error to report, or None if the failure is a bug in this program.

    Libraries raise many types for a full disk, missing permissions and exhausted memory; here
    each becomes one message.
    """
    if isinstance(failure, VanDeployError):
        return failure
    text = str(failure)
    package = (getattr(failure, "name", None) or "").partition(".")[0]
    if isinstance(failure, ModuleNotFoundError) and package in EXPORT_PACKAGES.split():
        return MissingDependency(
            f"This needs {package}, which is not installed.",
            "Install all packages with `pip install van-deploy`; requirements-runtime.txt is only "
            "enough to verify, predict, serve and inspect.",
        )
    if is_out_of_memory(failure):
        detail = f" ({text.strip().splitlines()[0][:200]})" if text.strip() else ""
        return MissingDependency(
            f"There is not enough memory for this{detail}.",
            "Use a smaller batch or image size, close other programs, or use a larger machine.",
        )
    if isinstance(failure, OSError) and (number := failure.errno or 0) in OS_REMEDIES:
        kind = InputError if number in INPUT_ERRORS else MissingDependency
        name = failure.filename2 or failure.filename  # of a copy, the destination
        place = f" '{str(name)[:200]}'" if name else ""
        return kind(f"Cannot write or read{place}: {os.strerror(number)}.", OS_REMEDIES[number])
    if "No usable temporary directory found" in text:
        return MissingDependency(
            "There is no writable folder for temporary files.",
            "Set the environment variable TMPDIR to one.",
        )
    if "No space left on device" in text:
        return MissingDependency(f"Cannot write: {text}", OS_REMEDIES[errno.ENOSPC])
    return None


def main() -> NoReturn:
    """Run ``van-deploy`` with the arguments of this process and exit."""
    _require_utf8()
    # A service or a shell (``>&-``) can close a stream; replace it.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - stays open
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    faulthandler.enable()  # names the package whose native code ends the process
    try:
        os.getcwd()
    except OSError as error:  # deleted: native libraries abort in it
        print_error(f"The working folder cannot be used: {error.strerror}.", "Change to another.")
        raise SystemExit(InputError.exit_code) from error
    if not os.environ.get("COLUMNS", "").strip("0").isdigit():  # 0: some terminals' unknown width
        os.environ.pop("COLUMNS", None)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # unsupported characters become '?'
            stream.reconfigure(errors="replace")
    app(prog_name="van-deploy")
    raise SystemExit(0)


def _require_utf8() -> None:
    """Restart in UTF-8 mode if the locale has another encoding for file names.

    In the C locale without Python's coercion a name such as ``Größe.png`` becomes text that
    native libraries (ONNX Runtime, TensorRT) do not accept. Child processes inherit the mode.
    """
    is_program = os.path.basename(sys.argv[0]) in {"van-deploy", "__main__.py"}
    is_utf8 = sys.getfilesystemencoding().lower() in {"utf-8", "utf8"}
    if is_program and not is_utf8 and os.name == "posix":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
