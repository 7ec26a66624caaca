"""What Triton has to know of a model, read from the bundle's artefacts and sidecars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.engine.sidecar import Sidecar, Tensor, verified_sidecar
from van_deploy.errors import InputError, UsageError
from van_deploy.recipe import BatchRange
from van_deploy.runners.network import Network, TensorSpec, embedding_of, runnable_artefacts

__all__ = ["TritonModel", "TritonSettings", "served_name", "spec_of", "triton_models"]

ENGINE_TYPES = {"float": "float32", "half": "float16", "uint8": "uint8", "int64": "int64"}


@dataclass(frozen=True)
class TritonSettings:
    """How models are to be run.

    Attributes:
        backend: of ONNX artefacts: ``onnxruntime``, or ``python`` for Triton's Python backend
            with an ONNX Runtime of its own. Plans have one backend.
        queue_delay_us: longest wait for other requests.
        queue_limit: requests waiting, at most.
        queue_timeout_ms: a request that waited longer is refused; 0 for never.
        instances: batches of a model that run at the same time.
        threads: inside one operator, for models on a processor; 0 for the runtime's choice.
        gpu: run ONNX models on a GPU too. Plans always are.
        version: number of the models' version.
        release: of Triton; "" for the newest that is known to load the models.
        python: version of the Python backend's Python; "" for the release's.
    """

    backend: str = "onnxruntime"
    queue_delay_us: int = 1000
    queue_limit: int = 256
    queue_timeout_ms: int = 0
    instances: int = 1
    threads: int = 2
    gpu: bool = False
    version: int = 1
    release: str = ""
    python: str = ""


@dataclass(frozen=True)
class TritonModel:
    """One model as Triton has to see it.

    Attributes:
        name: of the model.
        backend: what runs it: ``onnxruntime``, ``tensorrt`` or ``python``.
        input: what it takes.
        outputs: what it gives.
        max_batch: what it was built or checked for.
        files: path and artefact of each file, by the name it gets in the version's folder.
        embedding: what preprocessing it has inside.
        opset: of a graph.
        ir_version: of a graph.
        sidecar: of the first plan.
        plans: compute capability to the file of its plan, such as ``{"8.9": "model.plan"}``.
    """

    name: str
    backend: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    embedding: str = "none"
    opset: int = 0
    ir_version: int = 0
    sidecar: Sidecar | None = None
    plans: Mapping[str, str] = field(default_factory=dict)

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes of the plans; nothing for a graph, which takes any."""
        return self.sidecar.profiles if self.sidecar else ()


def served_name(bundle: Bundle, artefact: str) -> str:
    """Return what a served artefact is called, here and in Triton: ``van_b1-fp32``."""
    return f"{bundle.name}-{artefact}"


def triton_models(
    bundle: Bundle, artefacts: Sequence[str] = (), backend: str = "onnxruntime"
) -> tuple[TritonModel, ...]:
    """Return the artefacts of a bundle as Triton models, every digest checked.

    Plans of one graph are one model, whose name says nothing of a GPU.

    Args:
        bundle: where they are.
        artefacts: which; by default ``fp32-uint8`` where the bundle has it, else ``fp32``.
        backend: what runs the ONNX artefacts.

    Raises:
        BundleError: an artefact is missing or was changed.
        InputError: Triton cannot load it, or its sidecar is missing.
        UsageError: two artefacts cannot be in one repository.
    """
    if not artefacts:
        artefacts = ("fp32-uint8" if "fp32-uint8" in runnable_artefacts(bundle) else "fp32",)
    models: dict[str, TritonModel] = {}
    plans: dict[str, list[str]] = {}
    for name in dict.fromkeys(artefacts):
        artefact = bundle.artefact(name)
        if artefact.kind == "engine":
            plans.setdefault(str(artefact.made_from.get("name") or name), []).append(name)
        else:
            models[name] = _graph_model(bundle, name, backend)
    for source, engines in plans.items():
        if source in models:
            raise UsageError(
                f"'{source}' and '{engines[0]}', made from it, would be models of one name.",
                "Package them apart, with two --output folders.",
            )
        models[source] = _plan_model(bundle, source, engines)
    return tuple(models.values())


def spec_of(tensor: Tensor) -> TensorSpec:
    """Return one of an engine's tensors as clients see it.

    Raises:
        InputError: no client here sends its type.
    """
    if tensor.dtype not in ENGINE_TYPES:
        raise InputError(
            f"The engine's '{tensor.name}' is of type {tensor.dtype}, which no client here sends.",
            f"Known: {', '.join(ENGINE_TYPES)}.",
        )
    return TensorSpec(tensor.name, ENGINE_TYPES[tensor.dtype], tuple(tensor.shape[1:]))


def _graph_model(bundle: Bundle, name: str, backend: str) -> TritonModel:
    artefact, network = bundle.artefact(name), Network(bundle, name)
    files = {"model.onnx": (bundle.verified(name), name)}
    files |= {Path(f).name: (bundle.path / f, name) for f in artefact.files if f.endswith(".data")}
    return TritonModel(
        *(served_name(bundle, name), backend, network.input, network.outputs, network.max_batch),
        files=files,
        embedding=network.embedding,
        opset=int(artefact.facts["opset"]),
        ir_version=int(artefact.facts["ir_version"]),
    )


def _plan_model(bundle: Bundle, source: str, engines: Sequence[str]) -> TritonModel:
    """Return the plans of one graph as one model; each GPU gets the plan of its capability."""
    files: dict[str, tuple[Path, str]] = {}
    plans: dict[str, str] = {}
    sidecars: list[Sidecar] = []
    for name in engines:
        path = bundle.verified(name)
        sidecars.append(verified_sidecar(path))
        _require_servable(name, sidecars[-1], sidecars[0])
        file = f"model-{len(files)}.plan" if files else "model.plan"
        files[file] = (path, name)
        plans |= {re.sub(r"sm_(\d+)(\d)", r"\1.\2", t): file for t in sidecars[-1].targets}
    graph, first = bundle.artefacts.get(source), sidecars[0]
    return TritonModel(
        name=served_name(bundle, source),
        backend="tensorrt",
        input=spec_of(first.inputs[0]),
        outputs=tuple(spec_of(tensor) for tensor in first.outputs),
        max_batch=max(profile.max for profile in first.profiles),
        files=files,
        embedding=embedding_of(graph) if graph else "none",
        sidecar=first,
        plans=plans,
    )


def _require_servable(name: str, sidecar: Sidecar, first: Sidecar) -> None:
    """Refuse a plan that Triton cannot load, or cannot serve beside the first one."""
    built = f"{sidecar.backend} {sidecar.backend_version}"
    if sidecar.backend != "tensorrt":
        raise InputError(
            f"Triton's TensorRT backend cannot load '{name}': it was built by {built}.",
            "Build a plan with `tensorrt` on a machine with the target GPU, or package the "
            "ONNX artefact.",
        )
    profiles = sidecar.profiles
    largest = max(profile.max for profile in profiles)
    gaps = [n for n in range(1, largest) if not any(p.min <= n <= p.max for p in profiles)]
    if gaps:
        raise InputError(
            f"No profile of '{name}' takes a batch of {gaps[0]} (it has "
            f"{', '.join(map(str, profiles))}), and Triton sends every size up to {largest}.",
            f"Build it with profiles that leave none out, such as --batch 1:{largest}:{largest}.",
        )
    same = ("inputs", "outputs", "profiles", "onnx_sha256", "backend_version")
    unlike = [what for what in same if getattr(sidecar, what) != getattr(first, what)]
    if unlike:
        raise UsageError(
            f"'{first.name}' and '{name}' cannot be one model of Triton: their sidecars differ in "
            f"{', '.join(unlike)}.",
            "Build them alike with one `van-deploy build --target`, or package one of them.",
        )
