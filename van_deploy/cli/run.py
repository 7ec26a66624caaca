"""``van-deploy run``: everything a recipe asks for, ending in its gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, names_in, progress, remark
from van_deploy.cli.opening import RunnerName, execution_by

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.recipe import Recipe
    from van_deploy.run import RunResult

__all__ = ["run"]

INSTEAD = "Instead of what the recipe says"


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe: van_b1, van_digits, or a file (mine.toml).")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to check on. By default sample photographs."),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp16, int8 or both, besides fp32; may be repeated.", rich_help_panel=INSTEAD
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Images to calibrate on: a folder or a .npz.", rich_help_panel=INSTEAD),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Precisions to build engines of; may be repeated.", rich_help_panel=INSTEAD
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Compute capabilities of the engines: sm_86,sm_89.", rich_help_panel=INSTEAD
        ),
    ] = "",
    evaluate: Annotated[
        Path | None,
        typer.Option(help="Folder of labelled images to evaluate on.", rich_help_panel=INSTEAD),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels file for --evaluate.", rich_help_panel=INSTEAD)
    ] = None,
    runner: RunnerName = "ort-cpu",
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Make everything anew even if nothing changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Do all that a recipe asks for: export, quantise, build engines, verify and evaluate.

    Example: van-deploy run export/mine.toml --output dist/mine
    """
    from van_deploy.cli.export import recipe_for
    from van_deploy.errors import GateFailed

    wanted = _with(
        recipe_for(recipe),
        precision={"make": names_in(precision), "images": calibration},
        engines={"precisions": names_in(engine), "targets": names_in([target])},
        evaluate={"images": evaluate, "labels": labels},
    )
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        def say(text: str) -> None:
            bar.update(task, description=text, total=None)

        from van_deploy.checks.record import jsonable
        from van_deploy.pipeline import load_for
        from van_deploy.run import RunSettings, run_recipe

        settings = RunSettings(images=images, execution=execution_by(runner), force=force)
        say("Loading weights")
        loaded = load_for(wanted, offline=offline)
        folder = output or Path("dist") / loaded.name
        result = run_recipe(wanted, loaded, folder, settings, progress=say)
    for note in result.export.notes:
        remark(f"note: {note}")
    emit(jsonable(result.as_dict()), as_json, lambda _: _table(result))
    if not result:
        raise GateFailed(
            f"The bundle '{result.bundle.path}' was written and does not pass its gates.",
            "See the rows above; `van-deploy drift` names the module.",
        )


def _with(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """Return the recipe with what was given on the command line in its tables."""
    from dataclasses import replace

    changed = {
        name: replace(getattr(recipe, name), **{key: v for key, v in values.items() if v})
        for name, values in tables.items()
    }
    return replace(recipe, **changed)


def _table(result: RunResult) -> RenderableType:
    from rich.text import Text

    from van_deploy.report.bundle_view import artefacts_table
    from van_deploy.report.gates_view import evaluate_tables, verify_tables
    from van_deploy.report.tables import stack

    bundle = result.bundle
    names = bundle.manifest.class_names
    lines = [f"Exported: {result.export.reason}."]
    lines += [
        f"{made.artefact}: {made.reason}."
        + ("" if made.passed else " It does not hold its gate; `van-deploy quantize` tells why.")
        for made in result.made
    ]
    return stack(
        Text("\n".join(lines)),
        artefacts_table(bundle.manifest, bundle.sizes()),
        verify_tables(result.verify, names),
        evaluate_tables(result.evaluate) if result.evaluate else None,
        Text(f"The bundle is {bundle.path}."),
    )
