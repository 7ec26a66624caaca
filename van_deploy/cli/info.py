"""``van-deploy info``: one model or bundle in full."""

from __future__ import annotations

from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit

__all__ = ["info"]


def info(
    model: Annotated[
        str, typer.Argument(help="A variant, a checkpoint, van_digits, or a bundle's folder.")
    ],
    image_size: Annotated[
        str | None,
        typer.Option(
            help="Size of the input the work is counted for: 224, or 224x320 (height x width).",
            metavar="SIDE|HxW",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show one model or bundle in full. Nothing is downloaded.

    Example: van-deploy info ./mine.pth
    """
    from van_deploy.config import PreprocessingSettings
    from van_deploy.describe import model_described
    from van_deploy.report.sections_model import described_blocks
    from van_deploy.schema import validated

    given = {"image_size": image_size}
    asked = validated(PreprocessingSettings, given, spelling={("image_size",): "--image-size"})
    emit(model_described(model, asked.image_size), as_json, described_blocks)
