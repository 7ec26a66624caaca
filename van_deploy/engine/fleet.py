"""Build the engines of bundles from their ONNX files, and add them to the bundles.

The engines are those of one bundle, or of bundles x precisions x targets in a TOML file:

::

    [fleet]
    bundles = ["dist/van_b0", "dist/van_b1"]    # relative to this file
    precisions = ["fp32", "fp16"]
    targets = ["sm_86", "sm_89", "sm_90"]

    [options]                                   # build options, as in a recipe's [engines]
    batch = ["1:8:32"]
    workspace = "4GiB"

    [hosts.sm_90]                               # for a target that needs its own GPU
    backend = "tensorrt"
    accelerator_type = "H100"                   # Ray's name; the task requests one GPU

A cell is one combination. A cell that fails does not stop the others, and an engine that is
already in its bundle with the same inputs is not built again: run the same command to resume.
On a Ray cluster each cell is a task on a machine with the right GPU. The task receives the ONNX
file and returns the plan, sidecar and log; the machine that runs the command writes the bundles,
so no shared file system is needed. Each machine needs this package, and TensorRT for its GPU.
"""

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
from van_deploy.engine.backend import Host, choose_backend, detect_host
from van_deploy.engine.build import engine_from_onnx, engine_name
from van_deploy.engine.compatibility import require_supported
from van_deploy.engine.sidecar import PackageSidecar, Sidecar, SidecarT, log_path, sidecar_path
from van_deploy.engine.worker import TEMPORARY_PREFIX
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
from van_deploy.provenance import code_digest
from van_deploy.ray_tasks import RayTask, require_ray, run_on_ray
from van_deploy.schema import read_toml_document, validate
from van_deploy.stopwatch import Progress, no_progress

BUILT, REUSED, FAILED = "built", "reused", "failed"
ENGINES = "engines"


class FleetHost(Table):
    """The machine that builds a target. Table ``[hosts.<target>]``.

    Attributes:
        backend: The backend to build with.
        accelerator_type: Ray's name of the GPU the build must run on; any machine by default.
    """

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = option("auto")
    accelerator_type: str = option("")


class _Cells(Table):
    """The engines to build. Table ``[fleet]``.

    Attributes:
        bundles: Bundle folders, relative to this file.
        precisions: ONNX artifacts of each bundle.
        targets: Compute capabilities of each plan.
    """

    bundles: tuple[Path, ...] = option(..., min_length=1)
    precisions: tuple[str, ...] = option(..., min_length=1)
    targets: tuple[Target, ...] = option(..., min_length=1)


class FleetFile(Table):
    """A fleet file: the engines of several bundles, precisions and targets.

    Attributes:
        fleet: The engines to build.
        options: Build options, as on the command line.
        hosts: Targets that need their own GPU.
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
        bundle: folder of the bundle.
        precision: the ONNX artifact to build from.
        targets: compute capabilities of the plan.
        options: build options, targets included.
        host: the machine that builds it.
    """

    bundle: Path
    precision: str
    targets: tuple[str, ...]
    options: BuildOptions
    host: FleetHost

    @property
    def resources(self) -> dict[str, Any]:
        """Resources of its Ray task.

        With an accelerator type, one GPU of that type, so that no other build disturbs the timing
        of kernels; otherwise two cores of any machine.
        """
        if self.host.accelerator_type:
            return {"num_gpus": 1, "accelerator_type": self.host.accelerator_type}
        return {"num_cpus": 2}


@dataclass(frozen=True)
class BuildOutcome:
    """Result of one cell.

    Attributes:
        cell: the cell.
        outcome: ``built``, ``reused`` or ``failed``.
        engine: name of the engine; "" if the cell failed.
        sidecar: of the engine; None if the cell failed, and for a package.
        package: sidecar of an Inductor package; None otherwise.
        error: why the cell failed; None otherwise.
        replaced: options of the engine of the same name that it replaced, where they differed,
            such as ``profiles 1:8:32``; "" otherwise.
    """

    cell: Cell
    outcome: str
    engine: str = ""
    sidecar: Sidecar | None = None
    package: PackageSidecar | None = None
    error: VanDeployError | None = None
    replaced: str = ""


def read_fleet(path: Path) -> tuple[Cell, ...]:
    """Return every cell of a fleet file, grouped by bundle.

    Raises:
        RecipeError: the file cannot be read, or has an invalid key or value.
    """
    file = read_toml_document(FleetFile, path, "fleet file", RecipeError)
    cells = []
    for folder in (path.parent / bundle for bundle in file.fleet.bundles):
        defaults: tuple[Any, ...] = ()
        with contextlib.suppress(BundleError):  # each cell of the bundle fails when it is built
            manifest = Bundle.open(folder).manifest
            defaults = manifest.batch, manifest.sizes
        cells += [
            Cell(
                folder,
                precision,
                targets,
                file.options.of(targets, *defaults),
                file.hosts.get("+".join(targets), FleetHost()),
            )
            for precision in file.fleet.precisions
            for targets in file.fleet.targets
        ]
    return tuple(cells)


def engine_cells(
    bundle: Path,
    settings: EngineSettings,
    batch: BatchRange | None,
    sizes: SizeRange | None = None,
    host: Host | None = None,
) -> list[Cell]:
    """Return the cells of one bundle: each requested precision for each target.

    Args:
        bundle: folder of the bundle, which may not exist yet.
        settings: the requested engines.
        batch: batch range if ``settings`` has none.
        sizes: of graphs with dynamic height and width, if ``settings`` has none.
        host: this machine; None detects it.

    Raises:
        UsageError: no backend supports the settings.
        MissingDependency: the backend is not installed, or needs a GPU.
    """
    host = host or detect_host()
    builds = []
    for targets in settings.targets or ((),):
        backend = choose_backend(settings.backend, targets, host.target)
        served = targets or ((host.target,) if host.target else ())
        options = settings.of(served if backend.cross_compiles else targets, batch, sizes)
        require_supported(backend, options, host, settings.timing_cache)
        builds.append((served, options))
    fleet_host = validate(FleetHost, {"backend": settings.backend})
    return [
        Cell(bundle, precision, served, options, fleet_host)
        for precision in settings.precisions
        for served, options in builds
    ]


def find_pending(
    cell: Cell, host: Host, *, force: bool = False, remote: bool = False
) -> Bundle | BuildOutcome:
    """Return the bundle of a cell if its engine must be built, else the ``reused`` outcome.

    Args:
        cell: the cell.
        host: the machine that builds it.
        force: build the engine even if the bundle already has it.
        remote: another machine builds it. The version of its backend may not be known, and is
            then not compared.

    Raises:
        BundleError: the bundle has no such artifact, or one of its files was changed.
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
    inputs = _build_inputs(source, cell.targets, cell.options)
    if cell.host.backend != "auto":
        inputs["backend"] = cell.host.backend
    if not (remote and cell.host.accelerator_type):
        try:
            backend = choose_backend(cell.host.backend, cell.targets, host.target)
            inputs |= {"backend": backend.name, "backend_version": backend.version}
            inputs["cuda"] = backend.cuda
        except MissingDependency:
            if not remote:
                raise
    sidecar = None if force else find_existing(bundle, inputs, Sidecar.load)
    return bundle if sidecar is None else BuildOutcome(cell, REUSED, sidecar.name, sidecar)


def _build_inputs(
    source: Artifact, targets: Sequence[str], options: BuildOptions
) -> dict[str, Any]:
    """Return the inputs that determine the content of a plan, except the backend."""
    return {
        "onnx": source.onnx_files,
        "targets": targets,
        "options": options.as_dict(),
        "code": code_digest("engine"),
    }


def find_existing(
    bundle: Bundle, inputs: Mapping[str, Any], load: Callable[[Path], SidecarT]
) -> SidecarT | None:
    """Return the sidecar of the unchanged artifact that was built from ``inputs``, or None."""
    for artifact in bundle.artifacts.values():
        recorded = {name: artifact.made_with.get(name) for name in inputs}
        if content_key(recorded) == content_key(inputs):
            with contextlib.suppress(BundleError, InputError):
                return load(bundle.verified_path(artifact.name))
    return None


def build_cells(
    cells: Sequence[Cell],
    *,
    host: Host | None = None,
    timing_cache: Path | None = None,
    force: bool = False,
    keep_going: bool = False,
    progress: Progress = no_progress,
) -> Iterator[BuildOutcome]:
    """Build engines one after the other on this machine, and yield each outcome.

    Args:
        cells: from :func:`engine_cells` or :func:`read_fleet`.
        host: this machine; None detects it.
        timing_cache: file of kernel timings to read and update.
        force: build engines even if the bundles already have them.
        keep_going: yield a failure as an outcome. Otherwise all ONNX files are checked before the
            first build, and the first failure is raised.
        progress: called with TensorRT's build phases.

    Raises:
        VanDeployError: as :func:`find_pending` and
            :func:`~van_deploy.engine.build.engine_from_onnx`; the bundle is not changed.
    """
    host = host or detect_host()
    for cell in () if keep_going else cells:
        find_pending(cell, host, force=True)
    for cell in cells:
        try:
            outcome = find_pending(cell, host, force=force)
            if isinstance(outcome, Bundle):
                bundle = outcome
                onnx = bundle.path / bundle.artifact(cell.precision).file
                with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as name:
                    folder = Path(name)
                    plan = _build_plan(cell, bundle, onnx, folder, host, timing_cache, progress)
                    outcome = _add_plan(cell, bundle, plan)
        except VanDeployError as error:
            if not keep_going:
                raise
            outcome = BuildOutcome(cell, FAILED, error=error)
        yield outcome


def build_on_ray(
    cells: Sequence[Cell], *, address: str | None = None, force: bool = False
) -> Iterator[BuildOutcome]:
    """Build cells as Ray tasks, and yield each outcome, failures included.

    Args:
        cells: from :func:`read_fleet`.
        address: of the cluster; None joins the cluster of this machine, or starts one on this
            machine alone. A connection that exists is used.
        force: build engines even if the bundles already have them.

    Raises:
        MissingDependency: Ray is not installed, or the cluster does not respond.
    """
    require_ray()
    tasks = []
    for cell in cells:
        try:
            bundle = find_pending(cell, Host(), force=force, remote=True)
        except VanDeployError as error:
            bundle = BuildOutcome(cell, FAILED, error=error)
        if isinstance(bundle, BuildOutcome):
            yield bundle
            continue
        paths = [bundle.path / file for file in bundle.artifact(cell.precision).onnx_files]
        files = {path.name: path.read_bytes() for path in paths}
        tasks.append(RayTask((cell, bundle), (cell, bundle, files), cell.resources))
    for done in run_on_ray(_build_remotely, tasks, address=address):
        (cell, bundle), result = done.tag, done.result
        if done.failure:
            message = f"The Ray task ended without an engine: {done.failure}"
            result = ConversionError(message, "Run it again.")
        try:
            if isinstance(result, VanDeployError):
                raise result
            with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
                _write_files(result, Path(folder))
                yield _add_plan(cell, bundle, next(Path(folder).glob("*.plan")))
        except VanDeployError as error:
            yield BuildOutcome(cell, FAILED, error=error)


def _build_remotely(
    shared: None, cell: Cell, bundle: Bundle, files: Mapping[str, bytes]
) -> dict[str, bytes] | VanDeployError:
    """Build a plan on the machine of this task; return plan, sidecar and log by file name."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX) as folder:
        _write_files(files, Path(folder))
        onnx = Path(folder) / Path(bundle.artifact(cell.precision).file).name
        try:
            plan = _build_plan(cell, bundle, onnx, Path(folder) / "output", detect_host())
        except VanDeployError as error:
            return error
        return {path.name: path.read_bytes() for path in plan.parent.iterdir()}


def _write_files(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _build_plan(
    cell: Cell,
    bundle: Bundle,
    onnx: Path,
    folder: Path,
    host: Host,
    timing_cache: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Build the plan of a cell on this machine, ``host``, and return its path."""
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


def _add_plan(cell: Cell, bundle: Bundle, plan: Path) -> BuildOutcome:
    """Add a plan to the bundle of its cell."""
    source, sidecar = bundle.artifact(cell.precision), Sidecar.load(plan)
    inputs = _build_inputs(source, sidecar.targets, sidecar.options)
    inputs |= {"backend": sidecar.backend, "backend_version": sidecar.backend_version}
    inputs["cuda"] = sidecar.cuda
    replaced = add_to_bundle(cell.bundle, source, plan, sidecar, inputs)
    return BuildOutcome(cell, BUILT, sidecar.name, sidecar, replaced=replaced)


def add_to_bundle(
    bundle: Path,
    source: Artifact,
    file: Path,
    sidecar: Sidecar | PackageSidecar,
    inputs: Mapping[str, Any],
) -> str:
    """Copy a plan or a package, with sidecar and log, into a bundle and its manifest.

    Args:
        bundle: folder of the bundle.
        source: the artifact it was built from, as it was when the build began.
        file: path of the plan or the package; sidecar and log are in the same folder.
        sidecar: of the file.
        inputs: all inputs that determine the content of the file.

    Returns:
        The options of the artifact of the same name that it replaces, where they differ.

    Raises:
        BundleError: the ONNX file was replaced during the build.
    """
    paths = (path for path in (file, sidecar_path(file), log_path(file)) if path.exists())
    copies = {f"{ENGINES}/{path.name}": path for path in paths}
    with edit_bundle(bundle) as draft:
        current = draft.artifacts.get(source.name)
        if current is None or current.sha256 != source.sha256:
            raise BundleError(
                f"'{source.name}' of '{bundle}' was replaced while '{sidecar.name}' was being "
                "built from it.",
                "Nothing was written. Build again.",
            )
        before = draft.artifacts.get(sidecar.name)
        for target, path in copies.items():
            shutil.copyfile(path, draft.file(target))
        draft.record(
            Artifact(
                name=sidecar.name,
                kind="package" if isinstance(sidecar, PackageSidecar) else "engine",
                precision=sidecar.precision,
                file=f"{ENGINES}/{file.name}",
                files=dict.fromkeys(copies, ""),  # the draft computes the digests
                made_from=Origin(name=source.name, sha256=source.sha256),
                made_with=dict(inputs),
                engine=EngineInfo(
                    backend=sidecar.backend_label,
                    targets=sidecar.targets,
                    profiles=sidecar.profiles,
                    parser_layers=sidecar.parser_layers,
                ),
            )
        )
    old, new = (_options(made) for made in (before.made_with if before else inputs, inputs))
    return ", ".join(f"{name} {text}" for name, text in old.items() if text != new.get(name))


def _options(made_with: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a plan, or those of a package that are not in its name, as text."""
    options = made_with.get("options")
    if not isinstance(options, Mapping):
        options = {name: made_with.get(name) for name in ("batch", "tf32")}
    return {name: ",".join(v) if isinstance(v, list) else str(v) for name, v in options.items()}
