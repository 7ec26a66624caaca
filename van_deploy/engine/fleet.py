"""Which engines to build: of one bundle, or bundles x precisions x targets of a TOML file.

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

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from van_deploy.config import BatchRange, BuildOptions, EngineSettings
from van_deploy.config.fields import Target, option
from van_deploy.config.making import PlanSettings
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import choose_backend
from van_deploy.engine.compatibility import refuse_impossible
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import PackageSidecar, Sidecar
from van_deploy.errors import RecipeError, UsageError, VanDeployError
from van_deploy.schema import Contradiction, Settings, read_toml

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
    """One engine to build.

    Attributes:
        bundle: the bundle's folder.
        precision: the ONNX artifact it is built from.
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


def planned_engines(
    bundle: Path,
    settings: EngineSettings,
    batch: BatchRange | None,
    sizes: SizeRange | None = None,
    host: Host | None = None,
) -> list[Cell]:
    """Return the engines asked of one bundle: each precision, for each of the targets.

    Args:
        bundle: which; it need not be there yet.
        settings: what is asked.
        batch: the profile where none is asked for.
        sizes: of graphs with dynamic height and width, where none are asked for.
        host: this machine; None looks.

    Raises:
        UsageError: nothing builds what is asked.
        MissingDependency: what builds it is not installed, or wants a GPU.
    """
    if settings.backend == "inductor":
        raise UsageError(
            "A recipe's engines are TensorRT's.",
            "Build the package with `van-deploy build BUNDLE --backend inductor`.",
        )
    host = host or host_here()
    asked = []
    for targets in settings.targets or ((),):
        backend = choose_backend(settings.backend, targets, host.target)
        served = targets or ((host.target,) if host.target else ())
        options = settings.of(served if backend.builds_for_absent_gpus else targets, batch, sizes)
        refuse_impossible(backend, options, host, settings.timing_cache)
        asked.append((served, options))
    where = FleetHost(backend=settings.backend)
    return [
        Cell(bundle, precision, served, options, where, own_profiles=False)
        for precision in settings.precisions
        for served, options in asked
    ]
