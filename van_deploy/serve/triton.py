"""A Triton model repository, with a client and manifests beside it.

Everything a configuration repeats (names, types, shapes, batch limits) is read from the
artefact or its sidecar, never typed again. The manifests, the client and ``model.py`` are
files of ``templates/``, filled in.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template

from van_deploy.config import TritonSettings
from van_deploy.errors import ConversionError, UsageError
from van_deploy.metrics import Task
from van_deploy.model.pixels import image_mode
from van_deploy.runners.network import Network
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.serve.triton_model import (
    DATATYPES,
    LABELS_FILE,
    TritonModel,
    config_text,
    model_config,
)
from van_deploy.serve.triton_release import Release

GOOD_SHARE = 0.9  # of the best throughput: a batch size worth waiting for
BASE_MIB, PROCESS_MIB = 2048, 512  # of memory: Triton itself, and each process of a Python model
ODDS = {Task.SINGLE_LABEL: "softmax", Task.REGRESSION: "plain"}
INTERPRETER = "/usr/bin/python3"  # in NVIDIA's images, which are Ubuntu
NUMPY = "numpy<2"  # as in NVIDIA's images up to 26.07: Triton 2.51 sends tensors of NumPy 2 empty
GLIBC_MINORS = (31, 28, 27, 24, 17)  # 2.31 is that of Ubuntu 20.04, the oldest image known here


def preferred_batches(network: Network) -> tuple[int, ...]:
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
    return tuple(sorted({n for n in good if 1 < n <= network.max_batch}))


def write_repository(
    made: Path, models: Sequence[TritonModel], settings: TritonSettings, release: Release
) -> None:
    """Write ``models/``, the manifests and a client.

    Args:
        made: folder to write; not there yet.
        models: of one bundle.
        settings: how they are to be run.
        release: of Triton.

    Raises:
        ConversionError: the packages of an execution environment cannot be had.
        MissingDependency: Triton's schema is not installed.
        UsageError: nobody knows the release's Python.
    """
    network, python = models[0].network, settings.triton_python or release.python
    archive, names = f"environment-python{python}.tar.gz", network.bundle.manifest.class_names
    if settings.backend == "python" and not python:
        raise UsageError(
            f"No table here says which Python Triton {release.name} has.",
            "Name it with --triton-python, such as 3.12.",
        )
    for model in models:
        folder, in_python = made / "models" / model.name, model.backend == "python"
        version = folder / str(settings.model_version)
        version.mkdir(parents=True)
        for file, (source, _) in model.files.items():
            shutil.copyfile(source, version / file)
        if names:
            (folder / LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
        if in_python:
            (version / "model.py").write_text(filled("model.py.txt", {}), encoding="utf-8")
            if not (made / "models" / archive).exists():
                write_environment(made / "models" / archive, python)
        config = model_config(
            *(model, settings),
            preferred=preferred_batches(model.network),
            labels=LABELS_FILE if names else "",
            environment=f"$$TRITON_MODEL_DIRECTORY/../{archive}" if in_python else "",
        )
        (folder / "config.pbtxt").write_text(config_text(config), encoding="utf-8")
    values, holds = _deployment(models, settings, release)
    for name in ("compose.yaml", "kubernetes.yaml", "kserve.yaml"):
        (made / name).write_text(filled(name, values, holds), encoding="utf-8")
    if network.preprocessing.channels in {1, 3, 4} and network.outputs[0].name == "logits":
        (made / "client.py").write_text(_client(models[0]), encoding="utf-8")


def write_environment(archive: Path, python: str) -> None:
    """Write an execution environment of the Python backend: this ONNX Runtime, for its Python.

    NVIDIA's images have no ONNX Runtime for Python. The archive is a virtual environment with
    one, which Triton unpacks; the interpreter stays the image's own.

    Args:
        archive: file to write, ``.tar.gz``.
        python: version of the server's Python, such as ``3.12``.

    Raises:
        ConversionError: pip cannot get the packages.
    """
    wanted = (f"onnxruntime=={require_onnxruntime().__version__}", NUMPY)
    with tempfile.TemporaryDirectory(prefix="van-deploy-") as folder:
        root, machine = Path(folder), platform.machine()
        packages = root / f"lib/python{python}/site-packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", *wanted]
        command += ["--target", str(packages), "--only-binary=:all:", "--python-version", python]
        for tag in (*(f"manylinux_2_{minor}" for minor in GLIBC_MINORS), "manylinux2014"):
            command += ["--platform", f"{tag}_{machine}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise ConversionError(
                f"pip cannot get {' and '.join(wanted)} for Python {python}: "
                f"{(said or [done.stderr])[-1]}",
                "Check the connection to the package index, or choose a --triton-release whose "
                "Python has such a wheel.",
            )
        shutil.rmtree(packages / "bin", ignore_errors=True)  # scripts that name this interpreter
        (root / "bin").mkdir()
        (root / "bin/python3").symlink_to(INTERPRETER)
        for name, target in (("activate.txt", "bin/activate"), ("pyvenv.cfg", "pyvenv.cfg")):
            (root / target).write_text(filled(name, {}), encoding="utf-8")
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(root, ".", filter=_anonymous)


def filled(template: str, values: Mapping[str, object], holds: Collection[str] = ()) -> str:
    """Return a file of ``templates/`` with its values in place.

    A line that ends in ``#if WORD...`` is kept where one of the words holds; the mark itself
    always goes. ``$name`` stands for a value, as in :class:`string.Template`.

    Args:
        template: its name, such as ``compose.yaml``.
        values: by the name after ``$``.
        holds: the words whose lines are kept.
    """
    lines = []
    folder = resources.files("van_deploy.serve") / "templates"
    for line in (folder / template).read_text("utf-8").splitlines():
        text, marked, words = line.partition("#if ")
        if not marked or set(words.split()) & set(holds):
            lines.append(text.rstrip() if marked else line)
    return Template("\n".join(lines) + "\n").substitute(values)


def _deployment(
    models: Sequence[TritonModel], settings: TritonSettings, release: Release
) -> tuple[dict[str, object], list[str]]:
    """Return what the manifests' templates are filled with."""
    weights = sum(path.stat().st_size for model in models for path, _ in model.files.values())
    processes = settings.instances * sum(model.backend == "python" for model in models)
    name = models[0].network.bundle.name.lower()
    plans = [model.sidecar.options for model in models if model.sidecar]
    values = {
        "name": re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:50] or "van",
        "release": release.name,
        "cpus": settings.threads * settings.instances * len(models) or 2,
        "memory": BASE_MIB + PROCESS_MIB * processes + 4 * settings.instances * (weights >> 20),
        "max_batch": max(model.network.max_batch for model in models),
    }
    compatible = any(options.version_compatible for options in plans)
    return values, ["gpu" if settings.gpu or plans else "cpu", *["compatible"] * compatible]


def _client(model: TritonModel) -> str:
    """Return the example client: one file that needs nothing of this project.

    It is the one place where a client's preprocessing is written down for others to copy,
    so it holds the weights' own values and is tested to compute the same bytes as
    :mod:`van_deploy.model.pixels`.
    """
    network, preprocessing = model.network, model.network.preprocessing
    values = {
        **asdict(preprocessing),
        "filter": preprocessing.interpolation.upper(),
        "mode": image_mode(preprocessing.channels),
        "model": json.dumps(model.name),
        "input": json.dumps(network.input.name),
        "datatype": DATATYPES[network.input.dtype],
    }
    odds = ODDS.get(network.task, "sigmoid")
    holds = [network.embedding, odds, preprocessing.crop_mode, preprocessing.crop_rounding]
    return filled("client.py.txt", values, holds)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry of an archive without what differs from one run or machine to the next."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
