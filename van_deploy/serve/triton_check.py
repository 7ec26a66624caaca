"""Whether a Triton model repository is what its own files and the bundle say.

Nothing is taken from the code that wrote the package: the configuration is parsed by Triton's
own schema and compared with the graph in the package, or with the plan's sidecar.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.engine.sidecar import verified_sidecar
from van_deploy.errors import InputError, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.schema import read_json
from van_deploy.serve.triton import PACKAGE_FILE, PackageRecord
from van_deploy.serve.triton_config import TYPES, config_from_text
from van_deploy.serve.triton_model import triton_models
from van_deploy.serve.triton_release import release_named

__all__ = ["Finding", "PackageCheck", "check_package"]

AGAIN = "Package the bundle again."
PLAN_TYPES = {"float": "float32", "half": "float16"}
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
    record = read_json(PackageRecord, path / PACKAGE_FILE, "package record", InputError, AGAIN)
    if record.bundle != bundle.name:
        raise InputError(
            f"'{path}' was made from '{record.bundle}', not from '{bundle.name}'.", AGAIN
        )
    wrong = [f for f, digest in record.files.items() if _digest(path / f) != digest]
    text = f"{', '.join(wrong)}: missing or changed" if wrong else "every file as it was written"
    findings = [Finding("files", not wrong, text)]
    for name, sources in record.models.items():
        try:
            checks = list(_of_model(path / "models" / name, record, sources, bundle))
        except (OSError, ValueError, VanDeployError) as error:
            checks = [("package", False, getattr(error, "message", str(error)))]
        findings += [Finding(f"{name}: {check}", *result) for check, *result in checks]
    return PackageCheck(path, tuple(findings))


def _digest(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""


def _of_model(
    folder: Path, record: PackageRecord, sources: Mapping[str, str], bundle: Bundle
) -> Iterator[tuple[str, bool | None, str]]:
    version = folder / str(record.settings["version"])
    config = config_from_text((folder / "config.pbtxt").read_text(encoding="utf-8"))
    (model,) = triton_models(bundle, tuple(sources.values()), config.backend)
    old = [f for f in sources if _digest(version / f) != _digest(model.files[f][0])]
    text = f"{', '.join(old)}: not the bundle's, which was made anew since"
    yield "artefact", not old, text if old else "the bundle's"
    yield "release", *release_named(record.release).judged(model)
    first = next(iter(sources))
    if first.endswith(".plan"):
        sidecar = verified_sidecar(bundle.path / bundle.artefact(sources[first]).file)
        inputs, outputs = (
            {t.name: (PLAN_TYPES.get(t.dtype, t.dtype), t.shape[1:]) for t in side}
            for side in (sidecar.inputs, sidecar.outputs)
        )
        batches = {n for p in sidecar.profiles for n in range(p.min, p.max + 1)}
    else:
        inputs, outputs = _graph_tensors(version / first)
        batches = set(range(1, bundle.manifest.batch.max + 1))
    wrong = [*_tensors(config, inputs, outputs), *_batches(config, batches)]
    yield "config", not wrong, "; ".join(wrong) or "as the file itself says"


def _graph_tensors(path: Path) -> tuple[Tensors, Tensors]:
    """Return inputs and outputs of an ONNX file, less the batch, which must be dynamic."""
    import onnx
    from google.protobuf.message import DecodeError

    from van_deploy.graph.files import graph_facts

    try:
        facts = graph_facts(onnx.load(path, load_external_data=False))
    except DecodeError as error:
        raise ValueError(f"'{path.name}' is not ONNX: {error}") from error
    if not all(isinstance(t.shape[0], str) for t in (facts.inputs | facts.outputs).values()):
        raise ValueError(f"'{path.name}' has a fixed batch")
    sides = (facts.inputs, facts.outputs)
    inputs, outputs = ({n: (t.dtype, t.row_shape) for n, t in side.items()} for side in sides)
    return inputs, outputs


def _tensors(config: Any, inputs: Tensors, outputs: Tensors) -> Iterator[str]:
    for found, wanted in ((config.input, inputs), (config.output, outputs)):
        described = {tensor.name: _described(tensor) for tensor in found}
        if described != wanted:
            yield f"the tensors are {described}, the file's {wanted}"
    for request in config.model_warmup:
        if {name: _described(value) for name, value in request.inputs.items()} != inputs:
            yield f"the warm-up '{request.name}' is not what the model takes"


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    return TYPES[tensor.data_type], tuple(tensor.dims)


def _batches(config: Any, batches: Collection[int]) -> Iterator[str]:
    if config.max_batch_size != max(batches):
        yield f"max_batch_size is {config.max_batch_size}, the largest batch {max(batches)}"
    wanted = [*config.dynamic_batching.preferred_batch_size]
    wanted += [request.batch_size for request in config.model_warmup]
    for rows in [*range(1, config.max_batch_size + 1), *wanted]:
        if rows not in batches:
            yield f"a batch of {rows} is not taken"
            return
