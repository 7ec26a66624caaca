"""What an engine or a package is, without running it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from van_deploy.engine.backend import TITLES, backend_named, engine_from_plan, host_here
from van_deploy.engine.compatibility import Obstacle, obstacles
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import (
    PackageSidecar,
    Sidecar,
    log_path,
    sidecar_path,
    verified_package,
    verified_sidecar,
)
from van_deploy.errors import VanDeployError
from van_deploy.files import file_sha256

NOTES = re.compile(
    r"(?m)^\[[VI]\] ((?:After .*layers|(?:Total|Max) .*Memory:|Layer\(|Engine generation compl).*)"
)


@dataclass(frozen=True)
class Layer:
    """One layer of a plan, as the engine inspector names it.

    Attributes:
        name: joined from the ONNX nodes fused into it.
        kind: TensorRT's layer type; "" where the plan does not say.
        precision: data type of its first output; "" where the plan does not say.
        nodes: ONNX nodes in it, that is PyTorch modules, where its metadata names them.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class EngineDescription:
    """An engine as far as this machine can tell.

    Attributes:
        file: the plan.
        plan_sha256: its digest.
        plan_bytes: its size.
        sidecar: what was recorded at the build; None where nothing vouches for the plan.
        obstacles: why it does not run here; empty if it does, or if nothing is known.
        layers: from the engine inspector; empty where that cannot run.
        layers_skipped: why there are no layers, or "".
        log: the build log, or None if it is not beside the plan.
        build_notes: what the build log tells about fusion, for plans that cannot be loaded here.
        kind: says what this describes.
    """

    file: Path
    plan_sha256: str
    plan_bytes: int
    sidecar: Sidecar | None
    obstacles: tuple[Obstacle, ...]
    layers: tuple[Layer, ...]
    layers_skipped: str
    log: Path | None
    build_notes: tuple[str, ...]
    kind: Literal["engine"] = "engine"


@dataclass(frozen=True)
class PackageDescription:
    """A package, without loading it.

    Attributes:
        file: the package.
        sidecar: what was recorded when it was compiled.
        obstacles: why it does not run here; empty if it does.
        kind: says what this describes.
    """

    file: Path
    sidecar: PackageSidecar
    obstacles: tuple[Obstacle, ...]
    kind: Literal["package"] = "package"


def describe_package(path: Path) -> PackageDescription:
    """Return what is known about the package at ``path``, its digest checked.

    Raises:
        InputError: package or sidecar is missing, damaged, edited or swapped.
    """
    sidecar = verified_package(path)
    return PackageDescription(path, sidecar, obstacles(sidecar, host_here()))


def describe_engine(path: Path, *, trust_engine: bool = False) -> EngineDescription:
    """Return what is known about the engine at ``path``.

    The plan's digest is checked first; the plan is deserialised only where it
    runs, to ask the engine inspector.

    Args:
        path: the plan.
        trust_engine: load a plan without a sidecar, to see what is in it. That runs its code.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    sidecar: Sidecar | None = None
    found: tuple[Obstacle, ...] = ()
    layers: tuple[Layer, ...] = ()
    backends, host_code = [*TITLES], False
    if not (trust_engine and path.is_file() and not sidecar_path(path).exists()):
        sidecar = verified_sidecar(path)
        found = obstacles(sidecar, host_here())
        backends, host_code = [sidecar.backend], sidecar.options.version_compatible
    skipped = [obstacle.problem for obstacle in found]
    for name in () if found else backends:
        try:
            backend, said = backend_named(name), BuildLog()
            runtime, _logger = backend.runtime(said)
            engine = engine_from_plan(runtime, backend, path, said, host_code=host_code)
        except VanDeployError as error:  # noqa: PERF203 - each backend on its own
            skipped.append(f"{name}: {error.message.rstrip('.')}")
        else:
            kind = backend.module.LayerInformationFormat.JSON
            layers = layers_from_json(engine.create_engine_inspector().get_engine_information(kind))
            skipped = []
            break
    log = log_path(path)
    text = log.read_text(encoding="utf-8", errors="replace") if sidecar and log.is_file() else ""
    return EngineDescription(
        file=path,
        plan_sha256=sidecar.plan_sha256 if sidecar else file_sha256(path),
        plan_bytes=path.stat().st_size,
        sidecar=sidecar,
        obstacles=found,
        layers=layers,
        layers_skipped="; ".join(skipped),
        log=log if log.is_file() else None,
        build_notes=tuple(dict.fromkeys(note[:200] for note in NOTES.findall(text))),
    )


def layers_from_json(text: str) -> tuple[Layer, ...]:
    """Return the layers in the engine inspector's JSON, of any version.

    With little profiling a layer is its name alone; with ``detailed`` it is an
    object, whose keys changed between 10 and 11. What is not there stays empty.

    >>> layers_from_json('{"Layers": ["conv"]}')[0].name
    'conv'
    """
    return tuple(_layer(entry) for entry in json.loads(text).get("Layers", ()))


def _layer(entry: str | Mapping[str, Any]) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", "", ())
    output: Mapping[str, Any] = (entry.get("Outputs") or ({},))[0]
    return Layer(
        str(entry.get("Name", "")),
        str(entry.get("LayerType", "")),
        str(output.get("Format/Datatype") or output.get("Datatype") or ""),
        tuple(re.findall(r"\[ONNX Layer: (.*?)\](?=\[|$)", str(entry.get("Metadata", "")))),
    )
