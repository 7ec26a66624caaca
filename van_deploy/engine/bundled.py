"""Engines of a bundle: built from its ONNX files, and entered in its manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from van_deploy.bundle import Artefact, Bundle, Origin, writing
from van_deploy.config import BuildOptions
from van_deploy.engine.backend import Backend
from van_deploy.engine.build import (
    Progress,
    engine_from_onnx,
    engine_name,
    targets_of,
)
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.refusals import refuse_impossible
from van_deploy.engine.sidecar import Sidecar, log_path, sidecar_path, verified_sidecar
from van_deploy.engine.worker import TEMPORARY
from van_deploy.errors import BundleError, InputError
from van_deploy.files import content_key
from van_deploy.manifest import EngineFacts, Precision
from van_deploy.model.preprocess import Preprocessing

__all__ = [
    "ENGINES",
    "Built",
    "EngineRequest",
    "build_in_bundle",
    "enter_engine",
    "enter_files",
    "existing_engine",
    "request_for",
]

ENGINES = "engines"


@dataclass(frozen=True)
class EngineRequest:
    """One engine to be built from a bundle.

    Attributes:
        bundle: the bundle's folder.
        name: what the engine will be called.
        source: name of the ONNX artefact it is built from.
        precision: of that artefact: ``fp32``, ``fp16`` or ``int8``.
        onnx: that artefact's file, its digests checked.
        onnx_sha256: its digest.
        ingredients: everything that decides what is in the plan.
        preprocessing: of the model.
    """

    bundle: Path
    name: str
    source: str
    precision: str
    onnx: Path
    onnx_sha256: str
    ingredients: Mapping[str, Any]
    preprocessing: Preprocessing | None

    @property
    def plan(self) -> Path:
        """Where the plan will be."""
        return self.bundle / self.file

    @property
    def file(self) -> str:
        """The plan's place in the bundle."""
        return f"{ENGINES}/{self.name}.plan"

    @property
    def key(self) -> str:
        """Digest of the ingredients."""
        return content_key(self.ingredients)


@dataclass(frozen=True)
class Built:
    """What became of one request.

    Attributes:
        name: the engine's.
        path: its plan.
        sidecar: what is known about it.
        reused: whether it was there already, from the same ingredients.
    """

    name: str
    path: Path
    sidecar: Sidecar
    reused: bool


def request_for(
    bundle: Bundle, source: str, backend: Backend, options: BuildOptions, host: Host
) -> EngineRequest:
    """Return what building from the artefact ``source`` of ``bundle`` comes to.

    Raises:
        BundleError: the bundle has no such artefact, or a file of it was changed.
        InputError: the artefact is not an ONNX file.
        UsageError: ``backend`` cannot do what ``options`` ask.
    """
    artefact = bundle.artefact(source)
    if not artefact.file.endswith(".onnx"):
        graphs = [name for name, item in bundle.artefacts.items() if item.file.endswith(".onnx")]
        raise InputError(
            f"'{source}' of '{bundle.path}' is of kind '{artefact.kind}'; engines are built "
            "from ONNX files.",
            f"Choose one of: {', '.join(graphs)}.",
        )
    refuse_impossible(backend, options, host)
    ingredients = {
        "onnx": {file: sha for file, sha in artefact.files.items() if ".onnx" in file},
        "backend": backend.name,
        "backend_version": backend.version,
        "targets": targets_of(options, host),
        "options": options.as_dict(),
    }
    return EngineRequest(
        bundle=bundle.path,
        name=engine_name(bundle.name, source, backend, options, host),
        source=source,
        precision=artefact.precision,
        onnx=bundle.verified(source),
        onnx_sha256=artefact.sha256,
        ingredients=ingredients,
        preprocessing=bundle.manifest.preprocessing,
    )


def existing_engine(request: EngineRequest) -> Sidecar | None:
    """Return the sidecar of the engine asked for if the bundle holds it, unchanged."""
    bundle = Bundle.open(request.bundle)
    artefact = bundle.artefacts.get(request.name)
    if artefact is None or artefact.key != request.key:
        return None
    try:
        return verified_sidecar(bundle.verified(request.name))
    except (BundleError, InputError):
        return None


def build_in_bundle(
    request: EngineRequest,
    backend: Backend,
    options: BuildOptions,
    *,
    host: Host | None = None,
    timing_cache: Path | None = None,
    check_reproducible: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Built:
    """Return the engine asked for, built unless the bundle holds it already.

    Args:
        request: from :func:`request_for`, with the same back end and options.
        backend: what builds it.
        options: what is asked of it.
        host: this machine; None looks.
        timing_cache: a file to learn from and add to.
        check_reproducible: build twice and compare.
        force: build it even if it is there.
        progress: told what TensorRT is doing.

    Raises:
        VanDeployError: as :func:`engine_from_onnx`; the bundle is as it was.
    """
    present = None if force else existing_engine(request)
    if present is not None:
        checked = present.reproducible is not None
        if checked or not check_reproducible:
            return Built(request.name, request.plan, present, reused=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        plan = Path(folder) / f"{request.name}.plan"
        sidecar = engine_from_onnx(
            request.onnx,
            plan,
            backend=backend,
            options=options,
            precision=request.precision,
            host=host or host_here(),
            timing_cache=timing_cache,
            check_reproducible=check_reproducible,
            preprocessing=request.preprocessing,
            progress=progress,
        )
        enter_engine(request, plan, sidecar)
    return Built(request.name, request.plan, sidecar, reused=False)


def enter_engine(request: EngineRequest, plan: Path, sidecar: Sidecar) -> None:
    """Move a finished plan, its sidecar and its log into the bundle and its manifest.

    Raises:
        BundleError: the ONNX file was replaced while the engine was being built.
    """
    artefact = Artefact(
        name=request.name,
        kind="engine",
        precision=cast("Precision", request.precision),
        file=request.file,
        files={request.file: ""},
        made_from=Origin(name=request.source, sha256=request.onnx_sha256),
        made_with=dict(request.ingredients),
        engine=EngineFacts(
            backend=f"{sidecar.backend} {sidecar.backend_version}",
            targets=sidecar.targets,
            profiles=sidecar.profiles,
            parser_layers=sidecar.parser_layers,
        ),
    )
    enter_files(request.bundle, artefact, (plan, sidecar_path(plan), log_path(plan)))


def enter_files(bundle: Path, artefact: Artefact, files: Sequence[Path]) -> None:
    """Copy the files of something native into a bundle, and enter it in the manifest.

    Raises:
        BundleError: what it was made from was replaced meanwhile.
    """
    origin = artefact.made_from
    with writing(bundle) as draft:
        source = draft.artefacts.get(origin.name)
        if source is None or source.sha256 != origin.sha256:
            raise BundleError(
                f"'{origin.name}' of '{bundle}' was replaced while '{artefact.name}' was being "
                "built from it.",
                "Nothing was written. Build again.",
            )
        for path in files:
            shutil.copyfile(path, draft.file(f"{ENGINES}/{path.name}"))
        inside = {f"{ENGINES}/{path.name}": "" for path in files}  # digested by the draft
        draft.record(artefact.model_copy(update={"files": inside}))
