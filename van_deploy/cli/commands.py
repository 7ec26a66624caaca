"""The commands in the order in which people need them, each imported when it is asked for.

To add one: write ``van_deploy/cli/<command>.py`` with a function whose docstring
opens with one line and carries an ``Example:``, and add an entry here. The help of
the whole program shows the entries' own words, so that it imports no command; a
test compares them with the docstrings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "Command", "LazyGroup", "command_named"]

MAIN_JOB = "Main job"
JUDGE = "Gates"
LOOK = "Look around"
USE = "Use"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        panel: heading it stands under in the help.
        summary: the first line of its docstring.
        module: of ``van_deploy.cli``; "" if it is called like the command.
        function: in that module; "" if it is called like the command.
    """

    panel: str
    summary: str
    module: str = ""
    function: str = ""


COMMANDS: Mapping[str, Command] = {
    "export": Command(
        MAIN_JOB,
        "Export a VAN to ONNX with a free batch, checked against PyTorch at every batch size.",
    ),
    "quantize": Command(MAIN_JOB, "Add an FP16 or INT8 graph to a bundle, judged beside FP32."),
    "build": Command(
        MAIN_JOB, "Build TensorRT engines from a bundle; TensorRT for RTX needs no GPU for it."
    ),
    "run": Command(
        MAIN_JOB,
        "Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.",
    ),
    "verify": Command(
        JUDGE,
        "Compare every artefact with PyTorch: logits, batch sizes, flips, and module by module.",
    ),
    "evaluate": Command(
        JUDGE,
        "Measure top-1 and top-5 of PyTorch and every artefact, and what was lost between them.",
    ),
    "drift": Command(
        JUDGE, "Show what each stage, block or module of each ONNX artefact adds to the error."
    ),
    "check": Command(
        JUDGE, "Check a bundle against its gates and a baseline; ends with 1 if anything is worse."
    ),
    "list": Command(
        LOOK,
        "List the variants: size, work, accuracy, and where their weights are.",
        "list_",
        "list_variants",
    ),
    "info": Command(LOOK, "Show one model or bundle in full. Nothing is downloaded."),
    "inspect": Command(
        LOOK, "Show what is in an artefact: operators, sizes, inputs and outputs, metadata."
    ),
    "doctor": Command(
        LOOK, "Tell what is installed, what can be done on this machine, and what clashes."
    ),
    "bench": Command(
        USE, "Time every artefact in every run time that is here, each in a process of its own."
    ),
    "predict": Command(
        USE, "Tell what is in pictures, with the preprocessing that belongs to the weights."
    ),
    "package": Command(
        USE, "Write a Triton model repository with its configuration, client and manifests."
    ),
    "serve": Command(
        USE, "Answer over HTTP: a web page for pictures, and the v2 protocol for programs."
    ),
    "sign": Command(USE, "Sign a bundle: its manifest, which names every file with its SHA-256."),
    "verify-signature": Command(
        USE,
        "Check a bundle's signature, every file's digest, and that no other file is in it.",
        "verify_signature",
        "verify_signature",
    ),
    "report": Command(
        USE, "Write one self-contained HTML file, and the same as Markdown, about a bundle."
    ),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are resolved, not for its own help."""

    def __init__(self, **settings: Any) -> None:
        """Enter a command without options for each of :data:`COMMANDS`."""
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.commands[name] = TyperCommand(
                name, help=entry.summary, rich_help_panel=entry.panel
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` ask for, in full."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = command_named(args[0])
        return super().resolve_command(ctx, args)


def command_named(name: str) -> Any:
    """Return a command of :data:`COMMANDS` with its options, as Typer runs it."""
    entry = COMMANDS[name]
    module = importlib.import_module(f"van_deploy.cli.{entry.module or name}")
    program = typer.Typer(add_completion=False, rich_markup_mode="rich")
    function = getattr(module, entry.function or name)
    program.command(name, rich_help_panel=entry.panel)(function)
    return typer.main.get_command(program)
