"""What there is and what is in it: ``list``, ``info``, ``inspect`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import CommandOutput
from van_deploy.cli.options import RequireSignature, opened
from van_deploy.environment.doctor import REQUIREMENTS
from van_deploy.stopwatch import no_progress


def list_() -> CommandOutput:
    """List the variants: size, work, accuracy, and where their weights are.

    Example: van-deploy list --json
    """
    from van_deploy.model.variants import list_variants
    from van_deploy.report.sections_model import list_blocks

    return CommandOutput(list_variants(), list_blocks)


def info(
    model: Annotated[
        str, typer.Argument(help="A variant, a checkpoint, van_digits, or a bundle's folder.")
    ],
) -> CommandOutput:
    """Show one model or bundle in full. Nothing is downloaded.

    Example: van-deploy info ./mine.pth
    """
    from van_deploy.describe import describe_model
    from van_deploy.report.sections_model import info_blocks

    return CommandOutput(describe_model(model), info_blocks)


def inspect(
    artifact: Annotated[
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
) -> CommandOutput:
    """Show what is in an artifact: operators, sizes, inputs and outputs, metadata.

    Example: van-deploy inspect dist/van_b1/model.onnx
    """
    if require_signature is not None:
        opened(artifact, require_signature, no_progress)
    from van_deploy.describe import describe_artifacts
    from van_deploy.report.sections_model import inspect_blocks

    return CommandOutput(describe_artifacts(artifact, trust_engine=trust_engine), inspect_blocks)


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=lambda: list(REQUIREMENTS),
            help="Exit with code 3 unless NAME is here and usable; may be repeated. "
            f"One of {', '.join(REQUIREMENTS)}.",
        ),
    ] = None,
) -> CommandOutput:
    """Tell what is installed, what can be done on this machine, and what clashes.

    Example: van-deploy doctor --require onnxruntime --require gpu
    """
    from van_deploy.environment.doctor import Environment, check_requirements
    from van_deploy.report.sections_model import environment_blocks

    environment = Environment()
    return CommandOutput(
        environment, environment_blocks, failure=check_requirements(environment, require or ())
    )
