"""``van-deploy inspect``: what is in an artefact, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit
from van_deploy.cli.opening import RequireSignature, TrustEngine, open_bundle

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["described", "inspect"]

ENGINES = (".plan", ".engine", ".trt")


def inspect(
    artefact: Annotated[
        Path, typer.Argument(help="An ONNX file, an engine (.plan), or a bundle with them.")
    ],
    trust_engine: TrustEngine = False,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in an artefact: operators, sizes, inputs and outputs, metadata.

    Example: van-deploy inspect dist/van_b1/model.onnx
    """
    if require_signature is not None:
        open_bundle(artefact, require_signature)
    emit(described(artefact, trust_engine=trust_engine), as_json, _table)


def described(artefact: Path, *, trust_engine: bool = False) -> list[dict[str, Any]]:
    """Return the description of one file, or of everything in a bundle that can be run.

    ``trust_engine`` is that of :func:`~van_deploy.engine.inspect.describe_engine`.

    Raises:
        InputError: there is nothing to describe, or it cannot be read.
    """
    from van_deploy.bundle import Bundle
    from van_deploy.errors import InputError
    from van_deploy.graph.inspect import describe_onnx

    if artefact.is_dir():
        bundle = Bundle.open(artefact)
        files = [bundle.path / artefact.file for artefact in bundle.artefacts.values()]
        return [one for file in files for one in described(file, trust_engine=trust_engine)]
    if not artefact.exists():
        raise InputError(f"There is no file '{artefact}'.", "Check the path.")
    if artefact.suffix in ENGINES:
        from van_deploy.engine.inspect import describe_engine

        return [describe_engine(artefact, trust_engine=trust_engine)]
    if artefact.suffix == ".onnx":
        return [describe_onnx(artefact)]
    raise InputError(
        f"'{artefact}' is neither an ONNX file nor an engine.",
        f"Give a .onnx or {', '.join(ENGINES)} file or a bundle; "
        f"a checkpoint is shown by `van-deploy info {artefact}`.",
    )


def _table(descriptions: list[dict[str, Any]]) -> RenderableType:
    from van_deploy.report.tables import stack

    return stack(*(_one(description) for description in descriptions))


def _one(description: Mapping[str, Any]) -> RenderableType:
    if description["kind"] == "onnx":
        return _onnx(description)
    from van_deploy.report.engine_view import engine_tables

    return engine_tables(description)


def _onnx(description: Mapping[str, Any]) -> RenderableType:
    from van_deploy.report.tables import Column, bytes_text, facts_table, rows_table, stack

    facts = {
        "file": description["file"],
        "size": bytes_text(description["bytes"]),
        "written by": description["producer"] or None,
        "opset": f"{description['opset']} (IR {description['ir_version']})",
        **{f"input {name}": _tensor(value) for name, value in description["inputs"].items()},
        **{f"output {name}": _tensor(value) for name, value in description["outputs"].items()},
        **{
            f"weights {kind}": f"{value['values']:,} values, {bytes_text(value['bytes'])}"
            for kind, value in description["weights"].items()
        },
    }
    if description["external_files"]:
        facts["weights in"] = ", ".join(description["external_files"])
    columns = (Column("operator"), Column("nodes", "right"))
    rows = [*description["operators"].items(), ("all", description["nodes"])]
    metadata = {key: _line(value) for key, value in description["metadata"].items()}
    return stack(
        facts_table(facts),
        rows_table(columns, rows),
        facts_table(metadata, "Metadata") if metadata else None,
    )


def _tensor(value: Mapping[str, Any]) -> str:
    return f"{value['dtype']} ({', '.join(str(size) for size in value['shape'])})"


def _line(value: object) -> str:
    """Return a value on one line: a mapping's entries, a list's first few."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_line(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = " ".join(_line(item) for item in value[:12])
        return shown if len(value) <= 12 else f"{shown} ... ({len(value)})"
    return f"{value:g}" if isinstance(value, float) else str(value)
