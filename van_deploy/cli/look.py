"""Information: ``list``, ``info``, ``inspect`` and ``doctor``."""

from pathlib import Path
from typing import Annotated

import typer

from van_deploy.cli.console import Output
from van_deploy.cli.options import RequireSignature, load_bundle
from van_deploy.environment.doctor import REQUIREMENTS
from van_deploy.stopwatch import no_progress


def list_() -> Output:
    """List the variants: size, multiply-adds, accuracy, and their weights.

    Example: van-deploy list --json
    """
    from van_deploy.model.variants import list_variants
    from van_deploy.report.sections_model import list_blocks

    return Output(list_variants(), list_blocks)


def info(
    model: Annotated[
        str, typer.Argument(help="A variant, a checkpoint, van_digits, or the folder of a bundle.")
    ],
) -> Output:
    """Show one model or bundle in full. Nothing is downloaded.

    Example: van-deploy info ./mine.pth
    """
    from van_deploy.describe import describe_model
    from van_deploy.report.sections_model import info_blocks

    return Output(describe_model(model), info_blocks)


def inspect(
    artifact: Annotated[Path, typer.Argument(help="An ONNX file, an engine (.plan), or a bundle.")],
    trust_engine: Annotated[
        bool,
        typer.Option(
            "--trust-engine",
            help="Open an engine without its sidecar. An engine is code: only your own.",
        ),
    ] = False,
    require_signature: RequireSignature = None,
) -> Output:
    """Show the contents of an artifact: operators, sizes, inputs and outputs, metadata.

    Example: van-deploy inspect dist/van_b1/model.onnx
    """
    if require_signature is not None:
        load_bundle(artifact, require_signature, no_progress)
    from van_deploy.describe import describe_artifacts
    from van_deploy.report.sections_model import inspect_blocks

    return Output(describe_artifacts(artifact, trust_engine=trust_engine), inspect_blocks)


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=lambda: list(REQUIREMENTS),
            help="Exit with code 3 unless NAME is available and usable; repeatable. "
            f"One of {', '.join(REQUIREMENTS)}.",
        ),
    ] = None,
) -> Output:
    """Show installed packages and devices, supported tasks, and conflicts.

    Example: van-deploy doctor --require onnxruntime --require gpu
    """
    from van_deploy.environment.doctor import Environment, check_requirements
    from van_deploy.report.sections_model import environment_blocks

    environment = Environment()
    failure = check_requirements(environment, require or ())
    return Output(environment, environment_blocks, failure=failure)
