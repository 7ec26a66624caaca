"""``van-deploy inspect``: what is in an artefact, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit
from van_deploy.cli.shared import RequireSignature, opened

__all__ = ["inspect"]


def inspect(
    artefact: Annotated[
        Path, typer.Argument(help="An ONNX file, an engine (.plan), or a bundle with them.")
    ],
    trust_engine: Annotated[
        bool,
        typer.Option(
            "--trust-engine",
            help="Open an engine whose sidecar is gone. An engine is code: only your own.",
        ),
    ] = False,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in an artefact: operators, sizes, inputs and outputs, metadata.

    Example: van-deploy inspect dist/van_b1/model.onnx
    """
    if require_signature is not None:
        opened(artefact, require_signature)
    from van_deploy.describe import artefacts_described
    from van_deploy.report.sections_engine import artefacts_blocks

    emit(artefacts_described(artefact, trust_engine=trust_engine), as_json, artefacts_blocks)
