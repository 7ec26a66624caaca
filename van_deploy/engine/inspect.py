"""What an engine is, without running it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.engine.backend import BACKENDS, Backend, backend_named
from van_deploy.engine.catalogue import load_failure
from van_deploy.engine.compatibility import Obstacle, obstacles
from van_deploy.engine.host import Host, host_here
from van_deploy.engine.log import BuildLog, trt_logger
from van_deploy.engine.sidecar import Sidecar, log_path, sidecar_path, verified_sidecar
from van_deploy.errors import VanDeployError
from van_deploy.files import file_sha256

__all__ = [
    "EngineDescription",
    "Layer",
    "describe_engine",
    "engine_description",
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
        path: the plan.
        sidecar: what was recorded at the build.
        obstacles: why it does not run here; empty if it does.
        plan_is_sound: TensorRT's own look at the bytes; None where it has none.
        layers: from the engine inspector; empty where that cannot run.
        layers_skipped: why there are no layers, or "".
        log: the build log, or None if it is not beside the plan.
        build_notes: what the build log tells about fusion, for plans that cannot be loaded here.
    """

    path: Path
    sidecar: Sidecar
    obstacles: tuple[Obstacle, ...]
    plan_is_sound: bool | None
    layers: tuple[Layer, ...]
    layers_skipped: str
    log: Path | None
    build_notes: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        """Whether nothing keeps it from running on this machine."""
        return not self.obstacles


def describe_engine(
    path: Path, host: Host | None = None, *, trust_engine: bool = False
) -> dict[str, Any]:
    """Return what is known about the engine at ``path``, as plain data for tables and JSON.

    Args:
        path: the plan.
        host: the machine; None looks at this one.
        trust_engine: load a plan without a sidecar, to see what is in it. That runs its code.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    if trust_engine and path.is_file() and not sidecar_path(path).exists():
        return _foreign(path)
    found = engine_description(path, host)
    sidecar = found.sidecar
    return {
        "kind": "engine",
        "file": str(path),
        "runs here": found.runs_here,
        "why not": [obstacle.problem for obstacle in found.obstacles],
        "remedies": list(dict.fromkeys(obstacle.remedy for obstacle in found.obstacles)),
        "plan is sound": found.plan_is_sound,
        **sidecar.as_dict(),
        "log": str(found.log) if found.log else None,
        "layers": [asdict(layer) for layer in found.layers],
        "layers skipped": found.layers_skipped,
        "build notes": list(found.build_notes),
    }


def engine_description(path: Path, host: Host | None = None) -> EngineDescription:
    """Return what is known about the engine at ``path``.

    The plan's digest is checked first; the plan is deserialised only where it
    runs, to ask the engine inspector.

    Raises:
        InputError: plan or sidecar is missing, damaged, edited or swapped.
    """
    host = host or host_here()
    sidecar = verified_sidecar(path)
    found = obstacles(sidecar, host)
    layers: tuple[Layer, ...] = ()
    skipped = "; ".join(obstacle.problem for obstacle in found)
    if not found:
        try:
            layers = layers_of(path, backend_named(sidecar.backend))
        except VanDeployError as error:
            skipped = error.message
    log = log_path(path)
    present = log if log.is_file() else None
    return EngineDescription(
        path,
        sidecar,
        found,
        _is_sound(path, sidecar),
        layers,
        skipped,
        present,
        _build_notes(log) if present else (),
    )


def _foreign(path: Path) -> dict[str, Any]:
    """Return what can be said of a plan that nothing vouches for: its layers, where it loads."""
    layers: tuple[Layer, ...] = ()
    tried = {}
    for name in BACKENDS:
        try:
            layers = layers_of(path, backend_named(name))
        except VanDeployError as error:  # noqa: PERF203 - each back end on its own
            tried[name] = error.message.rstrip(".")
        else:
            break
    return {
        "kind": "engine",
        "file": str(path),
        "sidecar": "none: nothing says where this plan comes from",
        "plan_sha256": file_sha256(path),
        "plan_bytes": path.stat().st_size,
        "layers": [asdict(layer) for layer in layers],
        "layers skipped": "" if layers else "; ".join(f"{n}: {why}" for n, why in tried.items()),
    }


def layers_of(path: Path, backend: Backend) -> tuple[Layer, ...]:
    """Return the layers of a plan; needs the GPU it was built for.

    Raises:
        ConversionError: the plan does not load.
    """
    trt, log = backend.module, BuildLog()
    logger = trt_logger(trt, log)
    runtime = trt.Runtime(logger)
    if runtime is not None:
        runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(path.read_bytes()) if runtime else None
    if engine is None:
        raise load_failure(backend.label, str(path), log.errors)
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
        backend = backend_named(sidecar.backend)
    except VanDeployError:
        return None
    runtime = backend.module.Runtime(trt_logger(backend.module, BuildLog()))
    if runtime is None or not hasattr(runtime, "get_engine_validity"):
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
