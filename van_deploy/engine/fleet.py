"""Many engines: bundles x precisions x targets, from one TOML file.

::

    [fleet]
    bundles = ["dist/van_b0", "dist/van_b1"]    # relative to this file
    precisions = ["fp32", "fp16"]
    targets = ["sm_86", "sm_89", "sm_90"]

    [options]                                   # keys of a recipe's [engines]; all optional
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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from van_deploy.bundle import Bundle
from van_deploy.config import BuildOptions
from van_deploy.config.engines import PlanSettings
from van_deploy.config.fields import Target, option
from van_deploy.engine.backend import choose_backend
from van_deploy.engine.build import Progress
from van_deploy.engine.bundled import build_in_bundle, request_for
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import PackageSidecar, Sidecar
from van_deploy.errors import RecipeError, VanDeployError
from van_deploy.schema import Contradiction, Settings, read_toml

__all__ = [
    "BUILT",
    "FAILED",
    "REUSED",
    "Cell",
    "FleetFile",
    "FleetHost",
    "Outcome",
    "build_here",
    "prepared",
    "read_fleet",
]

BUILT, REUSED, FAILED = "built", "reused", "failed"


class FleetHost(Settings):
    """Where a target is built. Table ``[hosts.<target>]``."""

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = option("auto", "What builds it.")
    accelerator_type: str = option(
        "", "Ray's name of the GPU the build must run on.", shown_default="any machine"
    )


class _Table(Settings):
    """Which engines. Table ``[fleet]``."""

    bundles: tuple[Path, ...] = option(..., "Folders, relative to this file.", min_length=1)
    precisions: tuple[str, ...] = option(..., "ONNX artefacts of each.", min_length=1)
    targets: tuple[Target, ...] = option(..., "What each plan serves.", min_length=1)


class FleetFile(Settings):
    """Many engines: bundles, precisions and targets; a fleet file."""

    fleet: _Table = option(..., "Which engines.")
    options: PlanSettings = option(PlanSettings, "As on the command line.")
    hosts: dict[str, FleetHost] = option(dict, "Where a target needs its own GPU.")

    @pydantic.model_validator(mode="after")
    def _hosts_are_of_targets(self) -> FleetFile:
        known = {"+".join(plan) for plan in self.fleet.targets}
        for name in self.hosts:
            if name not in known:
                raise Contradiction(
                    f"{{hosts}}.{name} is for no target.", f"Targets: {', '.join(sorted(known))}."
                )
        return self


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
        sidecar: what is known about the engine; None if it failed, and for a package.
        package: what is known about an Inductor package; None for all else.
        error: why it failed; None otherwise.
        where: the machine it was built on, as Ray names it; "" for this one.
    """

    cell: Cell
    outcome: str
    engine: str = ""
    sidecar: Sidecar | None = None
    package: PackageSidecar | None = None
    error: VanDeployError | None = None
    where: str = ""


def read_fleet(path: Path) -> tuple[Cell, ...]:
    """Return every engine that a fleet file asks for, bundle by bundle.

    Raises:
        RecipeError: it cannot be read, or a key or value in it is wrong.
    """
    found = read_toml(FleetFile, path, "fleet file", RecipeError)
    return tuple(
        Cell(
            path.parent / bundle,
            precision,
            targets,
            found.options.of(targets),
            found.hosts.get("+".join(targets), FleetHost()),
            not found.options.profiles,
        )
        for bundle in found.fleet.bundles
        for precision in found.fleet.precisions
        for targets in found.fleet.targets
    )


def prepared(cell: Cell, bundle: Bundle) -> BuildOptions:
    """Return a cell's options with the bundle's own batches and sizes where the file gives none."""
    sizes = cell.options.dynamic_size or bundle.manifest.sizes
    profiles = (bundle.manifest.batch,) if cell.own_profiles else cell.options.profiles
    return cell.options.changed(profiles=profiles, dynamic_size=sizes)


def build_here(
    cells: tuple[Cell, ...],
    *,
    host: Host | None = None,
    force: bool = False,
    progress: Callable[[Cell], Progress | None] | None = None,
) -> Iterator[Outcome]:
    """Build cells one after the other on this machine, and yield each as it ends.

    Args:
        cells: from :func:`read_fleet`.
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
