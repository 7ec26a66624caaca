"""``van-deploy run``: everything a recipe asks for, ending in its gates."""

from __future__ import annotations

from typing import Annotated

import typer

from van_deploy.cli.console import AsJson, emit, remark, telling
from van_deploy.cli.options import Set, with_options
from van_deploy.cli.shared import Output
from van_deploy.config import RunSettings
from van_deploy.config.named import RUN, Changes
from van_deploy.errors import GateFailed

__all__ = ["run"]


@with_options
def run(
    recipe: Annotated[
        str,
        typer.Argument(help="A recipe (van_b1, van_digits, mine.toml), or anything with weights."),
    ],
    changes: Annotated[Changes, RUN],
    settings: RunSettings,
    output: Output = None,
    assignments: Set = None,
    as_json: AsJson = False,
) -> None:
    """Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.

    Example: van-deploy run export/mine.toml --output dist/mine
    """
    from van_deploy.recipe import changes_from_text, recipe_for

    wanted = recipe_for(recipe, changes | changes_from_text(assignments or ()))
    with telling() as tell:
        from van_deploy import api

        result = api.run_recipe(wanted, output, settings, progress=tell)
    for note in result.export.notes:
        remark(f"note: {note}")
    from van_deploy.report.sections_model import run_blocks

    emit(result, as_json, run_blocks)
    if not result:
        raise GateFailed(
            f"The bundle '{result.bundle.path}' was written and does not pass its gates.",
            "See the rows above; `van-deploy drift` names the module.",
        )
