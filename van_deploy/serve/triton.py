"""A Triton model repository, with a client and manifests beside it.

Everything a configuration repeats (names, types, shapes, batch limits) is read from the
artefact or its sidecar, never typed again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from van_deploy.bundle import Bundle
from van_deploy.config import TritonSettings
from van_deploy.errors import UsageError
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.serve.templates import filled
from van_deploy.serve.triton_config import DATATYPES, LABELS_FILE, config_text, model_config
from van_deploy.serve.triton_environment import environment_name, write_environment
from van_deploy.serve.triton_model import TritonModel
from van_deploy.serve.triton_release import Release

__all__ = ["preferred_batches", "write_repository"]

GOOD_SHARE = 0.9  # of the best throughput: a batch size worth waiting for
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BASE_MIB, PROCESS_MIB = 2048, 512  # of memory: Triton itself, and each process of a Python model
VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


def preferred_batches(bundle: Bundle, artefact: str, max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes worth waiting for.

    Those that reached 90 % of the best throughput in the bundle's benchmark; without
    one, the optimum the bundle was made for and the largest.
    """
    plain, rates = artefact.split("-")[0], dict[int, float]()
    for row in bundle.manifest.checks.get("bench", {}).get("rows", ()):
        if plain in str(row["contender"]).replace("/", " ").split():
            batch = int(row["batch"])
            rates[batch] = max(rates.get(batch, 0.0), float(row["images_per_s"]))
    good = [b for b, rate in rates.items() if rate >= GOOD_SHARE * max(rates.values())]
    good = good or [bundle.manifest.batch.opt, max_batch]
    return tuple(sorted({b for b in good if 1 < b <= max_batch}))


def write_repository(
    made: Path,
    bundle: Bundle,
    models: Sequence[TritonModel],
    settings: TritonSettings,
    release: Release,
) -> dict[str, str]:
    """Write ``models/``, the manifests and a client; return the packages of an environment.

    Args:
        made: folder to write; not there yet.
        bundle: where the models come from.
        models: likewise.
        settings: how they are to be run.
        release: of Triton.

    Raises:
        ConversionError: the packages of an execution environment cannot be had.
        MissingDependency: Triton's schema is not installed.
        UsageError: nobody knows the release's Python.
    """
    packages: dict[str, str] = {}
    environment = ""
    if any(model.backend == "python" for model in models):
        python = settings.triton_python or release.python
        if not python:
            raise UsageError(
                f"No table here says which Python Triton {release.name} has.",
                "Name it with --triton-python, such as 3.12.",
            )
        environment = environment_name(python)
        (made / "models").mkdir(parents=True)
        version = require_onnxruntime().__version__
        packages = write_environment(made / "models" / environment, python, version)
    for model in models:
        _write_model(made / "models" / model.name, bundle, model, settings, environment)
    _write_manifests(made, bundle, models, settings, release)
    if any(spec.name == "logits" for spec in models[0].outputs):
        (made / "client.py").write_text(_client(bundle, models[0]), encoding="utf-8")
    return packages


def _write_model(
    folder: Path, bundle: Bundle, model: TritonModel, settings: TritonSettings, environment: str
) -> None:
    version, names = folder / str(settings.model_version), bundle.manifest.class_names
    version.mkdir(parents=True)
    for file, (source, _) in model.files.items():
        shutil.copyfile(source, version / file)
    if model.backend == "python":
        (version / "model.py").write_text(filled("model.py.txt", {}), encoding="utf-8")
        environment = f"$$TRITON_MODEL_DIRECTORY/../{environment}"
    if names:
        (folder / LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
    artefact = next(iter(model.files.values()))[1]
    config = model_config(
        model,
        settings,
        preferred=preferred_batches(bundle, artefact, model.max_batch),
        labels=LABELS_FILE if names else "",
        environment=environment if model.backend == "python" else "",
    )
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _write_manifests(
    made: Path,
    bundle: Bundle,
    models: Sequence[TritonModel],
    settings: TritonSettings,
    release: Release,
) -> None:
    weights = sum(path.stat().st_size for model in models for path, _ in model.files.values())
    processes = settings.instances * sum(model.backend == "python" for model in models)
    gpu = settings.gpu or any(model.sidecar for model in models)
    compatible = any(m.sidecar and m.sidecar.build_options.version_compatible for m in models)
    memory = BASE_MIB + PROCESS_MIB * processes + 4 * settings.instances * (weights >> 20)
    values = {
        "name": re.sub(r"[^a-z0-9]+", "-", bundle.name.lower()).strip("-")[:50] or "van",
        "release": release.name,
        "cpus": settings.threads * settings.instances * len(models) or 2,
        "memory_mib": memory,
        "max_batch": max(model.max_batch for model in models),
        "extra": VERSION_COMPATIBLE,
    }
    holds = ["gpu" if gpu else "cpu", *["extra"] * compatible]
    for name in ("compose.yaml", "kubernetes.yaml", "kserve.yaml"):
        (made / name).write_text(filled(name, values, holds), encoding="utf-8")


def _client(bundle: Bundle, model: TritonModel) -> str:
    """Return the example client: one file that needs nothing of this project.

    It is the one place where a client's preprocessing is written down for others to copy,
    so it holds the weights' own values and is tested to compute the same bytes as
    :mod:`van_deploy.model.pixels`.
    """
    preprocessing = bundle.manifest.preprocessing
    values: dict[str, object] = {
        "model": json.dumps(model.name),
        "size": preprocessing.image_size,
        "short_side": preprocessing.resize_size,
        "filter": preprocessing.interpolation.upper(),
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "mode": MODES.get(preprocessing.channels, "RGB"),
        "input": json.dumps(model.input.name),
        "datatype": DATATYPES[model.input.dtype],
    }
    return filled("client.py.txt", values, [model.embedding, "softmax"])
