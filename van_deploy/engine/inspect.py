"""What an engine is, without running it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from van_deploy.engine.backend import BACKENDS, Backend, backend_named
from van_deploy.engine.compatibility import Obstacle, obstacles
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.load import engine_from_plan, runtime_of
from van_deploy.engine.log import BuildLog
from van_deploy.engine.sidecar import Sidecar, log_path, sidecar_path, verified_sidecar
from van_deploy.errors import VanDeployError
from van_deploy.files import file_sha256

__all__ = [
    "EngineDescription",
    "Layer",
    "describe_engine",
    "layers_from_json",
    "layers_of",
]

MALFORMED = 32  # EngineInvalidityDiagnostics.MALFORMED_ENGINE


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
        plan_is_sound: TensorRT's own look at the bytes; None where it has none.
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
    plan_is_sound: bool | None
    layers: tuple[Layer, ...]
    layers_skipped: str
    log: Path | None
    build_notes: tuple[str, ...]
    kind: Literal["engine"] = "engine"


def describe_engine(
    path: Path, host: Host | None = None, *, trust_engine: bool = False
) -> EngineDescription:
    """Return what is known about the engine at ``path``.

    The plan's digest is checked first; the plan is deserialised only where it
    runs, to ask the engine inspector.

    Args:
        path: the plan.
        host: the machine; None looks at this one.
        trust_engine: load a plan without a sidecar, to see what is in it. That runs its code.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    sidecar: Sidecar | None = None
    found: tuple[Obstacle, ...] = ()
    sound = None
    layers: tuple[Layer, ...] = ()
    if trust_engine and path.is_file() and not sidecar_path(path).exists():
        layers, skipped = _layers_of(path, BACKENDS)
    else:
        sidecar = verified_sidecar(path)
        found, sound = obstacles(sidecar, host or host_here()), _is_sound(path, sidecar)
        skipped = "; ".join(obstacle.problem for obstacle in found)
        if not found:
            host_code = sidecar.options.version_compatible
            layers, skipped = _layers_of(path, (sidecar.backend,), host_code=host_code)
    log = log_path(path)
    return EngineDescription(
        file=path,
        plan_sha256=sidecar.plan_sha256 if sidecar else file_sha256(path),
        plan_bytes=path.stat().st_size,
        sidecar=sidecar,
        obstacles=found,
        plan_is_sound=sound,
        layers=layers,
        layers_skipped=skipped,
        log=log if log.is_file() else None,
        build_notes=_build_notes(log) if sidecar and log.is_file() else (),
    )


def _layers_of(
    path: Path, backends: Iterable[str], *, host_code: bool = False
) -> tuple[tuple[Layer, ...], str]:
    """Return the layers of a plan by the first backend that loads it, or why none does."""
    tried = {}
    for name in backends:
        try:
            return layers_of(path, backend_named(name), host_code=host_code), ""
        except VanDeployError as error:  # noqa: PERF203 - each backend on its own
            tried[name] = error.message.rstrip(".")
    return (), "; ".join(f"{name}: {why}" for name, why in tried.items())


def layers_of(path: Path, backend: Backend, *, host_code: bool = False) -> tuple[Layer, ...]:
    """Return the layers of a plan; needs the GPU it was built for.

    ``host_code`` is that of :func:`~van_deploy.engine.load.engine_from_plan`.

    Raises:
        ConversionError: the plan does not load.
    """
    trt, log = backend.module, BuildLog()
    runtime, _logger = runtime_of(backend, log)
    engine = engine_from_plan(runtime, backend, path, log, host_code=host_code)
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return layers_from_json(text)


def layers_from_json(text: str) -> tuple[Layer, ...]:
    """Return the layers in the engine inspector's JSON, of any version.

    With little profiling a layer is its name alone; with ``detailed`` it is an
    object, whose keys changed between 10 and 11. What is not there stays empty.

    >>> layers_from_json('{"Layers": ["conv"]}')[0].name
    'conv'
    """
    document = json.loads(text)
    return tuple(_layer(entry) for entry in document.get("Layers", ()))


def _layer(entry: str | Mapping[str, Any]) -> Layer:
    if isinstance(entry, str):
        return Layer(entry, "", "", ())
    outputs: Sequence[Mapping[str, Any]] = entry.get("Outputs") or ({},)
    types = outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or ""
    metadata = str(entry.get("Metadata", ""))
    nodes = tuple(
        part.removeprefix("[ONNX Layer: ").removesuffix("]")
        for part in metadata.replace("][", "]\x1f[").split("\x1f")
        if part.startswith("[ONNX Layer: ")
    )
    return Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), str(types), nodes)


def _is_sound(path: Path, sidecar: Sidecar) -> bool | None:
    """Return whether TensorRT takes the bytes for a plan.

    Without a GPU only its MALFORMED bit means anything. This says nothing about
    tampering: that is what the digest is for.
    """
    try:
        runtime, _logger = runtime_of(backend_named(sidecar.backend), BuildLog())
    except VanDeployError:
        return None
    if not hasattr(runtime, "get_engine_validity"):
        return None
    _, diagnostics = runtime.get_engine_validity(path.read_bytes())
    return not int(diagnostics) & MALFORMED


def _build_notes(log: Path) -> tuple[str, ...]:
    """Return the lines of a build log about what became of the layers."""
    wanted = ("layers", "Layer(", "Memory:", "Engine generation completed")
    found = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.removeprefix("[V] ").removeprefix("[I] ")
        if text.startswith(("After ", "Total ", "Max ", "Layer(", "Engine generation")) and any(
            sign in text for sign in wanted
        ):
            found.append(text if len(text) <= 200 else text[:197] + "...")
    return tuple(dict.fromkeys(found))
