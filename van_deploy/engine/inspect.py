"""Describe engines and Inductor packages without running them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from van_deploy.engine.backend import TITLES, detect_host, engine_from_plan, load_backend
from van_deploy.engine.compatibility import Obstacle, find_obstacles
from van_deploy.engine.messages import BuildLog
from van_deploy.engine.sidecar import PackageSidecar, Sidecar, load_sidecar, log_path
from van_deploy.errors import VanDeployError
from van_deploy.files import file_sha256

BUILD_NOTES = re.compile(
    r"(?m)^\[[VI]\] ((?:After .*layers|(?:Total|Max) .*Memory:|Layer\(|Engine generation compl).*)"
)


@dataclass(frozen=True)
class Layer:
    """One layer of a plan, from TensorRT's engine inspector.

    Attributes:
        name: joined names of the ONNX nodes fused into it.
        kind: TensorRT's layer type; "" if unknown.
        precision: data type of its first output; "" if unknown.
        nodes: the ONNX nodes in it, which are named after PyTorch modules, from its metadata.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class EngineDescription:
    """Description of an engine; the layers need a machine on which it runs.

    Attributes:
        file: path of the plan.
        plan_sha256: SHA-256 of the plan.
        plan_bytes: size of the plan.
        sidecar: its sidecar; None for a trusted plan without one.
        obstacles: reasons why it does not run here; empty if it does, or without a sidecar.
        layers: from the engine inspector; empty if the plan cannot be loaded.
        layers_skipped: why there are no layers, or "".
        log: path of the build log, or None if it is not in the same folder.
        build_notes: lines of the build log about fusion, for plans that cannot be loaded here.
        kind: type of this description.
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
    """Description of an Inductor package, which is not loaded.

    Attributes:
        file: path of the package.
        sidecar: its sidecar.
        obstacles: reasons why it does not run here; empty if it does.
        kind: type of this description.
    """

    file: Path
    sidecar: PackageSidecar
    obstacles: tuple[Obstacle, ...]
    kind: Literal["package"] = "package"


def describe_package(path: Path) -> PackageDescription:
    """Return the description of the package at ``path`` after verifying its digest.

    Raises:
        InputError: the package or its sidecar is missing, damaged, edited or swapped.
    """
    sidecar = PackageSidecar.load(path)
    return PackageDescription(path, sidecar, find_obstacles(sidecar, detect_host()))


def describe_engine(path: Path, *, trust_engine: bool = False) -> EngineDescription:
    """Return the description of the engine at ``path``.

    The digest of the plan is verified first. The plan is deserialised, for the engine inspector,
    only on a machine where it runs.

    Args:
        path: path of the plan.
        trust_engine: load a plan that has no sidecar. This runs the code in it.

    Raises:
        InputError: the plan or its sidecar is missing, damaged, edited or swapped.
    """
    sidecar = load_sidecar(path, trust_engine=trust_engine)
    obstacles: tuple[Obstacle, ...] = ()
    layers: tuple[Layer, ...] = ()
    backends, host_code = [*TITLES], False
    if sidecar is not None:
        obstacles = find_obstacles(sidecar, detect_host())
        backends, host_code = [sidecar.backend], sidecar.options.version_compatible
    skipped = [obstacle.problem for obstacle in obstacles]
    for name in () if obstacles else backends:
        try:
            backend, messages = load_backend(name), BuildLog()
            runtime, _logger = backend.runtime(messages)
            engine = engine_from_plan(runtime, backend, path, messages, host_code=host_code)
        except VanDeployError as error:  # noqa: PERF203 - try the next backend
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
        obstacles=obstacles,
        layers=layers,
        layers_skipped="; ".join(skipped),
        log=log if log.is_file() else None,
        build_notes=tuple(dict.fromkeys(note[:200] for note in BUILD_NOTES.findall(text))),
    )


def layers_from_json(text: str) -> tuple[Layer, ...]:
    """Return the layers in the JSON of the engine inspector of any TensorRT version.

    A layer is a name, or with ``detailed`` profiling an object, whose keys differ between
    TensorRT 10 and 11. Missing values are empty.

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
