"""A Triton model repository from a bundle.

Everything a configuration repeats (names, types, shapes, batch limits) is read
from the artefact or its sidecar, never typed again; :mod:`van_deploy.serve.triton_check`
proves afterwards that the two agree.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.config import TritonSettings
from van_deploy.engine.sidecar import verified_sidecar
from van_deploy.errors import BundleError, InputError, UsageError
from van_deploy.files import file_sha256
from van_deploy.runners.network import (
    Network,
    TensorSpec,
    embedding_of,
    runnable_artefacts,
    task_of,
)
from van_deploy.serve.client_source import client_source
from van_deploy.serve.manifests import Deployment, manifests
from van_deploy.serve.protocol import DATATYPES
from van_deploy.serve.service import served_name
from van_deploy.serve.triton_config import PLATFORMS, model_config, pbtxt

__all__ = [
    "PACKAGE_FILE",
    "Package",
    "TritonModel",
    "package_triton",
    "preferred_batches",
    "triton_models",
]

PACKAGE_FILE = "package.json"
PACKAGE_SCHEMA = "van-deploy/triton/1"
LABELS_FILE = "labels.txt"
GOOD_SHARE = 0.9  # of the best throughput: a batch size worth waiting for
ENGINE_TYPES = {
    "float": "float32",
    "half": "float16",
    "uint8": "uint8",
    "int64": "int64",
}


@dataclass(frozen=True)
class TritonModel:
    """One artefact as Triton has to see it.

    Attributes:
        name: of the model.
        artefact: its name in the bundle.
        kind: ``onnx`` or ``engine``.
        path: the file to open.
        files: every file that goes with it, by the name it gets in the repository.
        input: what it takes.
        outputs: what it gives.
        max_batch: what it was built or checked for.
        embedding: what preprocessing it has inside.
        backend_version: of the TensorRT that built a plan; "" for ONNX.
    """

    name: str
    artefact: str
    kind: str
    path: Path
    files: dict[str, Path]
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    embedding: str
    backend_version: str = ""


@dataclass(frozen=True)
class Package:
    """A model repository that was written.

    Attributes:
        path: its folder.
        models: what is in it.
        files: every file, relative to ``path``.
    """

    path: Path
    models: tuple[TritonModel, ...]
    files: tuple[str, ...]


def triton_models(bundle: Bundle, artefacts: Sequence[str] = ()) -> tuple[TritonModel, ...]:
    """Return the artefacts of a bundle as Triton models, every digest checked.

    Args:
        bundle: where they are.
        artefacts: which; by default ``fp32-uint8`` where the bundle has it, else ``fp32``.

    Raises:
        BundleError: an artefact is missing or was changed.
        InputError: Triton cannot load it.
    """
    if not artefacts:
        here = runnable_artefacts(bundle)
        artefacts = ("fp32-uint8" if "fp32-uint8" in here else "fp32",)
    return tuple(
        _engine_model(bundle, name)
        if bundle.artefact(name).kind == "engine"
        else _onnx_model(bundle, name)
        for name in dict.fromkeys(artefacts)
    )


def preferred_batches(bundle: Bundle, artefact: str, max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes worth waiting for.

    Those that reached 90 % of the best throughput in the bundle's benchmark; without
    one, the optimum the bundle was made for and the largest.
    """
    bench = bundle.manifest.checks.get("bench", {})
    plain = artefact.split("-")[0]
    rates: dict[int, float] = {}
    for row in bench.get("rows", ()):
        if plain in str(row["contender"]).replace("/", " ").split():
            batch = int(row["batch"])
            rates[batch] = max(rates.get(batch, 0.0), float(row["images_per_s"]))
    if rates:
        good = [b for b, rate in rates.items() if rate >= GOOD_SHARE * max(rates.values())]
    else:
        good = [bundle.manifest.batch.opt, max_batch]
    return tuple(sorted({b for b in good if 1 < b <= max_batch}))


def package_triton(
    bundle: Bundle,
    output: Path,
    artefacts: Sequence[str] = (),
    settings: TritonSettings | None = None,
) -> Package:
    """Return a Triton model repository in ``output``, with a client and manifests beside it.

    The folder appears whole; an older package there is replaced, anything else is refused.

    Raises:
        BundleError: an artefact is missing or was changed.
        InputError: Triton cannot load an artefact.
        UsageError: ``output`` holds something else.
    """
    settings = settings or TritonSettings()
    models = triton_models(bundle, artefacts)
    _require_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        made = workshop / "package"
        for model in models:
            _write_model(made / "models" / model.name, bundle, model, settings)
        _write_beside(made, bundle, models, settings)
        files = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
        _write_record(made, bundle, models, settings, files)
        if output.exists():
            os.replace(output, workshop / "old")
        os.replace(made, output)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return Package(output, models, (*files, PACKAGE_FILE))


def _onnx_model(bundle: Bundle, name: str) -> TritonModel:
    artefact = bundle.artefact(name)
    path = bundle.verified(name)
    network = Network(bundle, name)
    beside = {Path(f).name: bundle.path / f for f in artefact.files if f.endswith(".data")}
    return TritonModel(
        name=served_name(bundle, name),
        artefact=name,
        kind="onnx",
        path=path,
        files={PLATFORMS["onnx"][1]: path, **beside},
        input=network.input,
        outputs=network.outputs,
        max_batch=network.max_batch,
        embedding=embedding_of(artefact),
    )


def _engine_model(bundle: Bundle, name: str) -> TritonModel:
    path = bundle.verified(name)
    sidecar = verified_sidecar(path)
    if sidecar.backend != "tensorrt":
        raise InputError(
            f"Triton's TensorRT back end cannot load '{name}': it was built by "
            f"{sidecar.backend} {sidecar.backend_version}.",
            "Build a plan with `tensorrt` on a machine with the target GPU, or package the "
            "ONNX artefact.",
        )
    (given,) = sidecar.inputs
    source = bundle.artefacts.get(bundle.artefact(name).made_from.name)
    return TritonModel(
        name=served_name(bundle, name),
        artefact=name,
        kind="engine",
        path=path,
        files={PLATFORMS["engine"][1]: path},
        input=_spec(given),
        outputs=tuple(_spec(tensor) for tensor in sidecar.outputs),
        max_batch=max(profile.max for profile in sidecar.profiles),
        embedding=embedding_of(source) if source else "none",
        backend_version=sidecar.backend_version,
    )


def _spec(tensor: Any) -> TensorSpec:
    if tensor.dtype not in ENGINE_TYPES:
        raise InputError(
            f"The engine's '{tensor.name}' is of type {tensor.dtype}, which no client here sends.",
            f"Known: {', '.join(ENGINE_TYPES)}.",
        )
    return TensorSpec(tensor.name, ENGINE_TYPES[tensor.dtype], tuple(tensor.shape[1:]))


def _write_model(
    folder: Path, bundle: Bundle, model: TritonModel, settings: TritonSettings
) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    for name, source in model.files.items():
        shutil.copyfile(source, version / name)
    names = bundle.manifest.class_names
    if names:
        (folder / LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
    config = model_config(
        model.name,
        model.kind,
        model.input,
        model.outputs,
        model.max_batch,
        preferred=preferred_batches(bundle, model.artefact, model.max_batch),
        queue_delay_us=settings.queue_delay_us,
        queue_limit=settings.queue_limit,
        queue_timeout_us=1000 * settings.queue_timeout_ms,
        instances=settings.instances,
        gpu=settings.gpu or model.kind == "engine",
        labels_file=LABELS_FILE if names else "",
    )
    (folder / "config.pbtxt").write_text(pbtxt(config), encoding="utf-8")


def _write_beside(
    made: Path, bundle: Bundle, models: Sequence[TritonModel], settings: TritonSettings
) -> None:
    first = models[0]
    preprocessing = bundle.manifest.preprocessing
    if any(spec.name == "logits" for spec in first.outputs):
        source = client_source(
            first.name,
            first.input.name,
            DATATYPES[first.input.dtype],
            first.embedding,
            preprocessing,
            task_of(bundle),
        )
        (made / "client.py").write_text(source, encoding="utf-8")
    gpu = settings.gpu or any(model.kind == "engine" for model in models)
    weights = sum(path.stat().st_size for model in models for path in model.files.values())
    deployment = Deployment(
        name=bundle.name,
        gpu=gpu,
        memory_mib=2048 + 4 * settings.instances * (weights >> 20),
        triton=settings.triton,
    )
    for name, text in manifests(deployment).items():
        (made / name).write_text(text, encoding="utf-8")


def _write_record(
    made: Path,
    bundle: Bundle,
    models: Sequence[TritonModel],
    settings: TritonSettings,
    files: Sequence[str],
) -> None:
    record = {
        "schema": PACKAGE_SCHEMA,
        "bundle": bundle.name,
        "models": {
            model.name: {
                "artefact": model.artefact,
                "kind": model.kind,
                "sha256": file_sha256(model.path),
                "tensorrt": model.backend_version or None,
            }
            for model in models
        },
        "settings": settings.as_dict(),
        "files": {name: file_sha256(made / name) for name in files},
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (made / PACKAGE_FILE).write_text(text, encoding="utf-8")


def _require_ours(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"'{output}' is a file, not a folder.", "Choose another --output DIR.")
    if any(output.iterdir()) and not (output / PACKAGE_FILE).is_file():
        raise UsageError(
            f"'{output}' holds something else and no package.",
            "Nothing was written. Choose an empty or a new folder with --output DIR.",
        )
    if (output / "manifest.json").exists():
        raise BundleError(
            f"'{output}' is a bundle.", "Nothing was written. Choose another --output DIR."
        )
