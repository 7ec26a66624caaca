"""A bundle packaged for Triton, and whether a package is still what was written.

A package is a model repository, with a client and manifests beside it. Everything a configuration
repeats (names, types, shapes, batch limits) is read from the artifact or its sidecar, never typed
again. The manifests, the client and ``model.py`` are files of ``templates/``, filled in.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal

from pydantic import Field

from van_deploy.bundle import Bundle
from van_deploy.config import PackageSettings
from van_deploy.documents import Verdict
from van_deploy.errors import ConversionError, InputError, UsageError, require_extra
from van_deploy.files import file_sha256
from van_deploy.metrics import Task
from van_deploy.model.preprocess import image_mode
from van_deploy.runners.onnxruntime import require_onnxruntime
from van_deploy.schema import VersionedSchema, read_document
from van_deploy.serve import triton
from van_deploy.serve.triton import Finding, TritonModel

PACKAGE_FILE = "package.json"
AGAIN = "Package the bundle again."
MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/"
BASE_MIB, PROCESS_MIB = 2048, 512  # of memory: Triton itself, and each process of a Python model
ODDS = {Task.SINGLE_LABEL: "softmax", Task.REGRESSION: "plain"}
INTERPRETER = "/usr/bin/python3"  # in NVIDIA's images, which are Ubuntu
NUMPY = "numpy<2"  # as in NVIDIA's images up to 26.07: Triton 2.51 sends tensors of NumPy 2 empty
GLIBC_MINORS = (31, 28, 27, 24, 17)  # 2.31 is that of Ubuntu 20.04, the oldest image known here


class PackageRecord(VersionedSchema):
    """``package.json``: what a package holds and where it came from.

    Attributes:
        bundle: the model's name.
        artifacts: of the bundle, and their digests in it.
        files: SHA-256 of every file, by its path in the package.
    """

    schema_: Literal["van-deploy/triton/4"] = Field(alias="schema")
    bundle: str
    artifacts: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class PackageReport(Verdict):
    """A package that was written, or only checked.

    Attributes:
        path: the folder.
        files: how many were written.
        findings: what was found on reading it again.
    """

    path: Path
    files: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.outcome is not False for finding in self.findings)


def package(
    bundle: Bundle, output: Path | None, settings: PackageSettings, only_check: bool
) -> PackageReport:
    """Return the package of a bundle, written and checked, or only checked.

    The folder appears whole; an older package there is replaced, anything else is refused.

    Raises:
        BundleError: an artifact is missing or was changed.
        ConversionError: the packages of an execution environment cannot be had.
        InputError: Triton cannot load an artifact, or there is no package to check.
        MissingDependency: Triton's schema is not installed.
        UsageError: ``output`` holds something else, or the release cannot load a model, or is
            none.
    """
    folder = output or bundle.path.with_name(f"{bundle.path.resolve().name}-triton")
    if only_check:
        return check_package(folder, bundle)
    artifacts = settings.artifacts or triton.usual_artifacts(bundle)
    models = triton.models_of(bundle, artifacts, settings.backend)
    release, loading = _chosen_release(models, settings.triton_release)
    used = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if used and not (folder / PACKAGE_FILE).is_file():
        raise UsageError(
            f"'{folder}' holds something else and no package.",
            "Nothing was written. Choose an empty or a new folder with --output DIR.",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workshop:
        made = Path(workshop) / "package"
        _write_repository(made, models, settings, release)
        record = PackageRecord(
            schema="van-deploy/triton/4",
            bundle=bundle.name,
            artifacts={n: bundle.artifact(n).sha256 for m in models for _, n in m.files.values()},
            files=_digests(made),
        )
        (made / PACKAGE_FILE).write_text(record.text(), encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(workshop) / "old")
        os.replace(made, folder)
    findings = (*check_package(folder, bundle).findings, *loading)
    return PackageReport(folder, len(record.files) + 1, findings)


def _chosen_release(models: Sequence[TritonModel], asked: str) -> tuple[str, list[Finding]]:
    """Return the release that was asked for, or the newest that is known to load every model."""
    refused, good = "", {True, None} if asked else {True}
    for release in [asked] if asked else triton.releases()["releases"]:
        found = {model.name: triton.loads(release, model) for model in models}
        wrong = [(name, one.detail) for name, one in found.items() if one.outcome not in good]
        if not wrong:
            return str(release), list(found.values())
        name, why = wrong[0]
        refused = refused or f"Triton {release} is not known to load '{name}': {why}."
    raise UsageError(
        refused,
        f"Choose another --triton-release (NVIDIA lists what each has: {MATRIX}), or take "
        "--backend python, which brings its own ONNX Runtime.",
    )


def check_package(path: Path, bundle: Bundle) -> PackageReport:
    """Return whether the files in ``path`` are those that were written, and the bundle's still.

    Raises:
        InputError: there is no package, or it is another bundle's.
    """
    record = read_document(PackageRecord, path / PACKAGE_FILE, "package record", InputError, AGAIN)
    if record.bundle != bundle.name:
        raise InputError(f"'{path}' was made from '{record.bundle}', not '{bundle.name}'.", AGAIN)
    found = _digests(path)
    del found[PACKAGE_FILE]
    wrong = sorted({file for file, _ in record.files.items() ^ found.items()})
    text = f"{', '.join(wrong)}: missing, changed or added" if wrong else "as they were written"
    findings = [Finding("files", not wrong, text)]
    now = {name: entry.sha256 for name, entry in bundle.artifacts.items()}
    for name, digest in record.artifacts.items():
        old = now.get(name) != digest
        text = "made anew in the bundle since" if old else "the bundle's"
        findings.append(Finding(f"artifact {name}", not old, text))
    return PackageReport(path, 0, tuple(findings))


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def _write_repository(
    made: Path, models: Sequence[TritonModel], settings: PackageSettings, release: str
) -> None:
    """Write ``models/``, the manifests and a client into a folder that is not there yet."""
    with require_extra("Triton's schema of config.pbtxt", "triton"):
        from tritonclient.grpc import model_config_pb2
    from google.protobuf import json_format, text_format

    network, entry = models[0].network, triton.releases()["releases"].get(release, {})
    python = settings.triton_python or entry.get("python", "")
    archive, names = f"environment-python{python}.tar.gz", network.bundle.manifest.class_names
    if settings.backend == "python" and not python:
        unknown = f"No table here says which Python Triton {release} has."
        raise UsageError(unknown, "Name it with --triton-python, such as 3.12.")
    for model in models:
        folder, in_python = made / "models" / model.name, model.backend == "python"
        version = folder / str(settings.model_version)
        version.mkdir(parents=True)
        for file, (source, _) in model.files.items():
            shutil.copyfile(source, version / file)
        if names:
            (folder / triton.LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
        if in_python:
            (version / "model.py").write_text(filled("model.py.txt", {}), encoding="utf-8")
            if not (made / "models" / archive).exists():
                write_environment(made / "models" / archive, python)
        environment = f"$$TRITON_MODEL_DIRECTORY/../{archive}" if in_python else ""
        labels = triton.LABELS_FILE if names else ""
        config = triton.model_config(model, settings, labels=labels, environment=environment)
        message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
        (folder / "config.pbtxt").write_text(text_format.MessageToString(message), "utf-8")
    weights = sum(path.stat().st_size for model in models for path, _ in model.files.values())
    processes = settings.instances * sum(model.backend == "python" for model in models)
    plans = [model.sidecar.options for model in models if model.sidecar]
    name = re.sub(r"[^a-z0-9]+", "-", network.bundle.name.lower()).strip("-")[:50]
    values = {
        "name": name or "van",
        "release": release,
        "cpus": settings.threads * settings.instances * len(models) or 2,
        "memory": BASE_MIB + PROCESS_MIB * processes + 4 * settings.instances * (weights >> 20),
        "max_batch": max(model.network.max_batch for model in models),
    }
    compatible = any(options.version_compatible for options in plans)
    holds = ["gpu" if settings.gpu or plans else "cpu", *["compatible"] * compatible]
    for file in ("compose.yaml", "kubernetes.yaml", "kserve.yaml"):
        (made / file).write_text(filled(file, values, holds), encoding="utf-8")
    if network.preprocessing.channels in {1, 3, 4} and network.outputs[0].name == "logits":
        (made / "client.py").write_text(client_of(models[0]), encoding="utf-8")


def client_of(model: TritonModel) -> str:
    """Return the example client: one file that needs nothing of this project.

    It is the one place where a client's preprocessing is written down for others to copy,
    so it holds the weights' own values and is tested to compute the same bytes as
    :mod:`van_deploy.model.preprocess`.
    """
    network, preprocessing = model.network, model.network.preprocessing
    values = {
        **asdict(preprocessing),
        "filter": preprocessing.interpolation.upper(),
        "mode": image_mode(preprocessing.channels),
        "model": json.dumps(model.name),
        "input": json.dumps(network.input.name),
        "datatype": triton.DATATYPES[network.input.dtype],
    }
    odds = ODDS.get(network.task, "sigmoid")
    holds = [network.embedding, odds, preprocessing.crop_mode, preprocessing.crop_rounding]
    return filled("client.py.txt", values, holds)


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
                "Check the connection, or choose a --triton-release whose Python has such a wheel.",
            )
        shutil.rmtree(packages / "bin", ignore_errors=True)  # scripts that name this interpreter
        (root / "bin").mkdir()
        (root / "bin/python3").symlink_to(INTERPRETER)
        for name, target in (("activate.txt", "bin/activate"), ("pyvenv.cfg", "pyvenv.cfg")):
            (root / target).write_text(filled(name, {}), encoding="utf-8")
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(root, ".", filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an entry of an archive without what differs from one run or machine to the next."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
