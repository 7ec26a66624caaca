"""Triton's configuration of a model, and the Triton releases that can load it.

:func:`model_config` returns the fields of the protobuf message ``inference.ModelConfig``. It is
written as ``config.pbtxt`` by Triton's own message class, which rejects unknown fields and values,
and returned by ``van-deploy serve``.

The table of releases, with its sources, is ``releases.toml``. A release that is not in the table
is reported as *not checked*, which never counts as passed.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import TritonSettings
from van_deploy.config.sizes import height_width
from van_deploy.documents import read_toml_file
from van_deploy.engine.sidecar import Sidecar
from van_deploy.errors import InputError, UsageError
from van_deploy.runners.network import Network

# NumPy's and the v2 protocol's names of types; ``config.pbtxt`` adds the prefix ``TYPE_``.
DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}
GOOD_SHARE = 0.9  # of the best throughput, for a preferred batch size
LABELS_FILE = "labels.txt"
LABELLED = ("logits", "probabilities")
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
THREADS_KEY = "intra_op_thread_count"  # the ONNX Runtime backend's; model.py reads the same


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: name of the check, with the model's name where there is one.
        outcome: whether the check passed; None if it could not be made.
        detail: explanation.
    """

    name: str
    outcome: bool | None
    detail: str


@dataclass(frozen=True)
class TritonModel:
    """One model of a Triton repository.

    Attributes:
        name: name of the model.
        backend: Triton backend: ``onnxruntime``, ``tensorrt`` or ``python``.
        network: the network; the first of several plans.
        files: path and artifact of each file, by file name in the version's folder.
        sidecar: sidecar of the first plan; None for graphs.
        plans: plan file by compute capability, such as ``{"8.9": "model.plan"}``.
    """

    name: str
    backend: str
    network: Network
    files: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    plans: Mapping[str, str] = field(default_factory=dict)


def served_name(bundle: Bundle, artifact: str) -> str:
    """Return the model name of a served artifact, here and in Triton, such as ``van_b1-fp32``."""
    return f"{bundle.name}-{artifact}"


def default_artifacts(bundle: Bundle) -> tuple[str, ...]:
    """Return the artifact that is served by default: ``fp32-uint8`` if it exists, else ``fp32``."""
    entry = bundle.artifacts.get("fp32-uint8")
    return ("fp32-uint8" if entry and entry.kind == "serving" else "fp32",)


def triton_models(
    bundle: Bundle, artifacts: Sequence[str], backend: str = "onnxruntime", *, gpu: bool = False
) -> list[TritonModel]:
    """Return artifacts of a bundle as Triton models, after checking every digest.

    Plans of one graph become one model without a GPU in its name; each GPU loads the plan of its
    own compute capability.

    Args:
        bundle: the bundle.
        artifacts: names of the artifacts.
        backend: Triton backend for ONNX artifacts.
        gpu: whether ONNX artifacts run on a GPU.

    Raises:
        BundleError: an artifact is missing or was changed.
        InputError: Triton cannot load an artifact, or not every batch size has a profile, or a
            sidecar is missing.
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
        if artifact.precision == "bf16" and not (artifact.engine or gpu):
            raise InputError(
                f"Triton cannot load '{name}': ONNX Runtime has no BF16 convolution on CPUs.",
                "Package it with --gpu, or package another precision.",
            )
        source = artifact.made_from.name if artifact.kind == "engine" else name
        groups.setdefault(source, []).append(name)
    models = []
    for source, names in groups.items():
        network = Network(bundle, names[0])
        if len({bundle.artifact(name).kind for name in names}) > 1:
            raise UsageError(
                f"'{names[0]}' and '{names[1]}' are one network and would have one model name.",
                "Package them separately, into two --output folders.",
            )
        largest = network.max_batch
        gap = next((n for n in range(1, largest) if not network.supports_batch(n)), 0)
        if gap:
            profiles = " and ".join(map(str, network.profiles))
            make = "Build" if network.is_engine else "Export"
            raise InputError(
                f"'{names[0]}' takes batches of {profiles}, and none of {gap}: Triton sends any "
                f"size up to {largest}.",
                f"{make} it with --batch 1:{largest}:{largest}.",
            )
        if network.is_engine:
            models.append(_model_from_plans(network, served_name(bundle, source), names))
            continue
        weights = (f for f in bundle.artifact(source).files if f.endswith(".data"))
        files = {Path(file).name: (bundle.path / file, source) for file in weights}
        files["model.onnx"] = (bundle.verified_path(source), source)
        models.append(TritonModel(served_name(bundle, source), backend, network, files))
    return models


def _model_from_plans(network: Network, model_name: str, names: Sequence[str]) -> TritonModel:
    """Return the Triton model for plans of one graph; refuse plans that cannot be one model."""
    paths = [network.bundle.verified_path(name) for name in names]
    sidecars = [Sidecar.load(path) for path in paths]
    first, label = sidecars[0], " and ".join(f"'{name}'" for name in names)
    equal = ("inputs", "outputs", "profiles", "dynamic_size", "onnx_sha256", "backend_version")
    facts = [{**vars(sidecar.options), **dict(sidecar)} for sidecar in sidecars]
    different = [key for key in equal if len({str(fact[key]) for fact in facts}) > 1]
    if different:
        raise UsageError(
            f"{label} cannot be one Triton model: their sidecars differ in {', '.join(different)}.",
            "Build them together with one `van-deploy build --target`, or package one of them.",
        )
    files, capabilities = dict[str, tuple[Path, str]](), dict[str, str]()
    for path, name, sidecar in zip(paths, names, sidecars, strict=True):
        file = f"model-{len(files)}.plan" if files else "model.plan"
        files[file] = (path, name)
        for target in sidecar.targets:
            capabilities[re.sub(r"sm_(\d+)(\d)", r"\1.\2", target)] = file
    return TritonModel(model_name, "tensorrt", network, files, first, capabilities)


def preferred_batches(network: Network, *, gpu: bool = False) -> list[int]:
    """Return the preferred batch sizes of the dynamic batcher.

    These are the sizes with 90 % of the best throughput in the bundle's benchmark of the plan, or
    of the graph in ONNX Runtime; without one, the bundle's optimum and the largest size.
    """
    manifest, rates = network.bundle.manifest, dict[int, float]()
    runtime = "tensorrt" if network.is_engine else "ort-cuda" if gpu else "ort-cpu"
    contenders = {f"{runtime}/{name}" for name in (network.name, network.name.split("-")[0])}
    for row in manifest.checks.get("bench", {}).get("rows", ()):
        if row["contender"] in contenders:
            rates[row["batch"]] = max(rates.get(row["batch"], 0.0), row["images_per_s"])
    good = [n for n, rate in rates.items() if rate >= GOOD_SHARE * max(rates.values())]
    good = good or [manifest.batch.opt, network.max_batch]
    return sorted({n for n in good if 1 < n <= network.max_batch})


def model_config(
    model: TritonModel, settings: TritonSettings, *, labels: str = "", environment: str = ""
) -> dict[str, Any]:
    """Return the Triton configuration of one model.

    One instance group lists all profiles of a plan: the backend then selects a fitting profile for
    each batch; several groups would be scheduled independent of the batch size. A static profile
    (one batch size) runs as a CUDA graph.

    Args:
        model: the model.
        settings: instances, queue and versions.
        labels: file with the class names, next to the configuration; "" for none.
        environment: execution environment of the Python backend.
    """
    network, profiles = model.network, model.sidecar.profiles if model.sidecar else ()
    # A warm-up and a CUDA graph have no dynamic dimensions: a size that the plan was built for.
    sides = network.preprocessing.sides
    sizes = model.sidecar.options.dynamic_size if model.sidecar else None
    if sizes is not None and not sizes.contains(sides):
        sides = height_width(sizes.opt)
    dims = list(network.input_shape(sides))
    largest = network.max_batch
    static = [profile.max for profile in profiles if profile.min == profile.max]
    ends = {rows for profile in profiles for rows in (profile.min, profile.max)} or {1, largest}
    gpu = settings.gpu or model.backend == "tensorrt"
    kind, every_profile = "KIND_GPU" if gpu else "KIND_CPU", list(map(str, range(len(profiles))))
    model_input, *outputs = (
        {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": list(spec.shape)}
        for spec in (network.input, *network.outputs)
    )
    parameters = {"EXECUTION_ENV_PATH": environment, THREADS_KEY: str(settings.threads or "")}
    shape = {network.input.name: {"dim": dims}}
    cuda = {"graphs": True, "graph_spec": [{"batch_size": n, "input": shape} for n in static]}
    zeros = {"data_type": model_input["data_type"], "dims": dims, "zero_data": True}
    return {
        "name": model.name,
        "backend": model.backend,
        "max_batch_size": largest,
        "input": [model_input],
        "output": [
            {**output, "label_filename": labels if output["name"] in LABELLED else ""}
            for output in outputs
        ],
        "version_policy": {"specific": {"versions": [settings.model_version]}},
        "instance_group": [{"count": settings.instances, "kind": kind, "profile": every_profile}],
        "default_model_filename": FILES.get(model.backend, ""),
        "cc_model_filenames": dict(model.plans),
        "dynamic_batching": {
            "preferred_batch_size": preferred_batches(network, gpu=settings.gpu),
            "max_queue_delay_microseconds": settings.queue_delay_us,
            "default_queue_policy": {
                "max_queue_size": settings.queue_limit,
                "default_timeout_microseconds": 1000 * settings.queue_timeout_ms,
            },
        },
        **({"optimization": {"cuda": cuda}} if static else {}),
        "parameters": {key: {"string_value": v} for key, v in parameters.items() if v and not gpu},
        "model_warmup": [  # runs before the model reports that it is ready
            {"name": f"batch of {rows}", "batch_size": rows, "inputs": {model_input["name"]: zeros}}
            for rows in sorted(ends)
        ],
    }


@functools.cache
def releases() -> dict[str, Any]:
    """Return the table: ``releases`` by name, newest first, and limits of each ``onnx`` version."""
    return read_toml_file(Path(str(resources.files("van_deploy.serve") / "releases.toml")))


def check_release(release: str, model: TritonModel) -> Finding:
    """Check whether a Triton release can load a model."""
    key, title = ("tensorrt", "TensorRT") if model.sidecar else ("onnxruntime", "ONNX Runtime")
    version = releases()["releases"].get(release, {}).get(key)
    detail, outcome = f"Triton {release} has {title} {version}", None
    if model.backend == "python":
        outcome, detail = True, "the execution environment contains ONNX Runtime"
    elif version == "none":
        outcome, detail = False, f"Triton {release} was shipped without an ONNX Runtime backend"
    elif not version:
        detail = f"not checked: the {title} version of Triton {release} is not known"
    elif model.sidecar:
        built = model.sidecar.backend_version
        outcome = f"{built}.".startswith(f"{version}.")
        detail += f"; the plan needs {built}"
    elif graph := model.network.bundle.artifact(model.network.name).graph:
        opset, ir_version = releases()["onnx"].get(version.rpartition(".")[0], (0, 0))
        outcome = graph.opset <= opset and graph.ir_version <= ir_version
        detail += f"; it loads opset {opset} and IR version {ir_version} at most, the graph has "
        detail += f"opset {graph.opset} and IR version {graph.ir_version}"
    return Finding(f"{model.name}: release", outcome, detail)
