"""Whether a Triton model repository is what its own files and the bundle say.

Nothing here is derived by the code that wrote the package: the configuration is parsed by
Triton's own schema and compared with the graph's inputs and outputs, with the plans'
sidecars, and with what lies in the folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.engine.sidecar import verified_sidecar
from van_deploy.errors import InputError, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.schema import read_json
from van_deploy.serve.triton import PACKAGE_FILE, PACKAGE_FORMAT, PackageRecord
from van_deploy.serve.triton_config import DATATYPES, config_from_text
from van_deploy.serve.triton_model import spec_of, triton_models
from van_deploy.serve.triton_release import release_named

__all__ = ["Finding", "PackageCheck", "check_package"]

AGAIN = "Package the bundle again."
Tensors = dict[str, tuple[str, tuple[int, ...]]]


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
class PackageCheck:
    """Every finding about one repository."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong (and something was checked)."""
        return bool(self.findings) and all(f.outcome is not False for f in self.findings)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, object]:
        """Return the findings, ready for JSON."""
        findings = [asdict(finding) for finding in self.findings]
        return {"path": str(self.path), "passed": self.passed, "findings": findings}


def check_package(path: Path, bundle: Bundle) -> PackageCheck:
    """Return how the repository in ``path`` compares with its files and the bundle.

    Raises:
        InputError: there is no package, or it is another bundle's.
        MissingDependency: tritonclient, which holds Triton's schema, is not installed.
    """
    file = path / PACKAGE_FILE
    record = read_json(PackageRecord, file, "package record", InputError, AGAIN)
    if record.format != PACKAGE_FORMAT or record.bundle != bundle.name:
        raise InputError(
            f"'{path}' was made from '{record.bundle}' as {record.format}; this is "
            f"'{bundle.name}' and {PACKAGE_FORMAT}.",
            AGAIN,
        )
    wrong = [name for name, digest in record.files.items() if _digest(path / name) != digest]
    text = f"{', '.join(wrong)}: missing or changed" if wrong else "every file as it was written"
    findings = [Finding("files", not wrong, text)]
    for name, sources in record.models.items():
        for check in _of_model(path / "models" / name, record, sources, bundle):
            findings.append(Finding(f"{name}: {check.name}", check.outcome, check.detail))
    return PackageCheck(path, tuple(findings))


def _digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""


def _of_model(
    folder: Path, record: PackageRecord, sources: Mapping[str, str], bundle: Bundle
) -> Iterator[Finding]:
    version = folder / str(record.settings["version"])
    names = tuple(dict.fromkeys(sources.values()))
    try:
        config = config_from_text((folder / "config.pbtxt").read_text(encoding="utf-8"))
        (model,) = triton_models(bundle, names, config.backend)
        taken, given, batches = _truth(version, sources, bundle)
    except (OSError, ValueError, VanDeployError) as error:
        yield Finding("config", False, getattr(error, "message", str(error)))
        return
    old = [f for f, name in sources.items() if _digest(version / f) != _digest(model.files[f][0])]
    yield _finding("artefact", [f"{f} is not the bundle's" for f in old], ", ".join(names))
    yield Finding("release", *release_named(record.release).judged(model))
    yield _finding("tensors", _tensors(config, taken, given), "the file's own inputs and outputs")
    yield _finding("batches", _batches(config, batches), f"1 to {max(batches)}")
    yield _finding("files", _files(folder, version, config), "all that the configuration names")


def _finding(name: str, wrong: list[str], right: str) -> Finding:
    return Finding(name, not wrong, "; ".join(wrong) or right)


def _truth(
    version: Path, sources: Mapping[str, str], bundle: Bundle
) -> tuple[Tensors, Tensors, set[int]]:
    """Return inputs, outputs and batch sizes, from the graph or the plan's sidecar."""
    file, name = next(iter(sources.items()))
    if file.endswith(".plan"):
        sidecar = verified_sidecar(bundle.path / bundle.artefact(name).file)
        sides = ([spec_of(t) for t in tensors] for tensors in (sidecar.inputs, sidecar.outputs))
        taken, given = ({s.name: (DATATYPES[s.dtype], s.shape) for s in side} for side in sides)
        return taken, given, {n for p in sidecar.profiles for n in range(p.min, p.max + 1)}
    import onnx
    from google.protobuf.message import DecodeError

    from van_deploy.graph.files import graph_facts

    try:
        facts: Any = graph_facts(onnx.load(version / file, load_external_data=False))
    except DecodeError as error:
        raise ValueError(f"'{file}' is not ONNX: {error}") from error
    for values in (*facts["inputs"].values(), *facts["outputs"].values()):
        if not isinstance(values["shape"][0], str):
            raise ValueError(f"the graph has a fixed batch: {values['shape']}")  # noqa: TRY004
    taken, given = (
        {n: (DATATYPES[v["dtype"]], tuple(v["shape"][1:])) for n, v in facts[side].items()}
        for side in ("inputs", "outputs")
    )
    return taken, given, set(range(1, int(bundle.manifest["batch"]["max"]) + 1))


def _tensors(config: Any, taken: Tensors, given: Tensors) -> list[str]:
    wrong = []
    for what, found, wanted in (("inputs", config.input, taken), ("outputs", config.output, given)):
        described = {t.name: _described(t) for t in found}
        if described != wanted:
            wrong.append(f"the {what} are {described}, the file's {wanted}")
    for request in config.model_warmup:
        if {name: _described(value) for name, value in request.inputs.items()} != taken:
            wrong.append(f"the {request.name} of the warm-up is not what the model takes")
    return wrong


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    from tritonclient.grpc import model_config_pb2

    kind = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
    return kind, tuple(int(size) for size in tensor.dims)


def _batches(config: Any, batches: set[int]) -> list[str]:
    largest = config.max_batch_size
    wrong = [f"a batch of {n} is not taken" for n in range(1, largest + 1) if n not in batches][:1]
    if largest != max(batches):
        wrong.append(f"max_batch_size is {largest}, the largest batch {max(batches)}")
    wanted = [*config.dynamic_batching.preferred_batch_size]
    wanted += [request.batch_size for request in config.model_warmup]
    return wrong + [f"a batch of {n} is asked for" for n in wanted if n not in batches]


def _files(folder: Path, version: Path, config: Any) -> list[str]:
    needed = {config.default_model_filename, *config.cc_model_filenames.values()}
    wrong = [f"'{name}' is not there" for name in sorted(needed) if not (version / name).is_file()]
    if config.name != folder.name or [*config.version_policy.specific.versions] != [int(version.name)]:
        wrong.append(f"the name is '{config.name}' or the version not {version.name}")
    for tensor in config.output:
        if tensor.label_filename:
            labels = folder / tensor.label_filename
            count = len(labels.read_text("utf-8").splitlines()) if labels.is_file() else 0
            if [count] != [*tensor.dims]:
                wrong.append(f"{count} labels for an output of shape {[*tensor.dims]}")
    archive = config.parameters["EXECUTION_ENV_PATH"].string_value.rpartition("/")[2]
    if archive and not (folder.parent / archive).is_file():
        wrong.append(f"the execution environment '{archive}' is not there")
    return wrong
