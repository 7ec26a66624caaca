"""Engines of one bundle, with the graphs they are built from made where they are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from van_deploy.bundle import Bundle
from van_deploy.config import BuildSettings, Precision, QuantizeSettings
from van_deploy.engine.bundled import build_cells
from van_deploy.engine.fleet import (
    BUILT,
    REUSED,
    Cell,
    FleetHost,
    Outcome,
    planned_engines,
    read_fleet,
)
from van_deploy.engine.host import device_number, host_here
from van_deploy.engine.inductor import INDUCTOR, build_package, packages_asked
from van_deploy.errors import BundleError, UsageError
from van_deploy.model.embedded import EMBEDDED_NAME
from van_deploy.precision.pipeline import quantize_bundle
from van_deploy.results import BuildReport
from van_deploy.stopwatch import Progress
from van_deploy.tuning import require_timing, tuned, with_scope


def build_bundle(
    bundle: Bundle,
    settings: BuildSettings,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Return the engines asked for, built in the bundle unless they are there already.

    Raises:
        VanDeployError: as :meth:`van_deploy.api.Bundle.build`; nothing that cannot be built is
            found out after the first was.
    """
    if settings.tune:
        return _tuned(bundle, settings, progress)
    if settings.backend == INDUCTOR:
        return BuildReport(tuple(_packages(bundle, settings, force, progress)))
    asked = {
        "--device cpu": settings.device == "cpu",
        "--max-autotune": settings.max_autotune,
        "--fused-kernels": settings.fused_kernels,
    }
    for option in (name for name, given in asked.items() if given):
        raise UsageError(
            f"{option} is Inductor's, and a TensorRT engine is asked for.",
            f"Add --backend inductor, or leave {option} out.",
        )
    host = host_here(device=device_number(settings.device))
    manifest = bundle.manifest
    cells = planned_engines(bundle.path, settings, manifest.batch, manifest.sizes, host)
    for precision in settings.precisions:
        _make_missing(Bundle.open(bundle.path), precision, settings, progress)
    outcomes = build_cells(
        cells,
        host=host,
        timing_cache=settings.timing_cache,
        check_reproducible=settings.check_reproducible,
        force=force,
        progress=progress,
    )
    return BuildReport(tuple(outcomes))


def _tuned(bundle: Bundle, settings: BuildSettings, progress: Progress | None) -> BuildReport:
    """Build the fastest candidate that holds its gate, and say what became of the others."""
    require_timing(settings, host_here(device=device_number(settings.device)))

    def built(where: Bundle, asked: BuildSettings) -> str:
        (outcome,) = build_bundle(where, asked).outcomes
        return outcome.engine

    rows, best = tuned(bundle, settings, built, progress or (lambda _: None))
    with_scope(bundle.path, best)
    report = build_bundle(Bundle.open(bundle.path), best.settings)
    return replace(report, tuned=tuple(rows))


def _packages(
    bundle: Bundle, settings: BuildSettings, force: bool, progress: Progress | None
) -> Iterator[Outcome]:
    """Build Inductor packages, one a precision; all are refused before the first is built."""
    host = host_here(device=device_number(settings.device))
    for one in packages_asked(bundle, settings, host):
        precision = one.precisions[0]
        if progress is not None:
            progress(f"{bundle.name} {precision}: compiling for {one.device}")
        package, reused = build_package(bundle.path, one, host, force=force)
        where = FleetHost()
        cell = Cell(bundle.path, precision, package.targets, one.of(), where, own_profiles=False)
        yield Outcome(cell, REUSED if reused else BUILT, package.name, package=package)


def build_fleet(
    path: Path,
    *,
    on: str = "here",
    address: str = "",
    force: bool = False,
    progress: Progress | None = None,
    each: Callable[[int, int, Outcome], None] | None = None,
) -> BuildReport:
    """Return what became of every engine of a fleet file; one that fails does not stop the others.

    Args:
        path: the file.
        on: ``here``, or ``ray`` for a Ray cluster.
        address: of the cluster; "" for the local one.
        force: build engines even if they are there.
        progress: told what is being built.
        each: told of every engine that is done: which of how many, and how it ended.

    Raises:
        RecipeError: the file is wrong.
        MissingDependency: Ray was asked for and is not here.
    """
    cells = read_fleet(path)
    if on == "ray":
        from van_deploy.engine.on_ray import build_on_ray

        stream = build_on_ray(cells, address=address or None, force=force)
    else:
        stream = build_cells(cells, go_on=True, force=force, progress=progress)
    outcomes = []
    for count, outcome in enumerate(stream, 1):
        if each is not None:
            each(count, len(cells), outcome)
        outcomes.append(outcome)
    return BuildReport(tuple(sorted(outcomes, key=lambda outcome: cells.index(outcome.cell))))


def _make_missing(
    bundle: Bundle, precision: str, settings: BuildSettings, progress: Progress | None
) -> None:
    """Make sure the bundle has an ONNX file of this precision.

    FP16, BF16 and INT8 are made on the way where there are images to make them with: the
    ranges of real activations decide what is in them.

    Raises:
        BundleError: it is missing, and there are no images; the remedy is the command.
    """
    if precision in bundle.artefacts or precision not in {"fp16", "bf16", "int8"}:
        bundle.artefact(precision)
        return
    if settings.images is None and bundle.name != EMBEDDED_NAME:
        try:
            bundle.artefact(precision)
        except BundleError as error:
            raise BundleError(
                error.message,
                f"{error.remedy}\nOr give --images DIR to make it on the way.",
            ) from None
    if progress is not None:
        progress(f"{precision} is not in the bundle yet: making it")
    asked = QuantizeSettings(precision=cast("Precision", precision), images=settings.images)
    quantize_bundle(bundle.path, asked, progress=progress)
