"""Engines of a bundle: built from its ONNX files, and entered in its manifest."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Artefact, Bundle, Origin, writing
from van_deploy.config import BuildOptions
from van_deploy.engine.backend import Backend, choose_backend
from van_deploy.engine.build import Progress, engine_from_onnx, engine_name, targets_of
from van_deploy.engine.fleet import BUILT, FAILED, REUSED, Cell, Outcome
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.sidecar import (
    PackageSidecar,
    Sidecar,
    Vouching,
    log_path,
    sidecar_path,
    verified_sidecar,
)
from van_deploy.engine.worker import TEMPORARY
from van_deploy.errors import BundleError, InputError, VanDeployError
from van_deploy.files import content_key
from van_deploy.manifest import EngineFacts

ENGINES = "engines"


@dataclass(frozen=True)
class EngineRequest:
    """One engine to be built from a bundle.

    Attributes:
        bundle: as it is.
        source: the ONNX artifact it is built from.
        onnx: that artifact's file, its digests checked.
        backend: what builds it.
        options: what is asked of it.
        host: this machine.
    """

    bundle: Bundle
    source: Artefact
    onnx: Path
    backend: Backend
    options: BuildOptions
    host: Host

    @property
    def name(self) -> str:
        """What the engine will be called."""
        return engine_name(
            self.bundle.name, self.source.name, self.backend, self.options, self.host
        )

    @property
    def key(self) -> str:
        """Digest of everything that decides what is in the plan."""
        targets = targets_of(self.options, self.host)
        backend = self.backend.name, self.backend.version
        return content_key(_ingredients(self.source, *backend, targets, self.options))


def _ingredients(
    source: Artefact, backend: str, version: str, targets: Sequence[str], options: BuildOptions
) -> dict[str, Any]:
    return {
        "onnx": {file: sha for file, sha in source.files.items() if ".onnx" in file},
        "backend": backend,
        "backend_version": version,
        "targets": targets,
        "options": options.as_dict(),
    }


def prepared(cell: Cell, bundle: Bundle) -> BuildOptions:
    """Return a cell's options with the bundle's own batches and sizes where none are given."""
    return cell.options.changed(
        profiles=(bundle.manifest.batch,) if cell.own_profiles else cell.options.profiles,
        dynamic_size=cell.options.dynamic_size or bundle.manifest.sizes,
    )


def request_for(cell: Cell, host: Host) -> EngineRequest:
    """Return what building a cell on ``host`` comes to.

    Raises:
        BundleError: the bundle has no such artifact, or a file of it was changed.
        InputError: the artifact is not an ONNX file.
        MissingDependency: the backend is not installed.
    """
    bundle = Bundle.open(cell.bundle)
    source = bundle.artefact(cell.precision)
    if not source.file.endswith(".onnx"):
        graphs = [name for name, item in bundle.artefacts.items() if item.file.endswith(".onnx")]
        raise InputError(
            f"'{source.name}' of '{bundle.path}' is of kind '{source.kind}'; engines are built "
            "from ONNX files.",
            f"Choose one of: {', '.join(graphs)}.",
        )
    backend = choose_backend(cell.host.backend, cell.targets, host.target)
    onnx, options = bundle.verified(source.name), prepared(cell, bundle)
    return EngineRequest(bundle, source, onnx, backend, options, host)


def existing_engine(request: EngineRequest) -> Sidecar | None:
    """Return the sidecar of the engine asked for if the bundle holds it, unchanged."""
    return existing(request.bundle, request.name, request.key, verified_sidecar)


def existing(
    bundle: Bundle, name: str, key: str, verified: Callable[[Path], Vouching]
) -> Vouching | None:
    """Return the sidecar of what a bundle holds of this name and key, if it is unchanged."""
    artefact = bundle.artefacts.get(name)
    if artefact is not None and artefact.key == key:
        with contextlib.suppress(BundleError, InputError):
            return verified(bundle.verified(name))
    return None


def build_cells(
    cells: Sequence[Cell],
    *,
    host: Host | None = None,
    timing_cache: Path | None = None,
    check_reproducible: bool = False,
    force: bool = False,
    go_on: bool = False,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """Build engines one after the other on this machine, and yield each as it ends.

    Args:
        cells: from :func:`~van_deploy.engine.fleet.planned_engines` or ``read_fleet``.
        host: this machine; None looks.
        timing_cache: a file to learn from and add to.
        check_reproducible: build twice and compare.
        force: build engines even if they are there.
        go_on: after a failure, which is then an outcome. Otherwise every file to build from is
            checked before any work, and the first failure is raised.
        progress: told what TensorRT is doing.

    Raises:
        VanDeployError: as :func:`request_for` and :func:`engine_from_onnx`; the bundle is as it
            was.
    """
    host = host or host_here()

    def built(cell: Cell) -> Outcome:
        request = request_for(cell, host)
        present = None if force else existing_engine(request)
        if present is not None and not (check_reproducible and present.reproducible is None):
            return Outcome(cell, REUSED, request.name, present)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
            plan = Path(folder) / f"{request.name}.plan"
            sidecar = engine_from_onnx(
                request.onnx,
                plan,
                backend=request.backend,
                options=request.options,
                precision=request.source.precision,
                host=host,
                timing_cache=timing_cache,
                check_reproducible=check_reproducible,
                preprocessing=request.bundle.manifest.preprocessing,
                progress=progress,
            )
            enter(cell.bundle, request.source, plan, sidecar)
        return Outcome(cell, BUILT, request.name, sidecar)

    def tried(cell: Cell) -> Outcome:
        try:
            return built(cell)
        except VanDeployError as error:
            return Outcome(cell, FAILED, error=error)

    for cell in () if go_on else cells:
        request_for(cell, host)
    yield from map(tried if go_on else built, cells)


def enter(
    bundle: Path,
    source: Artefact,
    file: Path,
    sidecar: Sidecar | PackageSidecar,
    made_with: dict[str, Any] | None = None,
) -> None:
    """Copy a finished plan or package, and what lies beside it, into a bundle and its manifest.

    Args:
        bundle: which.
        source: what it was built from, as it was when the build began.
        file: the plan or the package, with its sidecar (and log) beside it.
        sidecar: what is known about it.
        made_with: everything that decided what is in it; None for a plan, whose sidecar tells.

    Raises:
        BundleError: the ONNX file was replaced meanwhile.
    """
    if isinstance(sidecar, Sidecar):
        backend = sidecar.backend, sidecar.backend_version
        made_with = _ingredients(source, *backend, sidecar.targets, sidecar.options)
    beside = (path for path in (file, sidecar_path(file), log_path(file)) if path.exists())
    inside = {f"{ENGINES}/{path.name}": path for path in beside}
    with writing(bundle) as draft:
        now = draft.artefacts.get(source.name)
        if now is None or now.sha256 != source.sha256:
            raise BundleError(
                f"'{source.name}' of '{bundle}' was replaced while '{sidecar.name}' was being "
                "built from it.",
                "Nothing was written. Build again.",
            )
        for place, path in inside.items():
            shutil.copyfile(path, draft.file(place))
        draft.record(
            Artefact(
                name=sidecar.name,
                kind="package" if isinstance(sidecar, PackageSidecar) else "engine",
                precision=sidecar.precision,
                file=f"{ENGINES}/{file.name}",
                files=dict.fromkeys(inside, ""),  # digested by the draft
                made_from=Origin(name=source.name, sha256=source.sha256),
                made_with=made_with or {},
                engine=EngineFacts(
                    backend=sidecar.made_by,
                    targets=sidecar.targets,
                    profiles=sidecar.profiles,
                    parser_layers=sidecar.parser_layers,
                ),
            )
        )
