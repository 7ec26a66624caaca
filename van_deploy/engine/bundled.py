"""Engines of bundles: which are asked for, and each built from the ONNX file and entered.

They are asked of one bundle, or of bundles x precisions x targets by a TOML file:

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
command to resume. On a Ray cluster each cell is a task on a machine with the right GPU. It gets
the ONNX file and gives back plan, sidecar and log; the bundles are written by the machine that
started it all, so the machines need no common file system. They need this package, and TensorRT
for their GPU.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from van_deploy.bundle import Artifact, Bundle, Origin, edit_bundle
from van_deploy.config import BatchRange, BuildOptions, EngineSettings
from van_deploy.config.fields import Table, Target, option
from van_deploy.config.recipe_tables import PlanSettings
from van_deploy.config.sizes import SizeRange
from van_deploy.engine.backend import Host, choose_backend, host_here
from van_deploy.engine.build import engine_from_onnx, engine_name
from van_deploy.engine.compatibility import refuse_impossible
from van_deploy.engine.sidecar import (
    PackageSidecar,
    Sidecar,
    Vouching,
    log_path,
    sidecar_path,
    verified_sidecar,
)
from van_deploy.engine.worker import TEMPORARY
from van_deploy.errors import (
    BundleError,
    ConversionError,
    InputError,
    MissingDependency,
    RecipeError,
    VanDeployError,
)
from van_deploy.files import content_key
from van_deploy.manifest import EngineInfo
from van_deploy.ray_tasks import RayTask, require_ray, run_on_ray
from van_deploy.schema import read_toml_document, validate
from van_deploy.stopwatch import Progress, no_progress

BUILT, REUSED, FAILED = "built", "reused", "failed"
ENGINES = "engines"


class FleetHost(Table):
    """Where a target is built. Table ``[hosts.<target>]``.

    Attributes:
        backend: What builds it.
        accelerator_type: Ray's name of the GPU the build must run on; any machine by default.
    """

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = option("auto")
    accelerator_type: str = option("")


class _Cells(Table):
    """Which engines. Table ``[fleet]``.

    Attributes:
        bundles: Folders, relative to this file.
        precisions: ONNX artifacts of each.
        targets: What each plan serves.
    """

    bundles: tuple[Path, ...] = option(..., min_length=1)
    precisions: tuple[str, ...] = option(..., min_length=1)
    targets: tuple[Target, ...] = option(..., min_length=1)


class FleetFile(Table):
    """Many engines: bundles, precisions and targets; a fleet file.

    Attributes:
        fleet: Which engines.
        options: As on the command line.
        hosts: Where a target needs its own GPU.
    """

    fleet: _Cells = option(...)
    options: PlanSettings = option(PlanSettings)
    hosts: dict[str, FleetHost] = option(dict)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield hosts of targets that are not built."""
        known = {"+".join(plan) for plan in self.fleet.targets}
        for name in sorted(set(self.hosts) - known):
            yield f"{{hosts}}.{name} is for no target.", f"Targets: {', '.join(sorted(known))}."


@dataclass(frozen=True)
class Cell:
    """One engine to build.

    Attributes:
        bundle: the bundle's folder.
        precision: the ONNX artifact it is built from.
        targets: what the plan serves.
        options: what is asked of the build, targets included.
        host: where it is built.
    """

    bundle: Path
    precision: str
    targets: tuple[str, ...]
    options: BuildOptions
    host: FleetHost

    @property
    def target(self) -> str:
        """The targets as people write them."""
        return "+".join(self.targets)

    @property
    def resources(self) -> dict[str, Any]:
        """What its Ray task asks for.

        With an accelerator type one GPU of that type, so that builds that time kernels have it
        to themselves; two cores anywhere without.
        """
        if self.host.accelerator_type:
            return {"num_gpus": 1, "accelerator_type": self.host.accelerator_type}
        return {"num_cpus": 2}


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
    """

    cell: Cell
    outcome: str
    engine: str = ""
    sidecar: Sidecar | None = None
    package: PackageSidecar | None = None
    error: VanDeployError | None = None


def read_fleet(path: Path) -> tuple[Cell, ...]:
    """Return every engine that a fleet file asks for, bundle by bundle.

    Raises:
        RecipeError: it cannot be read, or a key or value in it is wrong.
    """
    found = read_toml_document(FleetFile, path, "fleet file", RecipeError)
    cells = []
    for folder in (path.parent / bundle for bundle in found.fleet.bundles):
        served: tuple[Any, ...] = ()
        with contextlib.suppress(BundleError):  # of each of its cells, when it is built
            manifest = Bundle.open(folder).manifest
            served = manifest.batch, manifest.sizes
        cells += [
            Cell(
                folder,
                precision,
                targets,
                found.options.of(targets, *served),
                found.hosts.get("+".join(targets), FleetHost()),
            )
            for precision in found.fleet.precisions
            for targets in found.fleet.targets
        ]
    return tuple(cells)


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
    host = host or host_here()
    asked = []
    for targets in settings.targets or ((),):
        backend = choose_backend(settings.backend, targets, host.target)
        served = targets or ((host.target,) if host.target else ())
        options = settings.of(served if backend.builds_for_absent_gpus else targets, batch, sizes)
        refuse_impossible(backend, options, host, settings.timing_cache)
        asked.append((served, options))
    where = validate(FleetHost, {"backend": settings.backend})
    return [
        Cell(bundle, precision, served, options, where)
        for precision in settings.precisions
        for served, options in asked
    ]


def to_be_built(
    cell: Cell, host: Host, *, force: bool = False, elsewhere: bool = False
) -> Bundle | Outcome:
    """Return the bundle of a cell, or what became of the cell if the bundle holds its engine.

    Args:
        cell: which one.
        host: what builds it.
        force: build it even if it is there.
        elsewhere: it is built on another machine. Where the version of the backend there is not
            known, only the file, the options and the targets are compared.

    Raises:
        BundleError: the bundle has no such artifact, or a file of it was changed.
        InputError: the artifact is not an ONNX file.
        MissingDependency: the backend is not installed.
    """
    bundle = Bundle.open(cell.bundle)
    source = bundle.artifact(cell.precision)
    if not source.file.endswith(".onnx"):
        graphs = [name for name, item in bundle.artifacts.items() if item.file.endswith(".onnx")]
        raise InputError(
            f"'{source.name}' of '{bundle.path}' is of kind '{source.kind}'; engines are built "
            "from ONNX files.",
            f"Choose one of: {', '.join(graphs)}.",
        )
    bundle.verified_path(source.name)
    asked = _ingredients(source, cell.targets, cell.options)
    if not (elsewhere and cell.host.accelerator_type):
        try:
            backend = choose_backend(cell.host.backend, cell.targets, host.target)
            asked |= {"backend": backend.name, "backend_version": backend.version}
        except MissingDependency:
            if not elsewhere:
                raise
    present = None if force else existing(bundle, asked, verified_sidecar)
    return bundle if present is None else Outcome(cell, REUSED, present.name, present)


def _ingredients(source: Artifact, targets: Sequence[str], options: BuildOptions) -> dict[str, Any]:
    """Return what decides what is in a plan, besides the backend."""
    onnx = {file: sha for file, sha in source.files.items() if ".onnx" in file}
    return {"onnx": onnx, "targets": targets, "options": options.as_dict()}


def existing(
    bundle: Bundle, made_with: Mapping[str, Any], verified: Callable[[Path], Vouching]
) -> Vouching | None:
    """Return the sidecar of what a bundle holds that was made with this, if it is unchanged."""
    for artifact in bundle.artifacts.values():
        had = {name: artifact.made_with.get(name) for name in made_with}
        if content_key(had) == content_key(made_with):
            with contextlib.suppress(BundleError, InputError):
                return verified(bundle.verified_path(artifact.name))
    return None


def build_cells(
    cells: Sequence[Cell],
    *,
    host: Host | None = None,
    timing_cache: Path | None = None,
    force: bool = False,
    go_on: bool = False,
    progress: Progress = no_progress,
) -> Iterator[Outcome]:
    """Build engines one after the other on this machine, and yield each as it ends.

    Args:
        cells: from :func:`planned_engines` or :func:`read_fleet`.
        host: this machine; None looks.
        timing_cache: a file to learn from and add to.
        force: build engines even if they are there.
        go_on: after a failure, which is then an outcome. Otherwise every file to build from is
            checked before any work, and the first failure is raised.
        progress: told what TensorRT is doing.

    Raises:
        VanDeployError: as :func:`to_be_built` and
            :func:`~van_deploy.engine.build.engine_from_onnx`; the bundle is as it was.
    """
    host = host or host_here()
    for cell in () if go_on else cells:
        to_be_built(cell, host, force=True)
    for cell in cells:
        try:
            todo = to_be_built(cell, host, force=force)
            if isinstance(todo, Bundle):
                with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
                    onnx = todo.path / todo.artifact(cell.precision).file
                    where = onnx, Path(folder), host
                    todo = _entered(cell, todo, _built(cell, todo, *where, timing_cache, progress))
        except VanDeployError as error:
            if not go_on:
                raise
            todo = Outcome(cell, FAILED, error=error)
        yield todo


def build_on_ray(
    cells: Sequence[Cell], *, address: str | None = None, force: bool = False
) -> Iterator[Outcome]:
    """Build cells as Ray tasks, and yield each as it ends; one that fails is an outcome.

    Args:
        cells: from :func:`read_fleet`.
        address: of the cluster; None joins the one this machine is in, or starts
            one of this machine alone. A cluster joined before is used as it is.
        force: build engines even if they are there.

    Raises:
        MissingDependency: Ray is not installed, or the cluster does not answer.
    """
    require_ray()
    tasks = []
    for cell in cells:
        try:
            todo = to_be_built(cell, Host(), force=force, elsewhere=True)
        except VanDeployError as error:
            todo = Outcome(cell, FAILED, error=error)
        if isinstance(todo, Outcome):
            yield todo
            continue
        paths = [todo.path / file for file in todo.artifact(cell.precision).files]
        files = {path.name: path.read_bytes() for path in paths}
        tasks.append(RayTask((cell, todo), (cell, todo, files), cell.resources))
    for done in run_on_ray(_delivered, tasks, address=address):
        (cell, bundle), delivered = done.tag, done.result
        if done.failure:
            said = f"The Ray task ended without an engine: {done.failure}"
            delivered = ConversionError(said, "Run it again.")
        try:
            if isinstance(delivered, VanDeployError):
                raise delivered
            with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
                _write(delivered, Path(folder))
                yield _entered(cell, bundle, next(Path(folder).glob("*.plan")))
        except VanDeployError as error:
            yield Outcome(cell, FAILED, error=error)


def _delivered(
    shared: None, cell: Cell, bundle: Bundle, files: Mapping[str, bytes]
) -> dict[str, bytes] | VanDeployError:
    """Return plan, sidecar and log by name, built on the machine this task runs on."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        _write(files, Path(folder))
        onnx = Path(folder) / Path(bundle.artifact(cell.precision).file).name
        try:
            plan = _built(cell, bundle, onnx, Path(folder) / "made", host_here())
        except VanDeployError as error:
            return error
        return {path.name: path.read_bytes() for path in plan.parent.iterdir()}


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _built(
    cell: Cell,
    bundle: Bundle,
    onnx: Path,
    folder: Path,
    host: Host,
    timing_cache: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Return the plan of a cell, built on this machine, which is ``host``."""
    source, options = bundle.artifact(cell.precision), cell.options
    backend = choose_backend(cell.host.backend, cell.targets, host.target)
    plan = folder / f"{engine_name(bundle.name, source.name, backend, options, host)}.plan"
    engine_from_onnx(
        onnx,
        plan,
        backend=backend,
        options=options,
        precision=source.precision,
        host=host,
        timing_cache=timing_cache,
        preprocessing=bundle.manifest.preprocessing,
        progress=progress,
    )
    return plan


def _entered(cell: Cell, bundle: Bundle, plan: Path) -> Outcome:
    """Put a finished plan into the cell's bundle."""
    source, found = bundle.artifact(cell.precision), verified_sidecar(plan)
    made_with = _ingredients(source, found.targets, found.options)
    made_with |= {"backend": found.backend, "backend_version": found.backend_version}
    enter(cell.bundle, source, plan, found, made_with)
    return Outcome(cell, BUILT, found.name, found)


def enter(
    bundle: Path,
    source: Artifact,
    file: Path,
    sidecar: Sidecar | PackageSidecar,
    made_with: Mapping[str, Any],
) -> None:
    """Copy a finished plan or package, and what lies beside it, into a bundle and its manifest.

    Args:
        bundle: which.
        source: what it was built from, as it was when the build began.
        file: the plan or the package, with its sidecar (and log) beside it.
        sidecar: what is known about it.
        made_with: everything that decided what is in it.

    Raises:
        BundleError: the ONNX file was replaced meanwhile.
    """
    beside = (path for path in (file, sidecar_path(file), log_path(file)) if path.exists())
    inside = {f"{ENGINES}/{path.name}": path for path in beside}
    with edit_bundle(bundle) as draft:
        now = draft.artifacts.get(source.name)
        if now is None or now.sha256 != source.sha256:
            raise BundleError(
                f"'{source.name}' of '{bundle}' was replaced while '{sidecar.name}' was being "
                "built from it.",
                "Nothing was written. Build again.",
            )
        for place, path in inside.items():
            shutil.copyfile(path, draft.file(place))
        draft.record(
            Artifact(
                name=sidecar.name,
                kind="package" if isinstance(sidecar, PackageSidecar) else "engine",
                precision=sidecar.precision,
                file=f"{ENGINES}/{file.name}",
                files=dict.fromkeys(inside, ""),  # digested by the draft
                made_from=Origin(name=source.name, sha256=source.sha256),
                made_with=dict(made_with),
                engine=EngineInfo(
                    backend=sidecar.made_by,
                    targets=sidecar.targets,
                    profiles=sidecar.profiles,
                    parser_layers=sidecar.parser_layers,
                ),
            )
        )
