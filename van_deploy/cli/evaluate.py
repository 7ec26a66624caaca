"""``van-deploy evaluate``: accuracy on labelled images, PyTorch's and every artefact's."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import AsJson, emit, progress, remark
from van_deploy.cli.opening import (
    ArtefactNames,
    BundlePath,
    RecipeName,
    RequireSignature,
    RunnerName,
    TrustEngine,
    WeightsPath,
    execution_by,
    gates_of,
    opened,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.checks.evaluate_report import EvaluateReport

__all__ = ["Where", "evaluate"]

LABELS = "Labels"
WORK = "How it is done"


class Where(str, enum.Enum):
    """Where an evaluation runs."""

    HERE = "here"
    RAY = "ray"


def evaluate(
    bundle: BundlePath,
    images: Annotated[
        Path, typer.Option(help="Folder of labelled images: one folder a class, or ImageNet's own.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="File with a label for each image: 'file label' or one a line.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    synsets: Annotated[
        Path | None,
        typer.Option(
            help="What the numbers of ImageNet's development kit mean: a WordNet id a line.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    class_order: Annotated[
        str | None,
        typer.Option(
            help="How the classes are numbered where nothing names them: strings (torchvision), "
            "natural (timm), index or names.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    label_files: Annotated[
        bool,
        typer.Option(
            help="Look for a ground-truth file such as val.txt beside the images.",
            rich_help_panel=LABELS,
        ),
    ] = True,
    limit: Annotated[
        int | None, typer.Option(help="At most so many images, evenly spread.")
    ] = None,
    artefact: ArtefactNames = None,
    runner: RunnerName = "ort-cpu",
    trust_engine: TrustEngine = False,
    recipe: RecipeName = "",
    batch: Annotated[int, typer.Option(help="Images a batch.", rich_help_panel=WORK)] = 32,
    workers: Annotated[
        int,
        typer.Option(help="Threads that decode; 0 for one a core.", rich_help_panel=WORK),
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with an evaluation that was interrupted.", rich_help_panel=WORK
        ),
    ] = False,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Where answers are kept until the end; in the bundle by default.",
            rich_help_panel=WORK,
        ),
    ] = None,
    on: Annotated[
        Where, typer.Option(help="This machine, or a Ray cluster.", rich_help_panel=WORK)
    ] = Where.HERE,
    ray_address: Annotated[
        str,
        typer.Option(help="Of the Ray cluster; the local one by default.", rich_help_panel=WORK),
    ] = "",
    weights: WeightsPath = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Measure top-1 and top-5 of PyTorch and every artefact, and what was lost between them.

    Example: van-deploy evaluate dist/van_b1 --images imagenet/val
    """
    from van_deploy.errors import GateFailed, UsageError

    if batch < 1 or workers < 0 or (limit is not None and limit < 1):
        raise UsageError(
            "--batch and --limit are 1 or more, --workers 0 or more.", "Give such numbers."
        )
    gates = gates_of(recipe)
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        from van_deploy.checks.evaluate import Settings, evaluate_bundle
        from van_deploy.checks.record import jsonable, record_check
        from van_deploy.data import labelled_images

        found, loaded = opened(bundle, weights, require_signature)
        labelled = labelled_images(
            images,
            loaded.config.num_classes,
            loaded.class_names,
            labels_file=labels,
            synsets_file=synsets,
            class_order=class_order,
            find_labels=label_files,
        )
        settings = Settings(
            artefacts=tuple(artefact or ()),
            execution=execution_by(runner, trust_engine),
            batch=batch,
            workers=workers,
            resume=resume,
            journal=journal,
            on_ray=on is Where.RAY,
            ray_address=ray_address or None,
            weights=str(weights) if weights else None,
        )
        report = evaluate_bundle(
            found,
            loaded,
            labelled.first(limit) if limit else labelled,
            settings,
            gates=gates,
            progress=lambda done, total: bar.update(
                task, description=f"{done} of {total} images", completed=done, total=total
            ),
        )
        kept = record_check(found, "evaluate", report.as_dict())
    if kept:
        remark(f"note: {kept}")
    emit(jsonable(report.as_dict()), as_json, lambda _: _table(report))
    if not report:
        names = ", ".join(f"'{name}'" for name in report.failed)
        raise GateFailed(
            f"More accuracy was lost than allowed: {names}."
            if report.failed
            else "No artefact could be run on this machine, so nothing was evaluated.",
            "See the rows above; `van-deploy drift` names the module.",
        )


def _table(report: EvaluateReport) -> RenderableType:
    from van_deploy.report.gates_view import evaluate_tables

    return evaluate_tables(report)
