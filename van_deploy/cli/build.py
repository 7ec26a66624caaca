"""``van-deploy build``: engines from a bundle's ONNX files."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from van_deploy.cli.console import AsJson, emit, names_in, progress, remark
from van_deploy.cli.opening import RequireSignature, open_bundle

if TYPE_CHECKING:
    from rich.console import RenderableType

    from van_deploy.bundle import Bundle
    from van_deploy.engine.build import Progress
    from van_deploy.engine.fleet import Cell, Outcome
    from van_deploy.engine.options import BuildOptions

__all__ = [
    "BackendName",
    "Compatibility",
    "Place",
    "Verbosity",
    "build",
    "fleet_document",
    "fleet_table",
]

KERNELS = "What is in the plan"
MACHINES = "Where it runs"
MANY = "Many engines"


class BackendName(str, enum.Enum):
    """What can build."""

    AUTO = "auto"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Compatibility(str, enum.Enum):
    """Hardware compatibility levels, as TensorRT names them."""

    NONE = "none"
    AMPERE_PLUS = "ampere-plus"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"


class Verbosity(str, enum.Enum):
    """Profiling verbosities, as TensorRT names them."""

    NONE = "none"
    LAYER_NAMES_ONLY = "layer-names-only"
    DETAILED = "detailed"


class Place(str, enum.Enum):
    """Where a fleet is built."""

    HERE = "here"
    RAY = "ray"


def build(
    bundle: Annotated[
        Path | None, typer.Argument(help="The bundle, made by `van-deploy export`.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16, int8 or another ONNX artefact of the bundle, such as fp32-uint8; "
            "several with commas or by repeating. fp32 by default."
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Batch sizes min:opt:max, one profile each; may be repeated. "
            "The bundle's own by default."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="Compute capabilities: sm_86,sm_89 builds two plans, sm_86+sm_89 one for both. "
            "The GPU in this machine by default.",
            rich_help_panel=MACHINES,
        ),
    ] = "",
    backend: Annotated[
        BackendName,
        typer.Option(help="What builds and will run it.", rich_help_panel=MACHINES),
    ] = BackendName.AUTO,
    hardware_compatibility: Annotated[
        Compatibility,
        typer.Option(help="Other GPUs to serve (TensorRT).", rich_help_panel=MACHINES),
    ] = Compatibility.NONE,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible",
            help="Let later versions load it (TensorRT).",
            rich_help_panel=MACHINES,
        ),
    ] = False,
    workspace: Annotated[
        str,
        typer.Option(help="Scratch memory a layer may use, as 4GiB.", rich_help_panel=KERNELS),
    ] = "",
    optimization_level: Annotated[
        int | None,
        typer.Option(help="0 builds fast, 5 searches longest.", rich_help_panel=KERNELS),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option(
            "--tf32/--no-tf32", help="Let FP32 layers compute in TF32.", rich_help_panel=KERNELS
        ),
    ] = True,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Leave the weights out.", rich_help_panel=KERNELS),
    ] = False,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="Let weights be replaced later.", rich_help_panel=KERNELS),
    ] = False,
    profiling: Annotated[
        Verbosity,
        typer.Option(help="What the engine inspector can tell.", rich_help_panel=KERNELS),
    ] = Verbosity.LAYER_NAMES_ONLY,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            help="File of kernel timings to use and add to (TensorRT).", rich_help_panel=KERNELS
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to make a missing fp16 or int8 file with, "
            "as `van-deploy quantize` does."
        ),
    ] = None,
    check_reproducible: Annotated[
        bool,
        typer.Option("--check-reproducible", help="Build twice and compare the bytes."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Build even if the engine is there.")
    ] = False,
    matrix: Annotated[
        Path | None,
        typer.Option(
            help="Build bundles x precisions x targets of this TOML file.", rich_help_panel=MANY
        ),
    ] = None,
    on: Annotated[
        Place, typer.Option(help="Where --matrix builds.", rich_help_panel=MANY)
    ] = Place.HERE,
    ray_address: Annotated[
        str,
        typer.Option(help="Of the Ray cluster; the local one by default.", rich_help_panel=MANY),
    ] = "",
    require_signature: RequireSignature = None,
    as_json: AsJson = False,
) -> None:
    """Build TensorRT engines from a bundle; TensorRT for RTX needs no GPU for it.

    Example: van-deploy build dist/van_b1 --precision fp16 --target sm_89
    """
    from van_deploy.engine.options import (
        BuildOptions,
        HardwareCompatibility,
        Profiling,
        parse_size,
        parse_targets,
    )
    from van_deploy.errors import UsageError
    from van_deploy.recipe import BatchRange

    if matrix is not None:
        if bundle is not None:
            raise UsageError(
                "Both a bundle and --matrix are given.", "Name the bundle in the matrix file."
            )
        if require_signature is not None:
            raise UsageError(
                "--require-signature is for one bundle, and --matrix names several.",
                "Check each of them first with `van-deploy verify-signature`.",
            )
        _build_matrix(matrix, on, ray_address, force, as_json)
        return
    if bundle is None:
        raise UsageError("No bundle is given.", "Name one, or a fleet file with --matrix.")
    if on is not Place.HERE:
        raise UsageError("--on is for --matrix.", "Write a fleet file, and give it with --matrix.")
    if require_signature is not None:
        open_bundle(bundle, require_signature)
    options = BuildOptions(
        profiles=tuple(BatchRange.parse(text) for text in batch or ()) or (BatchRange(),),
        hardware_compatibility=HardwareCompatibility(hardware_compatibility.value),
        version_compatible=version_compatible,
        workspace_bytes=parse_size(workspace) if workspace else None,
        optimization_level=optimization_level,
        tf32=tf32,
        strip_weights=strip_weights,
        refit=refit,
        profiling=Profiling(profiling.value),
    )
    outcomes = tuple(
        _outcomes(
            bundle,
            names_in(precision) or ("fp32",),
            parse_targets(target) if target else ((),),
            options,
            own_profiles=not batch,
            backend=backend.value,
            timing_cache=timing_cache,
            images=images,
            check_reproducible=check_reproducible,
            force=force,
        )
    )
    emit(fleet_document(outcomes), as_json, lambda _: fleet_table(outcomes))
    if require_signature is not None and any(o.outcome == "built" for o in outcomes):
        remark("The bundle has new engines, which its signature does not cover: sign it again.")


def _outcomes(
    path: Path,
    precisions: tuple[str, ...],
    targets: tuple[tuple[str, ...], ...],
    options: BuildOptions,
    *,
    own_profiles: bool,
    backend: str,
    timing_cache: Path | None,
    images: Path | None,
    check_reproducible: bool,
    force: bool,
) -> Iterator[Outcome]:
    """Build every precision for every target; whatever cannot be built is found out first."""
    from dataclasses import replace

    from van_deploy.bundle import Bundle
    from van_deploy.engine.backend import choose_backend
    from van_deploy.engine.bundled import build_in_bundle, request_for
    from van_deploy.engine.fleet import Cell, FleetHost, Outcome, prepared
    from van_deploy.engine.host import host_here
    from van_deploy.engine.refusals import refuse_impossible

    host = host_here()
    for precision in precisions:
        _make_missing(Bundle.open(path), precision, images)
    bundle = Bundle.open(path)
    plans = []
    for precision in precisions:
        for plan_targets in targets:
            chosen = choose_backend(backend, plan_targets, host.target)
            served = plan_targets or ((host.target,) if host.target else ())
            asked = served if chosen.builds_for_absent_gpus else plan_targets
            wanted = replace(options, targets=asked)
            cell = Cell(bundle.path, precision, served, wanted, FleetHost(backend), own_profiles)
            wanted = prepared(cell, bundle)
            refuse_impossible(chosen, wanted, host, timing_cache)
            request = request_for(bundle, precision, chosen, wanted, host)
            plans.append((cell, request, chosen, wanted))
    for cell, request, chosen, wanted in plans:
        with _bars(request.name) as told:
            built = build_in_bundle(
                request,
                chosen,
                wanted,
                host=host,
                timing_cache=timing_cache,
                check_reproducible=check_reproducible,
                force=force,
                progress=told,
            )
        if built.sidecar.warnings:
            remark(_warnings(built.name, built.sidecar.warnings))
        yield Outcome(cell, "reused" if built.reused else "built", built.name, built.sidecar)


def _make_missing(bundle: Bundle, precision: str, images: Path | None) -> None:
    """Make sure the bundle has an ONNX file of this precision.

    FP16 and INT8 are made on the way where there are images to make them with: the
    ranges of real activations decide what is in them.

    Raises:
        BundleError: it is missing, and there are no images; the remedy is the command.
    """
    from van_deploy.errors import BundleError
    from van_deploy.model.embedded import EMBEDDED_NAME

    if precision in bundle.artefacts or precision not in {"fp16", "int8"}:
        bundle.artefact(precision)
        return
    if images is None and bundle.name != EMBEDDED_NAME:
        try:
            bundle.artefact(precision)
        except BundleError as error:
            raise BundleError(
                error.message, f"{error.remedy}\nOr give --images DIR to make it on the way."
            ) from None
    from van_deploy.precision.settings import QuantizeSettings
    from van_deploy.precision.stage import quantize_bundle

    remark(f"{precision} is not in the bundle yet: making it")
    with progress() as bars:
        task = bars.add_task(f"Making {precision}", total=None)
        quantize_bundle(
            bundle.path,
            QuantizeSettings(precision=precision),
            images=images,
            progress=lambda said: bars.update(task, description=str(said)),
        )


def _build_matrix(path: Path, on: Place, address: str, force: bool, as_json: bool) -> None:
    """Build a fleet, print its table, and fail if a cell did."""
    from van_deploy.engine.fleet import build_here, cells_of, read_fleet
    from van_deploy.errors import ConversionError

    cells = cells_of(read_fleet(path))
    outcomes = []
    with contextlib.ExitStack() as stack:
        if on is Place.RAY:
            from van_deploy.engine.on_ray import build_on_ray

            stream = build_on_ray(cells, address=address or None, force=force)
        else:
            tell = stack.enter_context(_cell_bars())
            stream = build_here(cells, force=force, progress=tell)
        for count, outcome in enumerate(stream, 1):
            remark(f"[{count}/{len(cells)}] {_cell_name(outcome.cell)}: {outcome.outcome}")
            outcomes.append(outcome)
    order = {id(cell): index for index, cell in enumerate(cells)}
    outcomes.sort(key=lambda outcome: order.get(id(outcome.cell), 0))
    emit(fleet_document(outcomes), as_json, lambda _: fleet_table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        error = failed[0].error
        raise ConversionError(
            f"{len(failed)} of {len(outcomes)} engines failed.",
            f"Run the same command again to resume. The first failure: {error}",
        )


def fleet_document(outcomes: Any) -> list[dict[str, Any]]:
    """Return the outcomes as JSON shows them."""
    return [
        {
            "bundle": outcome.cell.bundle,
            "precision": outcome.cell.precision,
            "target": outcome.cell.target,
            "outcome": outcome.outcome,
            "engine": outcome.engine,
            "where": outcome.where,
            "error": outcome.error.message if outcome.error else None,
            "remedy": outcome.error.remedy if outcome.error else None,
            "sidecar": outcome.sidecar.as_dict() if outcome.sidecar else None,
        }
        for outcome in outcomes
    ]


def fleet_table(outcomes: Any) -> RenderableType:
    """Return one line an engine, and below it why any failed."""
    from van_deploy.report.tables import Column, bytes_text, notes, rows_table, stack, verdict

    rows = []
    for outcome in outcomes:
        sidecar = outcome.sidecar
        word = {"built": "OK", "reused": "HERE", "failed": "FAIL"}[outcome.outcome]
        rows.append(
            (
                verdict(word),
                outcome.engine or _cell_name(outcome.cell),
                ", ".join(str(p) for p in sidecar.profiles) if sidecar else None,
                bytes_text(sidecar.plan_bytes) if sidecar else None,
                f"{sidecar.build_seconds:.1f}" if sidecar else None,
                bytes_text(sidecar.peak_memory_bytes) if sidecar else None,
                {True: "yes", False: "no"}.get(sidecar.reproducible) if sidecar else None,
            )
        )
    right = [Column(name, "right") for name in ("size", "build s", "memory")]
    table = rows_table(["", "engine", "batch", *right, "same twice"], rows)
    failures = [f"{_cell_name(o.cell)}: {o.error}" for o in outcomes if o.error is not None]
    return stack(table, notes(failures, "FAIL") if failures else None)


def _cell_name(cell: Cell) -> str:
    return f"{cell.bundle.name} {cell.precision} {cell.target}"


def _warnings(name: str, warnings: Any) -> str:
    """Return a line that sums up what TensorRT warned of; the log has the rest."""
    total = sum(warnings.values())
    first = max(warnings, key=lambda text: warnings[text])
    short = first if len(first) <= 160 else first[:157] + "..."
    return f"{name}: {total} warnings; most often: {short} (all of them are in its .log)"


@contextlib.contextmanager
def _bars(name: str) -> Iterator[Progress]:
    """Show TensorRT's phases below each other while they run."""
    from van_deploy.engine.build import BuildProgress

    with progress() as bars:
        tasks: dict[str, Any] = {}
        depth: dict[str, int] = {}

        def told(event: BuildProgress) -> None:
            if event.event == "phase":
                depth[event.name] = depth.get(event.parent or "", 0) + 1
                label = name if event.parent is None else "  " * depth[event.name] + event.name
                tasks[event.name] = bars.add_task(label, total=event.steps)
            elif event.name in tasks:
                if event.event == "step":
                    bars.update(tasks[event.name], completed=event.steps)
                else:
                    bars.remove_task(tasks.pop(event.name))

        yield told


@contextlib.contextmanager
def _cell_bars() -> Iterator[Any]:
    """Give a function that returns, for each cell, what to tell about its build."""
    with contextlib.ExitStack() as stack:

        def tell(cell: Cell) -> Progress:
            stack.close()  # the bars of the cell before
            return stack.enter_context(_bars(_cell_name(cell)))

        yield tell
