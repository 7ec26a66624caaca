"""A fleet on a Ray cluster: one task a cell, on a machine with the right GPU.

A task gets the ONNX file's bytes and gives back plan, sidecar and log; the
bundles are written by the machine that started it all, so the machines need no
common file system. They need this package, and TensorRT for their GPU.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import BuildOptions
from van_deploy.engine.backend import choose_backend
from van_deploy.engine.build import engine_from_onnx, engine_name
from van_deploy.engine.bundled import EngineRequest, enter_engine, existing_engine, request_for
from van_deploy.engine.fleet import BUILT, FAILED, REUSED, Cell, Outcome, prepared
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import Sidecar, log_path, sidecar_path, verified_sidecar
from van_deploy.errors import ConversionError, MissingDependency, VanDeployError
from van_deploy.model.preprocess import Preprocessing
from van_deploy.ray_tasks import RayDone, RayTask, require_ray, run_on_ray

__all__ = ["Delivery", "build_on_ray", "task_resources"]


@dataclass(frozen=True)
class Delivery:
    """What a task gives back.

    Attributes:
        where: the host that built it.
        files: plan, sidecar and log by suffix; none where there is no plan.
        sidecar: what is known about the plan; None if there is none.
        error: class name, message and remedy of what went wrong.
    """

    where: str
    files: dict[str, bytes] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    error: tuple[str, str, str] = ("", "The Ray task built nothing.", "")


def task_resources(cell: Cell) -> dict[str, Any]:
    """Return the options of a cell's Ray task.

    A cell with an accelerator type takes one GPU of that type, so that builds that
    time kernels have it to themselves; any other takes two cores anywhere.
    """
    if cell.host.accelerator_type:
        return {"num_gpus": 1, "accelerator_type": cell.host.accelerator_type, "max_retries": 0}
    return {"num_cpus": 2, "max_retries": 0}


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
            outcome, arguments = _prepare(cell, force)
        except VanDeployError as error:
            yield Outcome(cell, FAILED, error=error)
            continue
        if outcome is not None:
            yield outcome
        else:
            tasks.append(RayTask(cell, arguments, task_resources(cell)))
    for done in run_on_ray(_deliver, tasks, address=address):
        yield _finish(done)


def _prepare(cell: Cell, force: bool) -> tuple[Outcome | None, tuple[Any, ...]]:
    """Return the cell's outcome if its engine is there, or else the task's arguments."""
    bundle = Bundle.open(cell.bundle)
    options = prepared(cell, bundle)
    onnx, artefact = bundle.verified(cell.precision), bundle.artefact(cell.precision)
    if len([f for f in artefact.files if ".onnx" in f]) > 1:
        raise ConversionError(
            f"'{onnx}' keeps its weights in a second file; Ray tasks take one file.",
            "Build this one without --on ray.",
        )
    present = None if force else _present(bundle, cell, options)
    if present is not None:
        return Outcome(cell, REUSED, present.name, present), ()
    preprocessing = bundle.manifest.preprocessing
    model = (bundle.name, artefact.precision)
    return None, (onnx.read_bytes(), model, cell, options, preprocessing)


def _present(bundle: Bundle, cell: Cell, options: BuildOptions) -> Sidecar | None:
    """Return the cell's engine if the bundle holds it.

    Where this machine has the back end, its version counts too. Otherwise only
    the file, the options and the targets can be compared.
    """
    if not cell.host.accelerator_type:
        with contextlib.suppress(MissingDependency):
            backend = choose_backend(cell.host.backend, cell.targets, None)
            return existing_engine(request_for(bundle, cell.precision, backend, options, Host()))
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
    model: tuple[str, str],
    cell: Cell,
    options: BuildOptions,
    preprocessing: Preprocessing,
) -> Delivery:
    """Build one engine on the machine this task runs on; ``model`` is its name and precision."""
    import platform

    host, where = host_here(), platform.node()
    try:
        backend = choose_backend(cell.host.backend, cell.targets, host.target)
        name = engine_name(model[0], cell.precision, backend, options, host)
        with tempfile.TemporaryDirectory(prefix="van-deploy-engine-") as folder:
            source = Path(folder) / f"{model[0]}.{cell.precision}.onnx"
            source.write_bytes(onnx)
            plan = Path(folder) / f"{name}.plan"
            sidecar = engine_from_onnx(
                source,
                plan,
                backend=backend,
                options=options,
                precision=model[1],
                host=host,
                preprocessing=preprocessing,
            )
            files = {path.suffix: path.read_bytes() for path in _three(plan)}
        return Delivery(where, files, sidecar)
    except VanDeployError as error:
        told = (type(error).__name__, error.message, error.remedy)
        return Delivery(where, error=told)


def _finish(done: RayDone) -> Outcome:
    """Put what a task delivered into the cell's bundle."""
    from van_deploy import errors

    cell: Cell = done.tag
    if done.failure:
        failure = ConversionError(
            f"The Ray task ended without an engine: {done.failure}", "Run it again."
        )
        return Outcome(cell, FAILED, error=failure)
    delivery: Delivery = done.result
    sidecar = delivery.sidecar
    if sidecar is None:
        kind, message, remedy = delivery.error
        failed = getattr(errors, kind, ConversionError)(message, remedy)
        return Outcome(cell, FAILED, error=failed, where=delivery.where)
    try:
        _enter(cell, delivery, sidecar)
    except VanDeployError as error:
        return Outcome(cell, FAILED, sidecar.name, error=error, where=delivery.where)
    return Outcome(cell, BUILT, sidecar.name, sidecar, where=delivery.where)


def _enter(cell: Cell, delivery: Delivery, sidecar: Sidecar) -> None:
    bundle = Bundle.open(cell.bundle)
    artefact = bundle.artefact(cell.precision)
    request = EngineRequest(
        bundle=bundle.path,
        name=sidecar.name,
        source=cell.precision,
        precision=artefact.precision,
        onnx=bundle.path / artefact.file,
        onnx_sha256=sidecar.onnx_sha256,
        ingredients={
            "onnx": {file: sha for file, sha in artefact.files.items() if ".onnx" in file},
            "backend": sidecar.backend,
            "backend_version": sidecar.backend_version,
            "targets": sidecar.targets,
            "options": sidecar.options.as_dict(),
        },
        preprocessing=sidecar.preprocessing,
    )
    with tempfile.TemporaryDirectory(prefix="van-deploy-engine-") as folder:
        plan = Path(folder) / f"{sidecar.name}.plan"
        for path in _three(plan):
            path.write_bytes(delivery.files[path.suffix])
        enter_engine(request, plan, sidecar)


def _three(plan: Path) -> tuple[Path, Path, Path]:
    return plan, sidecar_path(plan), log_path(plan)
