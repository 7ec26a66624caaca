"""``van-deploy export``: from weights to a checked ONNX bundle."""

from __future__ import annotations

from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import Set, with_options
from van_deploy.cli.shared import Force, Images, Output
from van_deploy.config.named import EXPORT, Changes

__all__ = ["export"]


@with_options
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant (van_b1), van_digits, a checkpoint (./mine.pth), a Hugging Face "
            "repository (owner/name), or a recipe (mine.toml)."
        ),
    ],
    changes: Annotated[Changes, EXPORT],
    output: Output = None,
    images: Images = None,
    assignments: Set = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Export a VAN to ONNX with a free batch, checked against PyTorch at every batch size.

    Example: van-deploy export van_b1 --output dist/van_b1
    """
    with telling() as tell:
        from van_deploy import api
        from van_deploy.recipe import changes_from_text, recipe_for

        recipe = recipe_for(model, changes | changes_from_text(assignments or ()))
        made = api.export(
            recipe, output, images=images, offline=offline, force=force, progress=tell
        )
    for note in made.result.notes:
        remark(f"note: {note}")
    from van_deploy.report.sections_model import export_blocks

    emit(made.done, as_json, export_blocks)
    if not made:
        raise typer.Exit(1)
