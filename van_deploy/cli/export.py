"""``van-deploy export``: from weights to a checked ONNX bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, names_in, progress, remark

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.model.checkpoint import LoadedVan
    from van_deploy.pipeline import ExportResult
    from van_deploy.precision.stage import QuantizeResult
    from van_deploy.recipe import Recipe

__all__ = ["export", "floats", "precisions_in", "recipe_for"]

WEIGHTS = "Weights"
INPUT = "Preprocessing (the weights' own by default; timm's names)"
GRAPH = "Graph"
PRECISION = "Other precisions"


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A variant (van_b1), van_digits, a checkpoint (./mine.pth), a Hugging Face "
            "repository (owner/name), or a recipe (mine.toml)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the bundle; dist/NAME by default."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to check on. By default sample photographs."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="For a variant: a checkpoint, a repository, or 'random'.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "",
    sha256: Annotated[
        str, typer.Option(help="Digest the weights file must have.", rich_help_panel=WEIGHTS)
    ] = "",
    container: Annotated[
        str,
        typer.Option(
            help="Which weights of a file that has several, such as state_dict_ema.",
            rich_help_panel=WEIGHTS,
        ),
    ] = "",
    labels: Annotated[
        str, typer.Option(help="File with one class name a line.", rich_help_panel=WEIGHTS)
    ] = "",
    seed: Annotated[int, typer.Option(help="Of random weights.", rich_help_panel=WEIGHTS)] = 0,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never use the network.", rich_help_panel=WEIGHTS)
    ] = False,
    image_size: Annotated[
        int | None,
        typer.Option(help="Side of the square input, in pixels.", rich_help_panel=INPUT),
    ] = None,
    mean: Annotated[
        str, typer.Option(help="Such as 0.485,0.456,0.406.", rich_help_panel=INPUT)
    ] = "",
    std: Annotated[
        str, typer.Option(help="Such as 0.229,0.224,0.225.", rich_help_panel=INPUT)
    ] = "",
    interpolation: Annotated[
        str, typer.Option(help="Such as bicubic or bilinear.", rich_help_panel=INPUT)
    ] = "",
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Crop over resized short side, in (0, 1].", rich_help_panel=INPUT),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes min:opt:max, 1:8:32 by default.", rich_help_panel=GRAPH)
    ] = "",
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX opset, 17 or newer; 20 by default.", rich_help_panel=GRAPH),
    ] = None,
    fold: Annotated[
        bool,
        typer.Option("--fold/--no-fold", help="Make the exact rewrites.", rich_help_panel=GRAPH),
    ] = True,
    simplify: Annotated[
        bool,
        typer.Option("--simplify/--no-simplify", help="Run onnxsim.", rich_help_panel=GRAPH),
    ] = True,
    embed_preprocess: Annotated[
        str,
        typer.Option(
            help="Also write graphs that take pixels: uint8 (N,H,W,3) bytes, normalize "
            "(N,3,H,W) floats in 0..1, or none, the default.",
            rich_help_panel=GRAPH,
        ),
    ] = "",
    outputs: Annotated[
        str,
        typer.Option(
            help="What those graphs give: some of logits,probabilities,top5; logits by default.",
            rich_help_panel=GRAPH,
        ),
    ] = "",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Also make these: fp16, int8, or fp16,int8. More to choose: `quantize`.",
            rich_help_panel=PRECISION,
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="Images that calibrate them: a folder, a .npz, or a set's name; --images "
            "by default.",
            rich_help_panel=PRECISION,
        ),
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Make it anew even if nothing changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export a VAN to ONNX with a free batch, checked against PyTorch at every batch size.

    Example: van-deploy export van_b1 --output dist/van_b1
    """
    precisions = precisions_in(precision)
    recipe = recipe_for(model)
    recipe = replace(
        recipe,
        model=_given(
            recipe.model, weights=weights or None, sha256=sha256 or None, labels=labels or None
        ),
        preprocessing=_given(
            recipe.preprocessing,
            image_size=image_size,
            mean=floats("--mean", mean),
            std=floats("--std", std),
            interpolation=interpolation or None,
            crop_pct=crop_pct,
        ),
        export=_given(
            recipe.export,
            opset=opset,
            fold=None if fold else False,
            simplify=None if simplify else False,
            embed_preprocess=embed_preprocess or None,
            outputs=tuple(outputs.split(",")) if outputs else None,
        ),
    )
    if batch:
        from van_deploy.recipe import BatchRange

        recipe = replace(recipe, batch=BatchRange.parse(batch))
    result, loaded = _export(recipe, output, images, offline, seed, container or None, force)
    others = _others(result, precisions, images, calibration, force)
    if others and recipe.export.embeds:
        from van_deploy.pipeline import embed_in_bundle

        with progress() as bar:
            bar.add_task("Embedding preprocessing, and proving it", total=None)
            embedded = embed_in_bundle(result.bundle.path, loaded, recipe, images)
        result = replace(result, embedded=embedded)
    emit(_plain(result, others), as_json, lambda _: _table(result, others))
    if not all(others):
        raise typer.Exit(1)


def recipe_for(model: str) -> Recipe:
    """Return the recipe for what the user named: a recipe, or anything with weights."""
    from van_deploy.recipe import ModelSettings, Recipe, builtin_recipes, recipe_named

    if model.endswith(".toml") or model in builtin_recipes():
        return recipe_named(model)
    return Recipe(model=ModelSettings(weights=model))


def floats(option: str, text: str) -> tuple[float, ...] | None:
    """Return the numbers in ``0.5,0.5,0.5``, or None for an empty text.

    Raises:
        UsageError: they are not numbers.
    """
    from van_deploy.errors import UsageError

    if not text:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} '{text}' is not a list of numbers.",
            f"Write them with commas: {option} 0.485,0.456,0.406.",
        ) from None


def precisions_in(given: list[str] | None) -> tuple[str, ...]:
    """Return the precisions in ``fp16,int8``, which may be repeated.

    Raises:
        UsageError: one is neither.
    """
    from van_deploy.errors import UsageError

    names = names_in(given)
    for name in names:
        if name not in ("fp16", "int8"):
            raise UsageError(
                f"There is no precision '{name}' to add.", "Choose fp16, int8, or fp16,int8."
            )
    return names


def _others(
    result: ExportResult,
    precisions: tuple[str, ...],
    images: Path | None,
    calibration: str,
    force: bool,
) -> list[QuantizeResult]:
    """Make the other precisions of a bundle that was just exported."""
    if not precisions:
        return []
    from van_deploy.cli.quantize import quantized
    from van_deploy.precision.settings import QuantizeSettings

    folder = Path(calibration) if calibration and Path(calibration).exists() else None
    named = "" if folder else calibration
    return [
        quantized(
            result.bundle.path,
            QuantizeSettings(precision=precision),
            folder or (None if named else images),
            named,
            None,
            force,
        )
        for precision in precisions
    ]


def _given(settings: Any, **values: Any) -> Any:
    """Return ``settings`` with the values that were given (None was not)."""
    return replace(settings, **{name: value for name, value in values.items() if value is not None})


def _export(
    recipe: Recipe,
    output: Path | None,
    images: Path | None,
    offline: bool,
    seed: int,
    container: str | None,
    force: bool,
) -> tuple[ExportResult, LoadedVan]:
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        def stage(name: str) -> None:
            bar.update(task, description=name, total=None)

        def downloaded(file: str, here: int, total: int | None) -> None:
            bar.update(task, description=f"Downloading {file}", completed=here, total=total)

        from van_deploy.pipeline import export_bundle, load_for

        stage("Loading weights")
        loaded = load_for(
            recipe,
            offline=offline,
            seed=seed,
            container=container,
            download_progress=downloaded,
        )
        folder = output or Path("dist") / loaded.name
        result = export_bundle(loaded, recipe, folder, images=images, force=force, progress=stage)
    for note in result.notes:
        remark(f"note: {note}")
    return result, loaded


def _plain(result: ExportResult, others: list[QuantizeResult]) -> dict[str, Any]:
    from van_deploy.bundle import Bundle
    from van_deploy.cli.quantize import quantized_json

    return {
        "bundle": str(result.bundle.path),
        "reused": result.reused,
        "reason": result.reason,
        "seconds": dict(result.seconds),
        "embedded": list(result.embedded),
        "precisions": [quantized_json(other) for other in others],
        "manifest": Bundle.open(result.bundle.path).manifest,
    }


def _table(result: ExportResult, others: list[QuantizeResult]) -> RenderableType:
    from rich.text import Text

    from van_deploy.cli.quantize import quantized_table
    from van_deploy.report.bundle_view import (
        agreement_table,
        artefacts_table,
        embedded_table,
        model_facts,
        proofs_table,
    )
    from van_deploy.report.tables import stack

    manifest = result.bundle.manifest
    word = "Reused" if result.reused else "Wrote"
    took = f" in {sum(result.seconds.values()):.1f} s" if result.seconds else ""
    return stack(
        model_facts(manifest),
        proofs_table(manifest.checks),
        agreement_table(manifest.checks["agreement"]),
        artefacts_table(manifest, result.bundle.sizes()),
        embedded_table(result.embedded) if result.embedded else None,
        Text(f"{word} the bundle {result.bundle.path}{took} ({result.reason})."),
        *(quantized_table(other) for other in others),
    )
