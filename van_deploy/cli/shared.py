"""Arguments that several commands have, and how a command ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from van_deploy.api import Bundle

__all__ = ["BundlePath", "Force", "Images", "Output", "RequireSignature", "opened"]

BundlePath = Annotated[Path, typer.Argument(help="A bundle that `van-deploy export` made.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default."),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of images to check on. By default sample photographs."),
]
Force = Annotated[
    bool, typer.Option("--force", help="Make everything anew even if nothing changed.")
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLICKEY",
        help="Refuse the bundle unless it is whole and signed with this key (a PEM file).",
    ),
]


def opened(path: Path, require_signature: Path | None) -> Bundle:
    """Return the bundle at ``path``, after checking its signature where one is required.

    Raises:
        SignatureError: it has none, one of another key, or was changed since.
        BundleError: there is no bundle.
    """
    from van_deploy.api import open_bundle

    return open_bundle(path, require_signature=require_signature)
