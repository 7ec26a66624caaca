"""What a bundle's manifest says, as one model: written with it, and read with it.

A bundle from somewhere else is input like any other. So the manifest is checked once,
when it is read; after that every section is there, and of its type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from van_deploy.bundle.names import MANIFEST, inside
from van_deploy.config import BatchRange
from van_deploy.documents import json_from, text_from
from van_deploy.errors import BundleError
from van_deploy.fields import Count, FileName, Kept, Label, Table, Text
from van_deploy.files import content_key
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.variants import VanConfig
from van_deploy.model.weights_source import WeightsSource
from van_deploy.schema import Schema, validated_json

__all__ = [
    "SCHEMA",
    "Artefact",
    "Canary",
    "Description",
    "Embedding",
    "EngineFacts",
    "GraphFacts",
    "Manifest",
    "Origin",
    "Precision",
    "ProbableClass",
    "TensorFacts",
    "manifest_from",
    "read_manifest",
]

SCHEMA: Literal["van-deploy/bundle/2"] = "van-deploy/bundle/2"

Precision = Literal["fp32", "fp16", "int8"]

Embedding = Literal["none", "normalize", "uint8"]
"""Which preprocessing a graph has inside (see :mod:`van_deploy.graph.embed`)."""


def _place(relative: str) -> str:
    inside(relative)
    return relative


Place = Annotated[str, AfterValidator(_place)]
"""Path of a file, relative to the bundle and inside it."""


class Origin(Schema):
    """What an artefact was made from."""

    name: Text
    """Another artefact's name, or ``weights``."""
    sha256: Text
    """Of its file, in hexadecimal."""


class TensorFacts(Schema):
    """An input or an output of a graph."""

    dtype: Text
    """NumPy's name."""
    shape: Annotated[tuple[Count | Text, ...], Field(min_length=1)]
    """Numbers, and names where a dimension is free."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape without the batch; -1 where it is free."""
        return tuple(-1 if isinstance(length, str) else length for length in self.shape[1:])


class GraphFacts(Schema):
    """What an ONNX file holds, without opening it."""

    opset: Count
    ir_version: Count
    nodes: Count
    operators: dict[Text, Count]
    """How many of each type."""
    weight_bytes: Count
    inputs: dict[Text, TensorFacts]
    outputs: dict[Text, TensorFacts]
    exported_nodes: Count | None = None
    """Nodes before simplification; None where nothing was exported from PyTorch."""


class EngineFacts(Schema):
    """What a TensorRT engine is; its sidecar says the rest."""

    backend: Text
    """Name and version, such as ``tensorrt-rtx 1.7.1.2``."""
    targets: tuple[Text, ...]
    """Compute capabilities it serves, such as ``sm_89``."""
    profiles: tuple[BatchRange, ...]
    """Batch sizes it serves."""
    parser_layers: Count
    """Layers TensorRT's parser made of the graph."""


class Artefact(Schema):
    """One thing in a bundle that can be run or read."""

    name: FileName = Field(default="", exclude=True)
    """What the manifest calls it: ``fp32``, ``fp16``, ``int8``, or an engine's name."""
    kind: Literal["onnx", "serving", "engine"]
    """``serving`` is an ONNX file with more inside than the network."""
    precision: Precision
    file: Place
    """The file to open."""
    files: dict[Place, Text]
    """Every file that belongs to it (external weights, a sidecar), and its SHA-256."""
    made_from: Origin
    made_with: Table
    """Everything that decided what is in it."""
    graph: GraphFacts | None = None
    embedded: Embedding = "none"
    engine: EngineFacts | None = None
    quantization: Table = Field(default_factory=dict)
    """How it was quantised and what that cost, as measured."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file to open, in hexadecimal."""
        return self.files[self.file]

    @property
    def key(self) -> str:
        """Digest of :attr:`made_with`: equal where nothing that matters has changed."""
        return content_key(self.made_with)


class ProbableClass(Schema):
    """A class and its probability."""

    index: Count
    """Of the class, in the order of the logits."""
    probability: Annotated[float, Field(ge=0, le=1)]


class Canary(Schema):
    """An image in the bundle, and what PyTorch answers to it."""

    file: Place
    sha256: Text
    image: Text
    """What it is, one phrase."""
    reference: Text
    """What gave the answer."""
    top5: tuple[ProbableClass, ...]


def _positive(config: VanConfig) -> VanConfig:
    for name in ("embed_dims", "depths", "mlp_ratios", "lka_kernels"):
        if any(not 0 < number < 2**31 for number in getattr(config, name)):
            raise ValueError(f"has {name} that no network has")
    return config


def _possible(preprocessing: Preprocessing) -> Preprocessing:
    return Preprocessing.from_dict(vars(preprocessing))


class Description(Schema):
    """What a bundle says of the network it deploys."""

    name: FileName
    weights: Annotated[WeightsSource, Kept]
    architecture: Annotated[VanConfig, Kept, AfterValidator(_positive)]
    parameters: Count
    preprocessing: Annotated[Preprocessing, Kept, AfterValidator(_possible)]
    class_names: Annotated[tuple[Label, ...], Field(min_length=1)] | None
    """In the order of the logits; None where nobody says."""
    batch: BatchRange
    versions: dict[Text, Text]
    """Of what made the bundle, by package."""
    canary: Canary | None = None


def _named(artefacts: dict[str, Artefact]) -> dict[str, Artefact]:
    """Return the artefacts, each with its key as its name."""
    return {key: entry.model_copy(update={"name": key}) for key, entry in artefacts.items()}


class _Opening(Schema):
    """What a manifest begins with."""

    schema_: Literal["van-deploy/bundle/2"] = Field(alias="schema")
    written: Text
    """When, by the clock of the machine (ISO 8601, UTC)."""


class Manifest(Description, _Opening):
    """Everything in ``manifest.json``."""

    artefacts: Annotated[dict[FileName, Artefact], AfterValidator(_named)]
    checks: dict[Text, Table]
    """The newest result of each check, by its name."""
    files: dict[Place, Text]
    """SHA-256 of the files that belong to no artefact, such as a report."""

    def text(self) -> str:
        """Return the manifest as the file has it."""
        plain = self.model_dump(mode="json", by_alias=True)
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"

    def owned_files(self) -> set[str]:
        """Return the files that belong to an artefact, by relative path."""
        return {file for artefact in self.artefacts.values() for file in artefact.files}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the bundle in ``folder``; its form is checked, not its files.

    Raises:
        BundleError: there is none, it is damaged, of another schema, or names files outside.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST}.",
            "Make one with `van-deploy export MODEL --output DIR`.",
        )
    try:
        text = text_from(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return manifest_from(text, path)


def manifest_from(text: str, path: Path) -> Manifest:
    """Return the manifest that the file at ``path`` holds. Errors are :func:`read_manifest`'s."""
    try:
        raw = json_from(text)
    except ValueError as error:
        raise _damaged(path, error) from error
    schema = raw.get("schema") if isinstance(raw, Mapping) else None
    if isinstance(schema, str) and schema != SCHEMA:
        raise BundleError(
            f"'{path}' has schema '{schema}'; this version reads '{SCHEMA}'.",
            "Make the bundle anew, in another folder or once this one is removed: "
            "`van-deploy export MODEL --output DIR`.",
        )
    where, remedy = f"The manifest '{path}' is damaged", _AGAIN
    manifest = validated_json(Manifest, text, where=where, error=BundleError, remedy=remedy)
    for artefact in manifest.artefacts.values():
        if artefact.file not in artefact.files:
            raise _damaged(path, f"it has no digest of '{artefact.file}'")
    return manifest


_AGAIN = "Export the model again; nothing in this bundle can be trusted."


def _damaged(path: Path, reason: object) -> BundleError:
    return BundleError(f"The manifest '{path}' is damaged: {reason}.", _AGAIN)
