"""A fleet on a Ray cluster: one task a cell, on a machine with the right GPU.

A task gets the ONNX file's bytes and gives back plan, sidecar and log; the
bundles are written by the machine that started it all, so the machines need no
common file system. They need this package, and TensorRT for their GPU.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import BuildOptions
from van_deploy.engine.backend import choose_backend
from van_deploy.engine.build import engine_from_onnx, engine_name
from van_deploy.engine.bundled import enter, existing_engine, prepared, request_for
from van_deploy.engine.fleet import BUILT, FAILED, REUSED, Cell, Outcome
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import Sidecar, verified_sidecar
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError
from van_deploy.model.preprocess import Preprocessing
from van_deploy.ray_tasks import RayDone, RayTask, require_ray, run_on_ray


def task_resources(cell: Cell) -> dict[str, Any]:
    """Return the options of a cell's Ray task.

    A cell with an accelerator type takes one GPU of that type, so that builds that
    time kernels have it to themselves; any other takes two cores anywhere.
    """
    if cell.host.accelerator_type:
        return {"num_gpus": 1, "accelerator_type": cell.host.accelerator_type}
    return {"num_cpus": 2}


def build_on_ray(
    cells: tuple[Cell, ...], *, address: str | None = None, force: bool = False
) -> Iterator[Outcome]:
    """Build cells as Ray tasks, and yield each as it ends.

    Args:
        cells: from :func:`van_deploy.engine.fleet.read_fleet`.
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
            todo = _prepared(cell, force)
        except VanDeployError as error:
            todo = Outcome(cell, FAILED, error=error)
        if isinstance(todo, Outcome):
            yield todo
        else:
            tasks.append(todo)
    yield from map(_finished, run_on_ray(_deliver, tasks, address=address))


def _prepared(cell: Cell, force: bool) -> Outcome | RayTask:
    """Return the cell's outcome if its engine is there, or else the task that builds it."""
    bundle = Bundle.open(cell.bundle)
    options = prepared(cell, bundle)
    onnx, source = bundle.verified(cell.precision), bundle.artefact(cell.precision)
    if len([f for f in source.files if ".onnx" in f]) > 1:
        raise ConversionError(
            f"'{onnx}' keeps its weights in a second file; Ray tasks take one file.",
            "Build this one without --on ray.",
        )
    present = None if force else _present(bundle, cell, options)
    if present is not None:
        return Outcome(cell, REUSED, present.name, present)
    model = (bundle.name, source.precision, bundle.manifest.preprocessing)
    return RayTask((cell, source), (onnx.read_bytes(), model, cell, options), task_resources(cell))


def _present(bundle: Bundle, cell: Cell, options: BuildOptions) -> Sidecar | None:
    """Return the cell's engine if the bundle holds it.

    Where this machine has the backend, its version counts too. Otherwise only
    the file, the options and the targets can be compared.
    """
    if not cell.host.accelerator_type:
        with contextlib.suppress(MissingDependency):
            return existing_engine(request_for(cell, Host()))
    source = bundle.artefact(cell.precision).sha256
    for name, artefact in bundle.artefacts.items():
        made = artefact.made_with
        if (
            artefact.kind == "engine"
            and artefact.made_from.sha256 == source
            and made.get("options") == options.as_dict()
            and tuple(made.get("targets", ())) == cell.targets
        ):
            return verified_sidecar(bundle.verified(name))
    return None


def _deliver(
    shared: None,
    onnx: bytes,
    model: tuple[str, str, Preprocessing],
    cell: Cell,
    options: BuildOptions,
) -> tuple[str, dict[str, bytes] | VanDeployError]:
    """Build one engine on the machine this task runs on.

    Returns:
        The machine's name, and the three files by name or what went wrong. ``model`` is the
        network's name, precision and preprocessing.
    """
    name, precision, preprocessing = model
    host = host_here()
    with tempfile.TemporaryDirectory(prefix="van-deploy-engine-") as folder:
        try:
            backend = choose_backend(cell.host.backend, cell.targets, host.target)
            source = Path(folder) / f"{name}.{cell.precision}.onnx"
            source.write_bytes(onnx)
            made = Path(folder) / "made"
            engine_from_onnx(
                source,
                made / f"{engine_name(name, cell.precision, backend, options, host)}.plan",
                backend=backend,
                options=options,
                precision=precision,
                host=host,
                preprocessing=preprocessing,
            )
        except VanDeployError as error:
            return platform.node(), error
        return platform.node(), {path.name: path.read_bytes() for path in made.iterdir()}


def _finished(done: RayDone) -> Outcome:
    """Put what a task delivered into the cell's bundle."""
    cell, source = done.tag
    if done.failure:
        failure = ConversionError(
            f"The Ray task ended without an engine: {done.failure}", "Run it again."
        )
        return Outcome(cell, FAILED, error=failure)
    where, delivered = done.result
    if isinstance(delivered, VanDeployError):
        return Outcome(cell, FAILED, error=delivered, where=where)
    with tempfile.TemporaryDirectory(prefix="van-deploy-engine-") as folder:
        for name, data in delivered.items():
            (Path(folder) / name).write_bytes(data)
        plan = next(Path(folder).glob("*.plan"))
        try:
            sidecar = verified_sidecar(plan)
            enter(cell.bundle, source, plan, sidecar)
        except VanDeployError as error:
            return Outcome(cell, FAILED, plan.stem, error=error, where=where)
    return Outcome(cell, BUILT, sidecar.name, sidecar, where=where)
