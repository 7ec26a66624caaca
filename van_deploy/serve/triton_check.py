"""Whether a Triton model repository is what the bundle says: parsed by Triton's own schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from van_deploy.bundle import Bundle
from van_deploy.documents import json_from, text_from
from van_deploy.errors import InputError, MissingDependency, VanDeployError
from van_deploy.files import file_sha256
from van_deploy.runners.network import TensorSpec
from van_deploy.serve.triton import LABELS_FILE, PACKAGE_FILE, PACKAGE_SCHEMA, TritonModel
from van_deploy.serve.triton import triton_models as models_of
from van_deploy.serve.triton_config import PLATFORMS, TRITON_TYPES

__all__ = ["Finding", "PackageCheck", "check_package"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        name: of the model and the check.
        outcome: whether it is as it should be.
        detail: what was found.
    """

    name: str
    outcome: bool
    detail: str


@dataclass(frozen=True)
class PackageCheck:
    """Every finding about one repository."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether all is as it should be (and something was checked)."""
        return bool(self.findings) and all(finding.outcome for finding in self.findings)

    def __bool__(self) -> bool:
        """Return :attr:`passed`."""
        return self.passed

    def as_dict(self) -> dict[str, object]:
        """Return the findings, ready for JSON."""
        return {
            "path": str(self.path),
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
        }


def check_package(path: Path, bundle: Bundle) -> PackageCheck:
    """Return how the repository in ``path`` compares with the bundle it was made from.

    Raises:
        InputError: there is no package, or it is another bundle's.
        MissingDependency: tritonclient, which holds Triton's schema, is not installed.
    """
    schema = _schema()
    record = _record(path, bundle)
    findings: list[Finding] = [_digests(path, record)]
    for name, entry in record["models"].items():
        try:
            (model,) = models_of(bundle, [str(entry["artefact"])])
            findings.append(_same_artefact(name, entry, model))
        except VanDeployError as error:
            findings.append(Finding(f"{name}: artefact", False, error.message))
            continue
        findings += _of_model(path / "models" / name, model, schema)
    return PackageCheck(path, tuple(findings))


def _schema() -> Any:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:  # tritonclient raises RuntimeError without gRPC
        raise MissingDependency(
            f"Triton's schema is in tritonclient, which is not installed: {error}.",
            "Install it with `pip install 'tritonclient[grpc]'`.",
        ) from error
    return lambda text: text_format.Parse(text, model_config_pb2.ModelConfig())


def _record(path: Path, bundle: Bundle) -> Mapping[str, Any]:
    file = path / PACKAGE_FILE
    if not file.is_file():
        raise InputError(
            f"There is no package in '{path}'.", "Make it: `van-deploy package triton BUNDLE`."
        )
    try:
        record: Mapping[str, Any] = json_from(text_from(file))
        schema, name = record["schema"], record["bundle"]
        fields = (record["models"], record["files"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"'{file}' is damaged: {error}.", "Package the bundle again.") from error
    if schema != PACKAGE_SCHEMA or not all(isinstance(field, dict) for field in fields):
        raise InputError(f"'{file}' is of another kind: {schema}.", "Package the bundle again.")
    if name != bundle.name:
        raise InputError(
            f"'{path}' was made from '{name}', not from '{bundle.name}'.",
            "Give the bundle it was made from.",
        )
    return record


def _digests(path: Path, record: Mapping[str, Any]) -> Finding:
    wrong = []
    for name, digest in record["files"].items():
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file_sha256(file) != digest:
            wrong.append(f"{name} was changed")
    detail = "; ".join(wrong) or f"{len(record['files'])} files as they were written"
    return Finding("files", not wrong, detail)


def _same_artefact(name: str, entry: Mapping[str, Any], model: TritonModel) -> Finding:
    same = file_sha256(model.path) == entry["sha256"]
    detail = "the bundle's" if same else "the bundle's was made anew since: package it again"
    return Finding(f"{name}: artefact", same, f"{model.artefact} is {detail}")


def _of_model(folder: Path, model: TritonModel, schema: Callable[[str], Any]) -> Iterator[Finding]:
    try:
        config = schema((folder / "config.pbtxt").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # protobuf's ParseError is a ValueError or an OSError
        yield Finding(f"{model.name}: config", False, str(error))
        return
    except Exception as error:  # text_format.ParseError derives from Error only
        yield Finding(f"{model.name}: config", False, f"not a ModelConfig: {error}")
        return
    yield Finding(f"{model.name}: config", True, "parsed by Triton's schema")
    for check in (_identity, _tensors, _batches, _labels, _warmup, _graph):
        wrong = list(check(folder, config, model))
        right = check.__doc__ or ""
        name = check.__name__.strip("_")
        yield Finding(f"{model.name}: {name}", not wrong, "; ".join(wrong) or right)


def _identity(folder: Path, config: Any, model: TritonModel) -> Iterator[str]:
    """Name, back end and file."""
    backend, file = PLATFORMS[model.kind]
    if not config.name == folder.name == model.name:
        yield f"the name is '{config.name}', the folder '{folder.name}', expected '{model.name}'"
    if config.backend != backend:
        yield f"the back end is '{config.backend}', expected '{backend}'"
    if config.default_model_filename != file or not (folder / "1" / file).is_file():
        yield f"the file is '{config.default_model_filename}', expected '{file}', which must exist"
    if config.response_cache.enable:
        yield "the response cache is on"


def _tensors(_: Path, config: Any, model: TritonModel) -> Iterator[str]:
    """Names, types and shapes are the artefact's."""
    for what, found, wanted in (
        ("input", config.input, (model.input,)),
        ("output", config.output, model.outputs),
    ):
        described = {tensor.name: _described(tensor) for tensor in found}
        expected = {spec.name: _expected(spec) for spec in wanted}
        if described != expected:
            yield f"the {what}s are {described}, the artefact's {expected}"


def _batches(_: Path, config: Any, model: TritonModel) -> Iterator[str]:
    """The batch limit is the artefact's, and preferred sizes are within it."""
    if config.max_batch_size != model.max_batch:
        yield f"max_batch_size is {config.max_batch_size}, the artefact's limit {model.max_batch}"
    preferred = list(config.dynamic_batching.preferred_batch_size)
    if any(not 1 <= size <= model.max_batch for size in preferred):
        yield f"preferred sizes {preferred} are not all within 1 to {model.max_batch}"


def _labels(folder: Path, config: Any, model: TritonModel) -> Iterator[str]:
    """As many class names as classes."""
    for tensor in config.output:
        if not tensor.label_filename:
            continue
        file = folder / tensor.label_filename
        if tensor.label_filename != LABELS_FILE or not file.is_file():
            yield f"'{tensor.label_filename}' is not there"
            continue
        names = file.read_text(encoding="utf-8").splitlines()
        if [len(names)] != list(tensor.dims):
            yield f"{len(names)} names for an output of shape {list(tensor.dims)}"


def _warmup(_: Path, config: Any, model: TritonModel) -> Iterator[str]:
    """Warm-up requests are what the input takes."""
    for request in config.model_warmup:
        values = dict(request.inputs)
        described = {name: _described(value) for name, value in values.items()}
        if described != {model.input.name: _expected(model.input)}:
            yield f"the warm-up '{request.name}' sends {described}"
        if not 1 <= request.batch_size <= model.max_batch:
            yield f"the warm-up '{request.name}' has a batch of {request.batch_size}"


def _graph(folder: Path, _: Any, model: TritonModel) -> Iterator[str]:
    """The file itself has these inputs and outputs, and a free batch."""
    path = folder / "1" / PLATFORMS[model.kind][1]
    if model.kind != "onnx" or not path.is_file():
        return  # a plan is compared by its sidecar, which vouches for its bytes
    import onnx
    from google.protobuf.message import DecodeError

    from van_deploy.graph.files import graph_facts

    try:
        graph = graph_facts(onnx.load(path, load_external_data=False))
    except DecodeError as error:
        yield f"'{path.name}' is not ONNX: {error}"
        return
    pairs = (("inputs", graph.inputs, (model.input,)), ("outputs", graph.outputs, model.outputs))
    for key, tensors, wanted in pairs:
        found = {n: (v.dtype, v.row_shape) for n, v in tensors.items()}
        if found != {spec.name: (spec.dtype, spec.shape) for spec in wanted}:
            yield f"the graph's {key} are {found}"
        if any(not isinstance(v.shape[0], str) for v in tensors.values()):
            yield f"the graph's {key} have a fixed batch"


def _described(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return int(tensor.data_type), tuple(int(size) for size in tensor.dims)


def _expected(spec: TensorSpec) -> tuple[int, tuple[int, ...]]:
    from tritonclient.grpc import model_config_pb2

    return int(model_config_pb2.DataType.Value(TRITON_TYPES[spec.dtype])), spec.shape
