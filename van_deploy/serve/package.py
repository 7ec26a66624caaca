"""Packages for Triton Inference Server: writing them, and checking them later.

A package is a model repository with a client and deployment manifests. Everything that a
configuration repeats (names, types, shapes, batch limits) is read from the artifact or its
sidecar. The manifests, the client and ``model.py`` are rendered from the files in ``templates/``.
"""

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
from van_deploy.config import BatchRange, PackageSettings
from van_deploy.config.sizes import height_width
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
BASE_MIB, PROCESS_MIB = 2048, 512  # memory of Triton itself, and of each Python model's process
ACTIVATIONS = {Task.SINGLE_LABEL: "softmax", Task.REGRESSION: "plain"}
INTERPRETER = "/usr/bin/python3"  # in NVIDIA's images, which are Ubuntu
NUMPY = "numpy<2"  # as in NVIDIA's images up to 26.07: Triton 2.51 sends tensors of NumPy 2 empty
GLIBC_MINORS = (31, 28, 27, 24, 17)  # 2.31: Ubuntu 20.04, the oldest image in releases.toml


class PackageRecord(VersionedSchema):
    """``package.json``: contents and origin of a package.

    Attributes:
        bundle: name of the bundle.
        artifacts: SHA-256 of each packaged artifact in the bundle.
        files: SHA-256 of every file, by path in the package.
        batch: the bundle's batch sizes; the models take no larger batch.
    """

    schema_: Literal["van-deploy/triton/5"] = Field(alias="schema")
    bundle: str
    artifacts: dict[str, str]
    files: dict[str, str]
    batch: BatchRange


@dataclass(frozen=True)
class PackageReport(Verdict):
    """Result of writing or checking a package.

    Attributes:
        path: folder of the package.
        files: number of files written.
        findings: results of the checks.
    """

    path: Path
    files: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.outcome is not False for finding in self.findings)


def package(
    bundle: Bundle, output: Path | None, settings: PackageSettings, only_check: bool
) -> PackageReport:
    """Write and check the package of a bundle, or only check an existing one.

    A folder is replaced by two renames; one that is not a package is refused.

    Raises:
        BundleError: an artifact is missing or was changed.
        ConversionError: pip cannot download the packages of an execution environment.
        InputError: Triton cannot load an artifact, or there is no package to check.
        MissingDependency: Triton's schema is not installed.
        UsageError: ``output`` is not a package or cannot be replaced, the release is unknown or
            cannot load a model, or ``only_check`` and other options are given.
    """
    path = Path(os.path.abspath(bundle.path))  # the bundle may be "."
    folder = output or path.with_name(f"{path.resolve().name}-triton")
    if only_check:
        if given := ", ".join(sorted(settings.model_fields_set)):
            raise UsageError(
                f"A check of an existing package takes no option that makes one: {given}.",
                "Leave out --check to write a package, or the other options to check it.",
            )
        return check_package(folder, bundle)
    artifacts = settings.artifacts or triton.default_artifacts(bundle)
    models = triton.triton_models(bundle, artifacts, settings.backend, gpu=settings.gpu)
    release, release_findings = _select_release(models, settings.triton_release)
    in_use = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if in_use and not (folder / PACKAGE_FILE).is_file():
        raise UsageError(
            f"'{folder}' exists and is not a package.",
            "Nothing was written. Give an empty or a new folder with --output DIR.",
        )
    target = Path(os.path.realpath(folder))  # a link stays a link
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise UsageError(
            f"'{folder}' cannot be replaced: the working folder is in it, or it is a mount point.",
            "Nothing was written. Give a folder inside it with --output DIR.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        new = Path(temporary) / "package"
        _write_package(new, models, settings, release)
        record = PackageRecord(
            schema="van-deploy/triton/5",
            bundle=bundle.name,
            artifacts={n: bundle.artifact(n).sha256 for m in models for _, n in m.files.values()},
            files=_digests(new),
            batch=bundle.manifest.batch,
        )
        (new / PACKAGE_FILE).write_text(record.text(), encoding="utf-8")
        if target.exists():
            os.replace(target, Path(temporary) / "old")
        os.replace(new, target)
    findings = (*check_package(folder, bundle).findings, *release_findings)
    return PackageReport(folder, len(record.files) + 1, findings)


def _select_release(models: Sequence[TritonModel], requested: str) -> tuple[str, list[Finding]]:
    """Return the requested release, or the newest that is known to load every model."""
    message, accepted = "", {True, None} if requested else {True}
    for release in [requested] if requested else triton.releases()["releases"]:
        findings = [triton.check_release(release, model) for model in models]
        rejected = next((one for one in findings if one.outcome not in accepted), None)
        if rejected is None:
            return str(release), findings
        name = rejected.name.removesuffix(": release")
        message = message or f"Triton {release} is not known to load '{name}': {rejected.detail}."
    raise UsageError(
        message,
        f"Choose another --triton-release (NVIDIA lists their contents: {MATRIX}), or use "
        "--backend python, which includes its own ONNX Runtime.",
    )


def check_package(path: Path, bundle: Bundle) -> PackageReport:
    """Check that the files of a package are unchanged and match the bundle's current artifacts.

    Raises:
        InputError: there is no package, or it belongs to another bundle.
    """
    record = read_document(PackageRecord, path / PACKAGE_FILE, "package record", InputError, AGAIN)
    if record.bundle != bundle.name:
        raise InputError(f"'{path}' was made from '{record.bundle}', not '{bundle.name}'.", AGAIN)
    digests = _digests(path)
    del digests[PACKAGE_FILE]
    different = sorted({file for file, _ in record.files.items() ^ digests.items()})
    problems = {"files": f"{', '.join(different)}: missing, changed or added" if different else ""}
    current = {name: entry.sha256 for name, entry in bundle.artifacts.items()}
    for name, digest in record.artifacts.items():
        same = current.get(name) == digest
        problems[f"artifact {name}"] = "" if same else "rebuilt in the bundle since"
    batch = bundle.manifest.batch
    same = record.batch == batch
    problems["batch sizes"] = "" if same else f"{record.batch}; the bundle has {batch}"
    findings = (Finding(name, not text, text or "unchanged") for name, text in problems.items())
    return PackageReport(path, 0, tuple(findings))


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder; "" for pipes and for links that are no file."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return {p.relative_to(folder).as_posix(): file_sha256(p) if p.is_file() else "" for p in found}


def _write_package(
    output: Path, models: Sequence[TritonModel], settings: PackageSettings, release: str
) -> None:
    """Write the model repository, the manifests and a client into a new folder."""
    with require_extra("Triton's schema of config.pbtxt", "triton"):
        from tritonclient.grpc import model_config_pb2
    from google.protobuf import json_format, text_format

    network, entry = models[0].network, triton.releases()["releases"].get(release, {})
    python = settings.triton_python or entry.get("python", "")
    archive, names = f"environment-python{python}.tar.gz", network.bundle.manifest.class_names
    if settings.backend == "python" and not python:
        unknown = f"The Python version of Triton {release} is not known."
        raise UsageError(unknown, "Give it with --triton-python, such as 3.12.")
    for model in models:
        folder, in_python = output / "models" / model.name, model.backend == "python"
        version = folder / str(settings.model_version)
        version.mkdir(parents=True)
        for file, (source, _) in model.files.items():
            shutil.copyfile(source, version / file)
        if names:
            (folder / triton.LABELS_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
        if in_python:
            (version / "model.py").write_text(fill_template("model.py.txt", {}), encoding="utf-8")
            if not (output / "models" / archive).exists():
                write_environment(output / "models" / archive, python)
        environment = f"$$TRITON_MODEL_DIRECTORY/../{archive}" if in_python else ""
        labels = triton.LABELS_FILE if names else ""
        config = triton.model_config(model, settings, labels=labels, environment=environment)
        message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
        (folder / "config.pbtxt").write_text(text_format.MessageToString(message), "utf-8")
    weights = sum(path.stat().st_size for model in models for path, _ in model.files.values())
    processes = settings.instances * sum(model.backend == "python" for model in models)
    plans = [model.sidecar.options for model in models if model.sidecar]
    values = {
        "name": kubernetes_name(network.bundle.name),
        "release": release,
        "cpus": settings.threads * settings.instances * len(models) or 2,
        "memory": BASE_MIB + PROCESS_MIB * processes + 4 * settings.instances * (weights >> 20),
        "max_batch": max(model.network.max_batch for model in models),
    }
    compatible = any(options.version_compatible for options in plans)
    flags = ["gpu" if settings.gpu or plans else "cpu", *["compatible"] * compatible]
    for file in ("compose.yaml", "kubernetes.yaml", "kserve.yaml"):
        (output / file).write_text(fill_template(file, values, flags), encoding="utf-8")
    if network.preprocessing.channels in {1, 3, 4} and network.outputs[0].name == "logits":
        (output / "client.py").write_text(render_client(models[0]), encoding="utf-8")


def kubernetes_name(text: str) -> str:
    """Return a name that Kubernetes takes for a service, and that YAML reads as a text.

    >>> kubernetes_name("Van_B1"), kubernetes_name("2024"), kubernetes_name("true")
    ('van-b1', 'van-2024', 'van-true')
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:50].rstrip("-")
    special = re.match(r"[0-9]|(y|yes|n|no|on|off|true|false|null|)$", name)
    return f"van-{name}".rstrip("-") if special else name


def render_client(model: TritonModel) -> str:
    """Return the source of an example client: one file without dependencies on this project.

    Users copy its preprocessing, so it contains the values of these weights, and tests check that
    it computes the same bytes as :mod:`van_deploy.model.preprocess`.
    """
    network, preprocessing = model.network, model.network.preprocessing
    values = {
        **asdict(preprocessing),
        "sides": preprocessing.sides,
        "resized": height_width(preprocessing.resize_size),
        "fill": tuple(round(255 * value) for value in preprocessing.mean),
        "filter": preprocessing.interpolation.upper(),
        "mode": image_mode(preprocessing.channels),
        "model": json.dumps(model.name),
        "input": json.dumps(network.input.name),
        "datatype": triton.DATATYPES[network.input.dtype],
    }
    activation = ACTIVATIONS.get(network.task, "sigmoid")
    covers = preprocessing.crop_mode == "center" and not isinstance(preprocessing.resize_size, int)
    mode = "cover" if covers else preprocessing.crop_mode
    flags = [network.embedding, activation, mode, preprocessing.crop_rounding]
    return fill_template("client.py.txt", values, flags)


def fill_template(template: str, values: Mapping[str, object], flags: Collection[str] = ()) -> str:
    """Return a file of ``templates/`` with its values filled in.

    A line that ends in ``#if FLAG...`` is kept if one of the flags is set; the marker is removed.
    ``$name`` is replaced by a value, as in :class:`string.Template`.

    Args:
        template: file name, such as ``compose.yaml``.
        values: values by name.
        flags: the flags that are set.
    """
    lines = []
    folder = resources.files("van_deploy.serve") / "templates"
    for line in (folder / template).read_text("utf-8").splitlines():
        text, marker, names = line.partition("#if ")
        if not marker or set(names.split()) & set(flags):
            lines.append(text.rstrip() if marker else line)
    return Template("\n".join(lines) + "\n").substitute(values)


def write_environment(archive: Path, python: str) -> None:
    """Write an execution environment of the Python backend with this version of ONNX Runtime.

    NVIDIA's images have no ONNX Runtime for Python. The archive is a virtual environment that
    Triton unpacks; the interpreter is the image's own.

    Args:
        archive: file to write, ``.tar.gz``.
        python: version of the server's Python, such as ``3.12``.

    Raises:
        ConversionError: pip cannot download the packages.
    """
    requirements = (f"onnxruntime=={require_onnxruntime().__version__}", NUMPY)
    with tempfile.TemporaryDirectory(prefix="van-deploy-") as folder:
        root, machine = Path(folder), platform.machine()
        packages = root / f"lib/python{python}/site-packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
        command += ["--target", str(packages), "--only-binary=:all:", "--python-version", python]
        for tag in (*(f"manylinux_2_{minor}" for minor in GLIBC_MINORS), "manylinux2014"):
            command += ["--platform", f"{tag}_{machine}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise ConversionError(
                f"pip cannot get {' and '.join(requirements)} for Python {python}: "
                f"{(errors or [done.stderr])[-1]}",
                "Check the connection, or choose a --triton-release whose Python has such a wheel.",
            )
        shutil.rmtree(packages / "bin", ignore_errors=True)  # scripts that start this interpreter
        (root / "bin").mkdir()
        (root / "bin/python3").symlink_to(INTERPRETER)
        for name, target in (("activate.txt", "bin/activate"), ("pyvenv.cfg", "pyvenv.cfg")):
            (root / target).write_text(fill_template(name, {}), encoding="utf-8")
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(root, ".", filter=_normalise_entry)


def _normalise_entry(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return an archive entry without properties that differ between runs or machines."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
    return entry
