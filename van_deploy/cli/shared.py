"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from van_deploy.api import Bundle

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle that `van-deploy export` made.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Make everything anew even if nothing changed.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any key of the recipe, such as engines.tf32=false; repeatable.",
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLICKEY",
        help="Refuse the bundle unless it is whole and signed with this key (a PEM file).",
    ),
]


def opened(path: Path, require_signature: Path | None) -> Bundle:
    """Return the bundle at ``path``. Errors are those of :class:`van_deploy.api.Bundle`."""
    from van_deploy.api import open_bundle

    return open_bundle(path, require_signature=require_signature)
