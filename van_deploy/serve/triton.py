"""What Triton has to know of a model, and which release of Triton loads it.

The plain data of :func:`model_config` is what the protobuf message ``inference.ModelConfig``
holds. It is written as ``config.pbtxt`` by Triton's own message class, which refuses a field
or a value it does not know, and given out by ``van-deploy serve``.

The table of releases is ``releases.toml``, with its sources. What it does not say is *not
checked*, which is told to the user and is never a pass.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import TritonSettings
from van_deploy.documents import read_toml_file
from van_deploy.engine.sidecar import Sidecar, load_sidecar
from van_deploy.errors import InputError, UsageError
from van_deploy.runners.network import Network, runnable_artifacts

DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
"""NumPy's names of types, and the v2 protocol's; ``config.pbtxt`` puts ``TYPE_`` before them."""

GOOD_SHARE = 0.9  # of the best throughput: a batch size worth waiting for
LABELS_FILE = "labels.txt"
LABELLED = ("logits", "probabilities")
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
THREADS_KEY = "intra_op_thread_count"  # the ONNX Runtime backend's; model.py reads the same


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: of the model and the check.
        outcome: whether it is as it should be; None if that could not be checked.
        detail: what was found.
    """

    name: str
    outcome: bool | None
    detail: str


@dataclass(frozen=True)
class TritonModel:
    """One model as Triton has to see it.

    Attributes:
        name: of the model.
        backend: what runs it: ``onnxruntime``, ``tensorrt`` or ``python``.
        network: what is run; of several plans, the first.
        files: path and artifact of each file, by the name it gets in the version's folder.
        sidecar: of the first plan; None for graphs.
        plans: compute capability to the file of its plan, such as ``{"8.9": "model.plan"}``.
    """

    name: str
    backend: str
    network: Network
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    plans: Mapping[str, str] = field(default_factory=dict)


def served_name(bundle: Bundle, artifact: str) -> str:
    """Return what a served artifact is called, here and in Triton: ``van_b1-fp32``."""
    return f"{bundle.name}-{artifact}"


def usual_artifacts(bundle: Bundle) -> tuple[str, ...]:
    """Return what is served where nobody chooses: ``fp32-uint8`` if there is one, or ``fp32``."""
    return ("fp32-uint8" if "fp32-uint8" in runnable_artifacts(bundle) else "fp32",)


def models_of(
    bundle: Bundle, artifacts: Sequence[str], backend: str = "onnxruntime"
) -> list[TritonModel]:
    """Return artifacts of a bundle as Triton models, every digest checked.

    Plans of one graph are one model, whose name says nothing of a GPU; each GPU gets the
    plan of its own compute capability.

    Args:
        bundle: where they are.
        artifacts: which.
        backend: what runs the ONNX artifacts.

    Raises:
        BundleError: an artifact is missing or was changed.
        InputError: Triton cannot load it, or its sidecar is missing.
        UsageError: two artifacts cannot be in one repository.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(artifacts):
        artifact = bundle.artifact(name)
        if artifact.engine and not artifact.engine.backend.startswith("tensorrt "):
            raise InputError(
                f"Triton cannot load '{name}': it was built by {artifact.engine.backend}.",
                "Package the ONNX artifact, or a plan of `tensorrt` for the target GPU.",
            )
        source = artifact.made_from.name if artifact.kind == "engine" else name
        groups.setdefault(source, []).append(name)
    models = []
    for source, names in groups.items():
        network = Network(bundle, names[0])
        if len({bundle.artifact(name).kind for name in names}) > 1:
            raise UsageError(
                f"'{names[0]}' and '{names[1]}' are one network and would be models of one name.",
                "Package them apart, with two --output folders.",
            )
        if network.is_engine:
            models.append(_of_plans(network, served_name(bundle, source), names))
            continue
        beside = (f for f in bundle.artifact(source).files if f.endswith(".data"))
        files = {Path(file).name: (bundle.path / file, source) for file in beside}
        files["model.onnx"] = (bundle.verified_path(source), source)
        models.append(TritonModel(served_name(bundle, source), backend, network, files))
    return models


def _of_plans(network: Network, called: str, names: Sequence[str]) -> TritonModel:
    """Return the model of plans of one graph; refuse what Triton cannot load or serve as one."""
    paths = [network.bundle.verified_path(name) for name in names]
    sidecars = [load_sidecar(path) for path in paths]
    first, both = sidecars[0], " and ".join(f"'{name}'" for name in names)
    same = ("inputs", "outputs", "profiles", "onnx_sha256", "backend_version")
    unlike = [what for what in same if len({str(getattr(s, what)) for s in sidecars}) > 1]
    if unlike:
        raise UsageError(
            f"{both} cannot be one model of Triton: their sidecars differ in {', '.join(unlike)}.",
            "Build them alike with one `van-deploy build --target`, or package one of them.",
        )
    largest = max(profile.max for profile in first.profiles)
    taken = {n for p in first.profiles for n in range(p.min, p.max + 1)}
    if gaps := sorted({*range(1, largest)} - taken):
        profiles = ", ".join(map(str, first.profiles))
        raise InputError(
            f"{profiles}, the profiles of {both}, leave out a batch of {gaps[0]}.",
            f"Triton sends any up to {largest}: build it with --batch 1:{largest}:{largest}.",
        )
    files, capabilities = dict[str, tuple[Path, str]](), dict[str, str]()
    for path, name, sidecar in zip(paths, names, sidecars, strict=True):
        file = f"model-{len(files)}.plan" if files else "model.plan"
        files[file] = (path, name)
        for target in sidecar.targets:
            capabilities[re.sub(r"sm_(\d+)(\d)", r"\1.\2", target)] = file
    return TritonModel(called, "tensorrt", network, files, first, capabilities)


def preferred_batches(network: Network) -> list[int]:
    """Return the batch sizes worth waiting for.

    Those that reached 90 % of the best throughput in the bundle's benchmark; without
    one, the optimum the bundle was made for and the largest.
    """
    manifest, plain, rates = network.bundle.manifest, network.name.split("-")[0], dict[int, float]()
    for row in manifest.checks.get("bench", {}).get("rows", ()):
        if plain in str(row["contender"]).replace("/", " ").split():
            rates[row["batch"]] = max(rates.get(row["batch"], 0.0), row["images_per_s"])
    good = [n for n, rate in rates.items() if rate >= GOOD_SHARE * max(rates.values())]
    good = good or [manifest.batch.opt, network.max_batch]
    return sorted({n for n in good if 1 < n <= network.max_batch})


def model_config(
    model: TritonModel, how: TritonSettings, *, labels: str = "", environment: str = ""
) -> dict[str, Any]:
    """Return the configuration of one model.

    One instance group lists all profiles of a plan: the backend takes the fitting one for each
    batch, where several groups would be scheduled without regard to it. A static profile (one
    batch size) is run as a CUDA graph.

    Args:
        model: names, types, shapes and limits.
        how: it is to be run.
        labels: file with the names of the classes, beside the configuration; "" for none.
        environment: execution environment of the Python backend.
    """
    network, profiles = model.network, model.sidecar.profiles if model.sidecar else ()
    largest = network.max_batch
    static = [profile.max for profile in profiles if profile.min == profile.max]
    ends = {rows for profile in profiles for rows in (profile.min, profile.max)} or {1, largest}
    gpu = how.gpu or model.backend == "tensorrt"
    kind, every_profile = "KIND_GPU" if gpu else "KIND_CPU", list(map(str, range(len(profiles))))
    given, *outputs = (
        {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": list(spec.shape)}
        for spec in (network.input, *network.outputs)
    )
    parameters = {"EXECUTION_ENV_PATH": environment, THREADS_KEY: str(how.threads or "")}
    shape = {given["name"]: {"dim": given["dims"]}}
    cuda = {"graphs": True, "graph_spec": [{"batch_size": n, "input": shape} for n in static]}
    zeros = {"data_type": given["data_type"], "dims": given["dims"], "zero_data": True}
    return {
        "name": model.name,
        "backend": model.backend,
        "max_batch_size": largest,
        "input": [given],
        "output": [
            {**output, "label_filename": labels if output["name"] in LABELLED else ""}
            for output in outputs
        ],
        "version_policy": {"specific": {"versions": [how.model_version]}},
        "instance_group": [{"count": how.instances, "kind": kind, "profile": every_profile}],
        "default_model_filename": FILES.get(model.backend, ""),
        "cc_model_filenames": dict(model.plans),
        "dynamic_batching": {
            "preferred_batch_size": preferred_batches(network),
            "max_queue_delay_microseconds": how.queue_delay_us,
            "default_queue_policy": {
                "max_queue_size": how.queue_limit,
                "timeout_action": "REJECT",
                "default_timeout_microseconds": 1000 * how.queue_timeout_ms,
            },
        },
        **({"optimization": {"cuda": cuda}} if static else {}),
        "parameters": {key: {"string_value": v} for key, v in parameters.items() if v and not gpu},
        "model_warmup": [  # run before it says that it is ready
            {"name": f"batch of {rows}", "batch_size": rows, "inputs": {given["name"]: zeros}}
            for rows in sorted(ends)
        ],
    }


@functools.cache
def releases() -> dict[str, Any]:
    """Return the table: ``releases`` by name, newest first, and what each ``onnx`` loads."""
    return read_toml_file(Path(str(resources.files("van_deploy.serve") / "releases.toml")))


def loads(release: str, model: TritonModel) -> Finding:
    """Return whether a release of Triton loads ``model``, and why."""

    def found(outcome: bool | None, detail: str) -> Finding:
        return Finding(f"{model.name}: release", outcome, detail)

    what, title = ("tensorrt", "TensorRT") if model.sidecar else ("onnxruntime", "ONNX Runtime")
    has = releases()["releases"].get(release, {}).get(what)
    if model.backend == "python":
        return found(True, "the execution environment brings ONNX Runtime")
    if has == "none":
        return found(False, f"Triton {release} was shipped without an ONNX Runtime backend")
    if not has:
        return found(None, f"not checked: no table here says which {title} Triton {release} has")
    told = f"Triton {release} has {title} {has}"
    if model.sidecar:
        built = model.sidecar.backend_version
        return found(f"{built}.".startswith(f"{has}."), f"{told}; the plan was built by {built}")
    graph = model.network.bundle.artifact(model.network.name).graph
    opset, version = (graph.opset, graph.ir_version) if graph else (0, 0)
    newest = releases()["onnx"].get(has.rpartition(".")[0], (0, 0))
    return found(
        opset <= newest[0] and version <= newest[1],
        f"{told}; it loads opset {newest[0]} and IR version {newest[1]} at most, the graph has "
        f"opset {opset} and IR version {version}",
    )
