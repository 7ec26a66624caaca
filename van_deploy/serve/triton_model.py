"""What Triton has to know of a model, read from the bundle's artefacts and sidecars.

The plain data of :func:`model_config` is what the protobuf message ``inference.ModelConfig``
holds. It is written as ``config.pbtxt`` by Triton's own message class, which refuses a field
or a value it does not know, and given out by ``van-deploy serve``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import TritonSettings
from van_deploy.engine.sidecar import Sidecar, verified_sidecar
from van_deploy.errors import InputError, UsageError, needs_extra
from van_deploy.runners.network import Network, TensorSpec, runnable_artefacts

DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
"""NumPy's names of types, and the v2 protocol's; ``config.pbtxt`` puts ``TYPE_`` before them."""

LABELS_FILE = "labels.txt"
LABELLED = ("logits", "probabilities")
FILES = {
    "onnxruntime": "model.onnx",
    "tensorrt": "model.plan",
    "python": "model.py",
    "pytorch": "model.pt2",  # of the server here; Triton is not given one
}
THREADS_KEY = "intra_op_thread_count"  # the ONNX Runtime backend's; model.py reads the same


@dataclass(frozen=True)
class TritonModel:
    """One model as Triton has to see it.

    Attributes:
        name: of the model.
        backend: what runs it: ``onnxruntime``, ``tensorrt`` or ``python``.
        network: what is run; of several plans, the first.
        files: path and artefact of each file, by the name it gets in the version's folder.
        sidecar: of the first plan; None for graphs.
        plans: compute capability to the file of its plan, such as ``{"8.9": "model.plan"}``.
    """

    name: str
    backend: str
    network: Network
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    plans: Mapping[str, str] = field(default_factory=dict)


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


def model_config(
    model: TritonModel,
    how: TritonSettings,
    *,
    preferred: Sequence[int] = (),
    labels: str = "",
    environment: str = "",
) -> dict[str, Any]:
    """Return the configuration of one model.

    One instance group lists all profiles of a plan: the backend takes the fitting one for each
    batch, where several groups would be scheduled without regard to it. A static profile (one
    batch size) is run as a CUDA graph.

    Args:
        model: names, types, shapes and limits.
        how: it is to be run.
        preferred: batch sizes worth waiting for.
        labels: file with the names of the classes, beside the configuration; "" for none.
        environment: execution environment of the Python backend.
    """
    largest, given = model.network.max_batch, _tensor(model.network.input)
    profiles = model.sidecar.profiles if model.sidecar else ()
    static = [profile.max for profile in profiles if profile.min == profile.max]
    ends = {rows for profile in profiles for rows in (profile.min, profile.max)} or {1, largest}
    gpu = how.gpu or model.backend == "tensorrt"
    parameters = {"EXECUTION_ENV_PATH": environment, THREADS_KEY: str(how.threads or "")}
    shape = {given["name"]: {"dim": given["dims"]}}
    cuda = {"graphs": True, "graph_spec": [{"batch_size": n, "input": shape} for n in static]}
    group = {"count": how.instances, "kind": "KIND_GPU" if gpu else "KIND_CPU"}
    policy = {"max_queue_size": how.queue_limit, "timeout_action": "REJECT"}
    return {
        "name": model.name,
        "backend": model.backend,
        "max_batch_size": largest,
        "input": [given],
        "output": [
            {**_tensor(spec), "label_filename": labels if spec.name in LABELLED else ""}
            for spec in model.network.outputs
        ],
        "version_policy": {"specific": {"versions": [how.model_version]}},
        "instance_group": [{**group, "profile": [str(i) for i in range(len(profiles))]}],
        "default_model_filename": FILES.get(model.backend, ""),
        "cc_model_filenames": dict(model.plans),
        "dynamic_batching": {
            "preferred_batch_size": list(preferred),
            "max_queue_delay_microseconds": how.queue_delay_us,
            "default_queue_policy": {
                **policy,
                "default_timeout_microseconds": 1000 * how.queue_timeout_ms,
            },
        },
        **({"optimization": {"cuda": cuda}} if static else {}),
        "parameters": {key: {"string_value": v} for key, v in parameters.items() if v and not gpu},
        "model_warmup": [_warmup(given, rows) for rows in sorted(ends)],
        "response_cache": {"enable": False},
    }


def config_text(config: dict[str, Any]) -> str:
    """Return a configuration as ``config.pbtxt``.

    Raises:
        MissingDependency: tritonclient, which holds Triton's schema, is not installed.
    """
    with needs_extra("Triton's schema of config.pbtxt", "triton"):
        from tritonclient.grpc import model_config_pb2
    from google.protobuf import json_format, text_format

    message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
    return str(text_format.MessageToString(message))


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    kind = f"TYPE_{DATATYPES[spec.dtype]}"
    return {"name": spec.name, "data_type": kind, "dims": list(spec.shape)}


def _warmup(given: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return a request of zeros that Triton runs before it says it is ready."""
    values = {"data_type": given["data_type"], "dims": given["dims"], "zero_data": True}
    return {"name": f"batch of {rows}", "batch_size": rows, "inputs": {given["name"]: values}}


def _model(bundle: Bundle, source: str, names: Sequence[str], backend: str) -> TritonModel:
    network, plans = Network(bundle, names[0]), dict[str, str]()
    files: dict[str, tuple[Path, str]] = {}
    sidecars: list[Sidecar] = []
    if network.is_package:
        raise InputError(
            f"Triton does not load Inductor packages here, and '{names[0]}' is one.",
            "Package an ONNX artefact or a plan, or serve this one with `van-deploy serve`.",
        )
    for name in names:
        artefact, path = bundle.artefact(name), bundle.verified(name)
        if (artefact.kind == "engine") != network.is_engine:
            raise UsageError(
                f"'{names[0]}' and '{name}' are one network and would be models of one name.",
                "Package them apart, with two --output folders.",
            )
        if not network.is_engine:
            beside = [bundle.path / file for file in artefact.files if file.endswith(".data")]
            files = {"model.onnx": (path, name)} | {file.name: (file, name) for file in beside}
            continue
        sidecars.append(verified_sidecar(path))
        _require_servable(name, sidecars[-1], sidecars[0])
        file = f"model-{len(files)}.plan" if files else "model.plan"
        files[file] = (path, name)
        plans |= {re.sub(r"sm_(\d+)(\d)", r"\1.\2", t): file for t in sidecars[-1].targets}
    runs = "tensorrt" if network.is_engine else backend
    first = sidecars[0] if sidecars else None
    return TritonModel(served_name(bundle, source), runs, network, files, first, plans)


def _require_servable(name: str, sidecar: Sidecar, first: Sidecar) -> None:
    """Refuse a plan that Triton cannot load, or cannot serve beside the first one."""
    if sidecar.backend != "tensorrt":
        raise InputError(
            f"Triton's TensorRT backend cannot load '{name}': it was built by "
            f"{sidecar.backend} {sidecar.backend_version}.",
            "Build a plan with `tensorrt` on a machine with the target GPU, or package the "
            "ONNX artefact.",
        )
    largest = max(profile.max for profile in sidecar.profiles)
    taken = {n for p in sidecar.profiles for n in range(p.min, p.max + 1)}
    gaps = sorted(set(range(1, largest)) - taken)
    if gaps:
        raise InputError(
            f"No profile of '{name}' takes a batch of {gaps[0]} (it has "
            f"{', '.join(map(str, sidecar.profiles))}), and Triton sends any up to {largest}.",
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
