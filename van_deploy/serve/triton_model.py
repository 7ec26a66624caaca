"""What Triton has to know of a model, read from the bundle's artefacts and sidecars."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from van_deploy.bundle import Bundle, GraphFacts
from van_deploy.engine.sidecar import Sidecar, verified_sidecar
from van_deploy.errors import InputError, UsageError
from van_deploy.recipe import BatchRange
from van_deploy.runners.network import Network, TensorSpec, runnable_artefacts

__all__ = ["TritonModel", "served_name", "triton_models", "usual_artefacts"]


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
        graph: facts of an ONNX file; None for plans.
        sidecar: of the first plan; None for graphs.
        plans: compute capability to the file of its plan, such as ``{"8.9": "model.plan"}``.
    """

    name: str
    backend: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    embedding: str = "none"
    graph: GraphFacts | None = None
    sidecar: Sidecar | None = None
    plans: Mapping[str, str] = field(default_factory=dict)

    @property
    def profiles(self) -> tuple[BatchRange, ...]:
        """The batch sizes of the plans; nothing for a graph, which takes any."""
        return self.sidecar.profiles if self.sidecar else ()


def served_name(bundle: Bundle, artefact: str) -> str:
    """Return what a served artefact is called, here and in Triton: ``van_b1-fp32``."""
    return f"{bundle.name}-{artefact}"


def usual_artefacts(bundle: Bundle) -> tuple[str, ...]:
    """Return what is served where nobody chooses: ``fp32-uint8`` if there is one, or ``fp32``."""
    return ("fp32-uint8" if "fp32-uint8" in runnable_artefacts(bundle) else "fp32",)


def triton_models(
    bundle: Bundle, artefacts: Sequence[str], backend: str = "onnxruntime"
) -> tuple[TritonModel, ...]:
    """Return artefacts of a bundle as Triton models, every digest checked.

    Plans of one graph are one model, whose name says nothing of a GPU; each GPU gets the
    plan of its own compute capability.

    Args:
        bundle: where they are.
        artefacts: which.
        backend: what runs the ONNX artefacts.

    Raises:
        BundleError: an artefact is missing or was changed.
        InputError: Triton cannot load it, or its sidecar is missing.
        UsageError: two artefacts cannot be in one repository.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(artefacts):
        artefact = bundle.artefact(name)
        source = artefact.made_from.name if artefact.kind == "engine" else name
        groups.setdefault(source, []).append(name)
    return tuple(_model(bundle, *group, backend) for group in groups.items())


def _model(bundle: Bundle, source: str, names: Sequence[str], backend: str) -> TritonModel:
    first, network = bundle.artefact(names[0]), Network(bundle, names[0])
    files: dict[str, tuple[Path, str]] = {}
    plans: dict[str, str] = {}
    sidecars: list[Sidecar] = []
    for name in names:
        artefact, path = bundle.artefact(name), bundle.verified(name)
        if artefact.kind != first.kind:
            raise UsageError(
                f"'{names[0]}' and '{name}' are one network and would be models of one name.",
                "Package them apart, with two --output folders.",
            )
        if not network.is_engine:
            beside = [file for file in artefact.files if file.endswith(".data")]
            files = {"model.onnx": (path, name)}
            files |= {Path(file).name: (bundle.path / file, name) for file in beside}
            continue
        sidecars.append(verified_sidecar(path))
        _require_servable(name, sidecars[-1], sidecars[0])
        file = f"model-{len(files)}.plan" if files else "model.plan"
        files[file] = (path, name)
        plans |= {re.sub(r"sm_(\d+)(\d)", r"\1.\2", t): file for t in sidecars[-1].targets}
    return TritonModel(
        name=served_name(bundle, source),
        backend="tensorrt" if network.is_engine else backend,
        input=network.input,
        outputs=network.outputs,
        max_batch=network.max_batch,
        files=files,
        embedding=network.embedding,
        graph=first.graph,
        sidecar=next(iter(sidecars), None),
        plans=plans,
    )


def _require_servable(name: str, sidecar: Sidecar, first: Sidecar) -> None:
    """Refuse a plan that Triton cannot load, or cannot serve beside the first one."""
    if sidecar.backend != "tensorrt":
        raise InputError(
            f"Triton's TensorRT backend cannot load '{name}': it was built by "
            f"{sidecar.backend} {sidecar.backend_version}.",
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
