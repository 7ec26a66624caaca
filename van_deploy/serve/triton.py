"""A Triton model repository from a bundle, with a client and manifests beside it.

Everything a configuration repeats (names, types, shapes, batch limits) is read from the
artefact or its sidecar, never typed again; :mod:`van_deploy.serve.triton_check` compares
what was written with the files themselves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.errors import UsageError
from van_deploy.files import file_sha256
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.schema import Schema
from van_deploy.serve.templates import filled
from van_deploy.serve.triton_config import DATATYPES, LABELS_FILE, config_text, model_config
from van_deploy.serve.triton_environment import environment_name, write_environment
from van_deploy.serve.triton_model import (
    TritonModel,
    TritonSettings,
    triton_models,
    usual_artefacts,
)
from van_deploy.serve.triton_release import Release, chosen_release

__all__ = ["PACKAGE_FILE", "Package", "PackageRecord", "package_triton", "preferred_batches"]

PACKAGE_FILE = "package.json"
PACKAGE_FORMAT = "van-deploy/triton/2"
GOOD_SHARE = 0.9  # of the best throughput: a batch size worth waiting for
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BASE_MIB, PROCESS_MIB = 2048, 512  # of memory: Triton itself, and each process of a Python model
VERSION_COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


class PackageRecord(Schema):
    """``package.json``: what a package holds and where it came from."""

    format: str
    bundle: str
    release: str
    environment: dict[str, str]
    """Packages of the Python backend's execution environment, and their versions."""
    settings: dict[str, Any]
    models: dict[str, dict[str, str]]
    """Of each model, the artefact behind each file of its version."""
    files: dict[str, str]
    """SHA-256 of every file, by its path in the package."""


@dataclass(frozen=True)
class Package:
    """A model repository that was written.

    Attributes:
        path: its folder.
        models: what is in it.
        release: of Triton, which its manifests name.
        files: every file, relative to ``path``.
    """

    path: Path
    models: tuple[TritonModel, ...]
    release: Release
    files: tuple[str, ...]


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
    good = [b for b, rate in rates.items() if rate >= GOOD_SHARE * max(rates.values())]
    good = good or [bundle.manifest.batch.opt, max_batch]
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
        ConversionError: the packages of an execution environment cannot be had.
        InputError: Triton cannot load an artefact.
        MissingDependency: Triton's schema is not installed.
        UsageError: ``output`` holds something else, or the release cannot load a model.
    """
    settings = settings or TritonSettings()
    if settings.gpu and settings.backend == "python":
        raise UsageError(
            "The Python backend's execution environment holds ONNX Runtime for processors.",
            "Leave out --gpu, or take --backend onnxruntime.",
        )
    models = triton_models(bundle, artefacts or usual_artefacts(bundle), settings.backend)
    release = chosen_release(models, settings.release)
    python = settings.python or release.python
    if settings.backend == "python" and not python:
        raise UsageError(
            f"No table here says which Python Triton {release.name} has.",
            "Name it with --triton-python, such as 3.12.",
        )
    _require_ours(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        made = Path(folder) / "package"
        for model in models:
            _write_model(made / "models" / model.name, bundle, model, settings, python)
        packages: dict[str, str] = {}
        if any(model.backend == "python" for model in models):
            archive = made / "models" / environment_name(python)
            packages = write_environment(archive, python, require_onnxruntime().__version__)
        _write_beside(made, bundle, models, settings, release)
        files = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file())
        record = PackageRecord(
            format=PACKAGE_FORMAT,
            bundle=bundle.name,
            release=release.name,
            environment=packages,
            settings=asdict(settings),
            models={m.name: {file: name for file, (_, name) in m.files.items()} for m in models},
            files={name: file_sha256(made / name) for name in files},
        )
        text = json.dumps(record.model_dump(), indent=2, ensure_ascii=False)
        (made / PACKAGE_FILE).write_text(f"{text}\n", encoding="utf-8")
        if output.exists():
            os.replace(output, Path(folder) / "old")
        os.replace(made, output)
    return Package(output, models, release, (*files, PACKAGE_FILE))


def _write_model(
    folder: Path, bundle: Bundle, model: TritonModel, settings: TritonSettings, python: str
) -> None:
    version = folder / str(settings.version)
    version.mkdir(parents=True)
    for file, (source, _) in model.files.items():
        shutil.copyfile(source, version / file)
    environment = ""
    if model.backend == "python":
        (version / "model.py").write_text(filled("model.py.txt", {}), encoding="utf-8")
        environment = f"$$TRITON_MODEL_DIRECTORY/../{environment_name(python)}"
    names = bundle.manifest.class_names
    if names:
        (folder / LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
    artefact = next(iter(model.files.values()))[1]
    config = model_config(
        model,
        settings,
        preferred=preferred_batches(bundle, artefact, model.max_batch),
        labels=LABELS_FILE if names else "",
        environment=environment,
    )
    (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")


def _write_beside(
    made: Path,
    bundle: Bundle,
    models: Sequence[TritonModel],
    settings: TritonSettings,
    release: Release,
) -> None:
    """Write the manifests, and a client where the first model gives logits."""
    weights = sum(path.stat().st_size for model in models for path, _ in model.files.values())
    processes = settings.instances * sum(model.backend == "python" for model in models)
    memory = BASE_MIB + PROCESS_MIB * processes + 4 * settings.instances * (weights >> 20)
    gpu = settings.gpu or any(model.sidecar for model in models)
    compatible = any(m.sidecar and m.sidecar.build_options.version_compatible for m in models)
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
    if any(spec.name == "logits" for spec in models[0].outputs):
        (made / "client.py").write_text(_client(bundle, models[0]), encoding="utf-8")


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


def _require_ours(output: Path) -> None:
    """Refuse to replace anything but an older package."""
    if output.is_file():
        raise UsageError(f"'{output}' is a file, not a folder.", "Choose another --output DIR.")
    if output.is_dir() and any(output.iterdir()) and not (output / PACKAGE_FILE).is_file():
        raise UsageError(
            f"'{output}' holds something else and no package.",
            "Nothing was written. Choose an empty or a new folder with --output DIR.",
        )
