"""The commands in the order in which people need them, each imported when it is asked for.

To add one: write ``van_deploy/cli/<command>.py`` with a function of that name whose docstring
opens with one line and carries an ``Example:``, and add an entry here. The help of
the whole program shows the entries' own words, so that it imports no command; a
test compares them with the docstrings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMANDS", "LazyGroup", "command_named"]

MAIN_JOB = "Main job"
JUDGE = "Gates"
LOOK = "Look around"
USE = "Use"

COMMANDS: Mapping[str, tuple[str, str]] = {
    "export": (
        MAIN_JOB,
        "Export a VAN to ONNX with a free batch, checked against PyTorch at every batch size.",
    ),
    "quantize": (MAIN_JOB, "Add an FP16 or INT8 graph to a bundle, judged beside FP32."),
    "build": (
        MAIN_JOB,
        "Build engines from a bundle: TensorRT plans, or packages of PyTorch's Inductor.",
    ),
    "run": (
        MAIN_JOB,
        "Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.",
    ),
    "verify": (
        JUDGE,
        "Compare every artefact with PyTorch: logits, batch sizes, flips, and module by module.",
    ),
    "evaluate": (
        JUDGE,
        "Measure top-1 and top-5 of PyTorch and every artefact, and what was lost between them.",
    ),
    "drift": (
        JUDGE,
        "Show what each stage, block or module of each ONNX artefact adds to the error.",
    ),
    "check": (
        JUDGE,
        "Check a bundle against its gates and a baseline; ends with 1 if anything is worse.",
    ),
    "list": (LOOK, "List the variants: size, work, accuracy, and where their weights are."),
    "info": (LOOK, "Show one model or bundle in full. Nothing is downloaded."),
    "inspect": (
        LOOK,
        "Show what is in an artefact: operators, sizes, inputs and outputs, metadata.",
    ),
    "doctor": (LOOK, "Tell what is installed, what can be done on this machine, and what clashes."),
    "bench": (
        USE,
        "Time every artefact in every runtime of a device, each in a process of its own.",
    ),
    "predict": (
        USE,
        "Tell what is in pictures, with the preprocessing that belongs to the weights.",
    ),
    "package": (
        USE,
        "Write a Triton model repository with its configuration, client and manifests.",
    ),
    "serve": (USE, "Answer over HTTP: a web page for images, and the v2 protocol for programs."),
    "sign": (USE, "Sign a bundle: its manifest, which names every file with its SHA-256."),
    "verify-signature": (
        USE,
        "Check a bundle's signature, every file's digest, and that no other file is in it.",
    ),
    "report": (
        USE,
        "Write one self-contained HTML file, and the same as Markdown, about a bundle.",
    ),
}
"""Each command's heading in the help, and the first line of its docstring."""


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are resolved, not for its own help."""

    def __init__(self, **settings: Any) -> None:
        """Enter a command without options for each of :data:`COMMANDS`."""
        super().__init__(**settings)
        for name, (panel, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=summary, rich_help_panel=panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that ``args`` ask for, in full."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = command_named(args[0])
        return super().resolve_command(ctx, args)


def command_named(name: str) -> Any:
    """Return a command of :data:`COMMANDS` with its options, as Typer runs it."""
    function = {"list": "list_"}.get(name, name.replace("-", "_"))
    module = importlib.import_module(f"van_deploy.cli.{function}")
    program = typer.Typer(add_completion=False, rich_markup_mode="rich")
    program.command(name, rich_help_panel=COMMANDS[name][0])(getattr(module, function))
    return typer.main.get_command(program)
