"""The commands in the order in which people need them, each imported when it is asked for.

To add one: write a function of its name in the module of its heading, whose docstring opens
with one line and carries an ``Example:``, and add its name here. The help of the whole
program reads these first lines from the source, so that it imports no command.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

HEADINGS: Mapping[str, tuple[str, str]] = {
    "make": ("Main job", "export quantize build run"),
    "gates": ("Gates", "verify evaluate drift check"),
    "look": ("Look around", "list info inspect doctor"),
    "use": ("Use", "bench predict package serve sign verify-signature report"),
}
"""The heading and the commands of each module here."""

COMMANDS = {name: module for module, (_, names) in HEADINGS.items() for name in names.split()}
"""The module of each command, in the order of the help."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are resolved, not for its own help."""

    def __init__(self, **settings: Any) -> None:
        """Enter a command without options for each of :data:`COMMANDS`."""
        super().__init__(**settings)
        for module, (panel, names) in HEADINGS.items():
            summaries = dict(_summaries(module))
            for name in names.split():
                summary = summaries[_function(name)]
                self.commands[name] = TyperCommand(name, help=summary, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` ask for, in full."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = command_named(args[0])
        return super().resolve_command(ctx, args)


def command_named(name: str) -> Any:
    """Return a command of :data:`COMMANDS` with its options, as Typer runs it."""
    from van_deploy.cli.options import with_options

    module = importlib.import_module(f"van_deploy.cli.{COMMANDS[name]}")
    program = typer.Typer(add_completion=False, rich_markup_mode="rich")
    panel = HEADINGS[COMMANDS[name]][0]
    function = with_options(getattr(module, _function(name)))
    program.command(name, rich_help_panel=panel)(function)
    return typer.main.get_command(program)


def _function(name: str) -> str:
    return "list_" if name == "list" else name.replace("-", "_")


def _summaries(module: str) -> Iterator[tuple[str, str]]:
    """Yield each function of a module, and the first line of its docstring."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]
