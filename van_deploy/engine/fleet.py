"""Many engines: bundles x precisions x targets, from one TOML file.

::

    [fleet]
    bundles = ["dist/van_b0", "dist/van_b1"]    # relative to this file
    precisions = ["fp32", "fp16"]
    targets = ["sm_86", "sm_89", "sm_90"]

    [options]                                   # as on the command line; all optional
    batch = ["1:8:32"]
    workspace = "4GiB"

    [hosts.sm_90]                               # where a target needs its own GPU
    backend = "tensorrt"
    accelerator_type = "H100"                   # Ray's name; the task asks for one GPU

A cell that fails does not stop the others, and a cell whose engine is in its
bundle already, from the same ingredients, is not built again: run the same
command to resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.documents import toml_from
from van_deploy.engine.backend import choose_backend
from van_deploy.engine.build import Progress
from van_deploy.engine.bundled import build_in_bundle, request_for
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.options import (
    BuildOptions,
    HardwareCompatibility,
    Profiling,
    parse_size,
    parse_targets,
)
from van_deploy.engine.sidecar import Sidecar
from van_deploy.errors import RecipeError, UsageError, VanDeployError
from van_deploy.recipe import BatchRange

__all__ = [
    "BUILT",
    "FAILED",
    "REUSED",
    "Cell",
    "Fleet",
    "FleetHost",
    "Outcome",
    "build_here",
    "cells_of",
    "prepared",
    "read_fleet",
]

BUILT, REUSED, FAILED = "built", "reused", "failed"


@dataclass(frozen=True)
class FleetHost:
    """Where a target is built. Table ``[hosts.<target>]``.

    Attributes:
        backend: ``auto``, ``tensorrt`` or ``tensorrt-rtx``.
        accelerator_type: Ray's name of the GPU the build must run on; "" for any machine.
    """

    backend: str = "auto"
    accelerator_type: str = ""


@dataclass(frozen=True)
class Fleet:
    """What a fleet file asks for.

    Attributes:
        bundles: the bundles' folders.
        precisions: ONNX artefacts of each to build from.
        targets: compute capabilities; more than one where a plan serves several.
        options: what is asked of every build; without targets, and without
            profiles if the file gives none.
        has_profiles: whether the file gives profiles; else each bundle's own are used.
        hosts: where targets are built, by target.
    """

    bundles: tuple[Path, ...]
    precisions: tuple[str, ...]
    targets: tuple[tuple[str, ...], ...]
    options: BuildOptions = field(default_factory=BuildOptions)
    has_profiles: bool = False
    hosts: Mapping[str, FleetHost] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One engine of a fleet.

    Attributes:
        bundle: the bundle's folder.
        precision: the ONNX artefact it is built from.
        targets: what the plan serves.
        options: what is asked of the build, targets included.
        host: where it is built.
        own_profiles: whether the bundle's own batch range is to be used.
    """

    bundle: Path
    precision: str
    targets: tuple[str, ...]
    options: BuildOptions
    host: FleetHost
    own_profiles: bool

    @property
    def target(self) -> str:
        """The targets as people write them."""
        return "+".join(self.targets)


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        cell: which one.
        outcome: ``built``, ``reused`` or ``failed``.
        engine: the engine's name; "" if it failed before it had one.
        sidecar: what is known about the engine; None if it failed.
        error: why it failed; None otherwise.
        where: the machine it was built on, as Ray names it; "" for this one.
    """

    cell: Cell
    outcome: str
    engine: str = ""
    sidecar: Sidecar | None = None
    error: VanDeployError | None = None
    where: str = ""


def read_fleet(path: Path) -> Fleet:
    """Return what a fleet file asks for.

    Raises:
        RecipeError: it cannot be read, or a key or value in it is wrong.
    """
    try:
        document = toml_from(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"The fleet file '{path}' cannot be read: {error}.", SHAPE) from error
    try:
        _only(document, "", {"fleet", "options", "hosts"})
        table = _table(document, "fleet")
        _only(table, "fleet.", {"bundles", "precisions", "targets"})
        targets = tuple(
            t for text in _texts(table, "fleet", "targets") for t in parse_targets(text)
        )
        options, has_profiles = _options(_table(document, "options", optional=True))
        return Fleet(
            bundles=tuple(path.parent / place for place in _texts(table, "fleet", "bundles")),
            precisions=_texts(table, "fleet", "precisions"),
            targets=targets,
            options=options,
            has_profiles=has_profiles,
            hosts=_hosts(_table(document, "hosts", optional=True), targets),
        )
    except UsageError as error:
        raise RecipeError(f"'{path}': {error.message}", error.remedy) from error
    except _Wrong as error:
        raise RecipeError(f"'{path}': {error}.", SHAPE) from error


def cells_of(fleet: Fleet) -> tuple[Cell, ...]:
    """Return every engine of a fleet, bundle by bundle."""
    from dataclasses import replace

    return tuple(
        Cell(
            bundle,
            precision,
            targets,
            replace(fleet.options, targets=targets),
            fleet.hosts.get("+".join(targets), FleetHost()),
            not fleet.has_profiles,
        )
        for bundle in fleet.bundles
        for precision in fleet.precisions
        for targets in fleet.targets
    )


def prepared(cell: Cell, bundle: Bundle) -> BuildOptions:
    """Return a cell's options with the bundle's own batch range where the file gives none."""
    from dataclasses import replace

    if not cell.own_profiles:
        return cell.options
    return replace(cell.options, profiles=(bundle.manifest.batch,))


def build_here(
    cells: tuple[Cell, ...],
    *,
    host: Host | None = None,
    force: bool = False,
    progress: Callable[[Cell], Progress | None] | None = None,
) -> Iterator[Outcome]:
    """Build cells one after the other on this machine, and yield each as it ends.

    Args:
        cells: from :func:`cells_of`.
        host: this machine; None looks.
        force: build engines even if they are there.
        progress: asked, for each cell, what to tell about its build.
    """
    host = host or host_here()
    for cell in cells:
        try:
            yield _build_one(cell, host, force, progress(cell) if progress else None)
        except VanDeployError as error:  # noqa: PERF203 - each cell on its own
            yield Outcome(cell, FAILED, error=error)


def _build_one(cell: Cell, host: Host, force: bool, progress: Progress | None) -> Outcome:
    bundle = Bundle.open(cell.bundle)
    options = prepared(cell, bundle)
    backend = choose_backend(cell.host.backend, cell.targets, host.target)
    request = request_for(bundle, cell.precision, backend, options, host)
    built = build_in_bundle(request, backend, options, host=host, force=force, progress=progress)
    return Outcome(cell, REUSED if built.reused else BUILT, built.name, built.sidecar)


SHAPE = "See the example in docs/engines.md."


class _Wrong(Exception):  # noqa: N818 - becomes a RecipeError, with the file's name
    """Something in the file is not what it should be."""


def _only(table: Mapping[str, Any], where: str, known: set[str]) -> None:
    for key in table:
        if key not in known:
            raise _Wrong(f"there is no key '{where}{key}'; known are {', '.join(sorted(known))}")


def _table(document: Mapping[str, Any], name: str, *, optional: bool = False) -> Mapping[str, Any]:
    table = document.get(name, {} if optional else None)
    if not isinstance(table, Mapping):
        raise _Wrong(f"the table [{name}] is missing" if table is None else f"'{name}' is no table")
    return table


def _texts(table: Mapping[str, Any], where: str, key: str) -> tuple[str, ...]:
    value = table.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise _Wrong(f"'{where}.{key}' must be a list of texts with at least one entry")
    return tuple(value)


def _options(table: Mapping[str, Any]) -> tuple[BuildOptions, bool]:
    """Return the options of a file, and whether they hold profiles."""
    _only(table, "options.", {"batch", *_OPTION_READERS})
    read: dict[str, Any] = {}
    for key, (name, reader, kind) in _OPTION_READERS.items():
        if key in table:
            if not isinstance(table[key], kind) or isinstance(table[key], bool) != (kind is bool):
                raise _Wrong(f"'options.{key}' must be of type {kind.__name__}")
            try:
                read[name] = reader(table[key])
            except ValueError as error:
                raise _Wrong(f"'options.{key}': {error}") from error
    if "batch" in table:
        batches = _texts(table, "options", "batch")
        read["profiles"] = tuple(BatchRange.parse(text) for text in batches)
    return BuildOptions(**read), "batch" in table


_OPTION_READERS: Mapping[str, tuple[str, Callable[[Any], Any], type]] = {
    "workspace": ("workspace_bytes", parse_size, str),
    "optimization-level": ("optimization_level", int, int),
    "tf32": ("tf32", bool, bool),
    "profiling": ("profiling", Profiling, str),
    "hardware-compatibility": ("hardware_compatibility", HardwareCompatibility, str),
    "version-compatible": ("version_compatible", bool, bool),
    "strip-weights": ("strip_weights", bool, bool),
    "refit": ("refit", bool, bool),
}


def _hosts(
    table: Mapping[str, Any], targets: tuple[tuple[str, ...], ...]
) -> Mapping[str, FleetHost]:
    known = {"+".join(plan) for plan in targets}
    hosts = {}
    for name in table:
        if name not in known:
            raise _Wrong(f"[hosts.{name}] is for no target; targets are {', '.join(sorted(known))}")
        entry = _table(table, name)
        _only(entry, f"hosts.{name}.", {"backend", "accelerator_type"})
        if not all(isinstance(value, str) for value in entry.values()):
            raise _Wrong(f"the values of [hosts.{name}] must be texts")
        hosts[name] = FleetHost(**entry)
    return hosts
