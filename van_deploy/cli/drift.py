"""``van-deploy drift``: where an artefact leaves the network, by the name of the module."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from van_deploy.cli.console import AsJson, emit, progress, remark
from van_deploy.cli.opening import ArtefactNames, BundlePath, RequireSignature, WeightsPath, opened

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.checks.drift import DriftReport

__all__ = ["LevelName", "drift"]


class LevelName(str, enum.Enum):
    """How finely the network is cut."""

    STAGE = "stage"
    BLOCK = "block"
    MODULE = "module"


def drift(
    bundle: BundlePath,
    level: Annotated[LevelName, typer.Option(help="How finely to cut.")] = LevelName.BLOCK,
    top: Annotated[
        int, typer.Option(help="How many parts of each artefact to show; 0 for all, in order.")
    ] = 10,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images. By default sample photographs.")
    ] = None,
    count: Annotated[int, typer.Option(help="How many images.")] = 4,
    artefact: ArtefactNames = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the error each part adds as an SVG file.")
    ] = None,
    weights: WeightsPath = None,
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Show what each stage, block or module of each ONNX artefact adds to the error.

    Example: van-deploy drift dist/van_b1 --level module --top 10
    """
    from van_deploy.errors import UsageError

    if count < 1 or top < 0:
        raise UsageError("--count is 1 or more, --top 0 or more.", "Give such numbers.")
    with progress() as bar:
        task = bar.add_task("Loading PyTorch", total=None)

        from van_deploy.checks.drift import drift_of_bundle
        from van_deploy.checks.record import jsonable, record_check
        from van_deploy.data import check_images

        found, loaded = opened(bundle, weights, require_signature)
        pictures = check_images(loaded.name, loaded.preprocessing, count, images)
        report = drift_of_bundle(
            found,
            loaded,
            pictures.inputs,
            level=level.value,
            described=pictures.description,
            artefacts=artefact,
            progress=lambda text: bar.update(task, description=text),
        )
        kept = record_check(found, "drift", report.as_dict())
    if plot is not None:
        _write_plot(report, plot)
        remark(f"Wrote {plot}.")
    if kept:
        remark(f"note: {kept}")
    emit(jsonable(report.as_dict()), as_json, lambda _: _table(report, top))


def _write_plot(report: DriftReport, path: Path) -> None:
    from van_deploy.files import write_atomic
    from van_deploy.report.drift_plot import drift_svg

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, drift_svg(report))


def _table(report: DriftReport, top: int) -> RenderableType:
    from van_deploy.report.gates_view import drift_tables

    return drift_tables(report, top)
