"""``van-deploy quantize``: a bundle's network in FP16 or INT8, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, progress, remark

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.precision.settings import QuantizeSettings
    from van_deploy.precision.stage import QuantizeResult

__all__ = ["quantize", "quantized", "quantized_json", "quantized_table"]

IMAGES = "Images"
NUMBERS = "INT8"
TYPES = "FP16"


def quantize(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `van-deploy export` made.")],
    precision: Annotated[str, typer.Option("--precision", "-p", help="fp16 or int8.")] = "int8",
    target: Annotated[
        str, typer.Option(help="tensorrt, or cpu: the fast INT8 graphs differ.")
    ] = "tensorrt",
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder or .npz of training images to calibrate on.", rich_help_panel=IMAGES
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="A calibration set: a name (digits, imagenet-512) or a .toml.",
            rich_help_panel=IMAGES,
        ),
    ] = "",
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            help="Folder of images to judge on; labels are its sub-folders. By default a "
            "held-out part of the calibration images.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--calibrate-on-noise",
            help="Calibrate on noise, which fits no real picture.",
            rich_help_panel=IMAGES,
        ),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="minmax, average, percentile, mse, entropy, or auto: the best on held-out images.",
            rich_help_panel=NUMBERS,
        ),
    ] = "mse",
    percentile: Annotated[
        float, typer.Option(help="For --method percentile.", rich_help_panel=NUMBERS)
    ] = 99.999,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="pointwise, deep, all, or a regular expression over module names; repeatable. "
            "pointwise for TensorRT, deep (all but stem and stage 1) for a CPU by default.",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    rest: Annotated[
        str,
        typer.Option(
            help="What is not INT8: fp16 or fp32. fp16 for TensorRT, fp32 for a CPU by default.",
            rich_help_panel=NUMBERS,
        ),
    ] = "",
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize/--no-equalize",
            help="Exact re-scalings before the ranges are recorded.",
            rich_help_panel=NUMBERS,
        ),
    ] = True,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine/--no-refine",
            help="Correct biases, scales and rounding against FP32's own answers.",
            rich_help_panel=NUMBERS,
        ),
    ] = True,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Points of top-1 (of agreement without labels) that may be lost; the layers "
            "that cost more stay in higher precision.",
            rich_help_panel=NUMBERS,
        ),
    ] = None,
    evaluations: Annotated[
        int, typer.Option(help="Most plans --max-drop may try.", rich_help_panel=NUMBERS)
    ] = 16,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Module that stays FP32, besides the LayerNorms and the head; repeatable.",
            rich_help_panel=TYPES,
        ),
    ] = None,
    keep_defaults: Annotated[
        bool,
        typer.Option(
            "--keep-defaults/--no-keep-defaults",
            help="Keep the LayerNorms, the pooling and the head in FP32.",
            rich_help_panel=TYPES,
        ),
    ] = True,
    half_io: Annotated[
        bool, typer.Option("--half-io", help="FP16 input and output.", rich_help_panel=TYPES)
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse where FP16 cannot hold a tensor, instead of keeping it FP32.",
            rich_help_panel=TYPES,
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of ONNX Runtime.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Make it anew even if nothing changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add an FP16 or INT8 graph to a bundle, judged beside FP32.

    Ends with exit code 1 if the result does not hold its gate.

    Example: van-deploy quantize dist/van_b1 --images train/ --eval val/
    """
    from van_deploy.precision.equalize import EqualizeSettings
    from van_deploy.precision.refine_settings import RefineSettings
    from van_deploy.precision.settings import QuantizeSettings

    settings = QuantizeSettings(
        precision=precision,
        target=target,
        method=method,
        percentile=percentile / 100,
        scope=tuple(scope or ()),
        rest=rest,
        keep=tuple(keep or ()),
        keep_defaults=keep_defaults,
        half_io=half_io,
        strict=strict,
        noise=noise,
        equalize=EqualizeSettings() if equalize else None,
        refine=RefineSettings() if refine else None,
        max_drop=max_drop,
        evaluations=evaluations,
        threads=threads,
    )
    result = quantized(bundle, settings, images, calibration, evaluate, force)
    emit(quantized_json(result), as_json, lambda _: quantized_table(result))
    if not result:
        raise typer.Exit(1)


def quantized(
    bundle: Path,
    settings: QuantizeSettings,
    images: Path | None,
    calibration: str,
    evaluate: Path | None,
    force: bool,
) -> QuantizeResult:
    """Return the result of one quantisation, with its stages shown on stderr."""
    from van_deploy.precision.stage import quantize_bundle

    with progress() as bar:
        task = bar.add_task("Opening the bundle", total=None)
        result = quantize_bundle(
            bundle,
            settings,
            images=images,
            calibration=calibration or None,
            evaluate=evaluate,
            force=force,
            progress=lambda stage: bar.update(task, description=stage),
        )
    word = "reused" if result.reused else "made anew"
    remark(f"{result.artefact}: {word}: {result.reason}")
    return result


def quantized_json(result: QuantizeResult) -> dict[str, Any]:
    """Return a quantisation as ``--json`` prints it."""
    from van_deploy.metrics import wilson_interval

    rows = []
    for row in result.facts["comparison"]:
        interval = None
        if row["correct"] is not None:
            interval = wilson_interval(row["correct"], row["images"])
        rows.append({**row, "top1_interval": interval})
    return {
        "bundle": str(result.bundle.path),
        "artefact": result.artefact,
        "reused": result.reused,
        "reason": result.reason,
        "passed": result.passed,
        "seconds": dict(result.seconds),
        "graph": result.bundle.artefact(result.artefact).graph,
        **result.facts,
        "comparison": rows,
    }


def quantized_table(result: QuantizeResult) -> RenderableType:
    """Return a quantisation as a person reads it."""
    from rich.text import Text

    from van_deploy.report.precision_view import precision_view
    from van_deploy.report.tables import stack

    file = result.bundle.path / result.bundle.artefact(result.artefact).file
    took = f" in {sum(result.seconds.values()):.1f} s" if result.seconds else ""
    word = "Reused" if result.reused else "Wrote"
    return stack(precision_view(result.facts), Text(f"{word} {file}{took}."))
