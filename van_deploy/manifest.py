"""What a bundle's manifest says, as one model: written with it, and read with it.

A bundle from somewhere else is input like any other. So the manifest is checked once,
when it is read; after that every section is there, and of its type.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from van_deploy.config import BatchRange
from van_deploy.config.sizes import SizeRange
from van_deploy.documents import MAX_TEXT_LENGTH
from van_deploy.errors import BundleError
from van_deploy.files import content_key
from van_deploy.model.preprocess import Preprocessing
from van_deploy.model.variants import VanConfig, WeightsSource
from van_deploy.schema import (
    Count,
    FileName,
    JsonObject,
    Label,
    SafeDataclass,
    Schema,
    Text,
    VersionedSchema,
    read_document,
)

SCHEMA: Final = "van-deploy/bundle/3"
MANIFEST = "manifest.json"
REBUILD_REMEDY = "Make the bundle anew: `van-deploy export MODEL --output DIR`, in another folder."
LONGEST_NAME_BYTES = 255  # of one file, on every file system in use

Precision = Literal["fp32", "fp16", "bf16", "int8"]

Embedding = Literal["none", "normalize", "uint8"]
"""Which preprocessing a graph has inside (see :mod:`van_deploy.graph.embed`)."""


def require_relative_path(relative: str) -> str:
    """Return the path of a file if it stays inside the bundle.

    Raises:
        ValueError: it is absolute, climbs out, or is no name of a file.
    """
    path = PurePosixPath(relative)
    too_long = any(len(part.encode(errors="replace")) > LONGEST_NAME_BYTES for part in path.parts)
    if too_long or len(relative) > MAX_TEXT_LENGTH or not relative.isprintable():
        raise ValueError("is no name of a file")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative:
        raise ValueError("is outside the bundle")
    return relative


RelativePath = Annotated[str, AfterValidator(require_relative_path)]
"""Path of a file, relative to the bundle and inside it."""


class Origin(Schema):
    """What an artifact was made from.

    Attributes:
        name: another artifact's name, or ``weights``.
        sha256: of its file, in hexadecimal.
    """

    name: Text
    sha256: Text


class TensorInfo(Schema):
    """An input or an output of a graph.

    Attributes:
        dtype: NumPy's name.
        shape: numbers, and names where a dimension is free.
    """

    dtype: Text
    shape: Annotated[tuple[Count | Text, ...], Field(min_length=1)]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape without the batch; -1 where it is free."""
        return tuple(-1 if isinstance(length, str) else length for length in self.shape[1:])


class GraphInfo(Schema):
    """What an ONNX file holds.

    Attributes:
        opset: ONNX operator set.
        ir_version: of the file's format.
        nodes: operators in it.
        operators: how many of each type.
        weight_bytes: of its weights.
        inputs: by name.
        outputs: by name.
        exported_nodes: nodes before simplification; None where nothing was exported from PyTorch.
    """

    opset: Count
    ir_version: Count
    nodes: Count
    operators: dict[Text, Count]
    weight_bytes: Count
    inputs: dict[Text, TensorInfo]
    outputs: dict[Text, TensorInfo]
    exported_nodes: Count | None = None


class EngineInfo(Schema):
    """What a TensorRT engine or an Inductor package is; its sidecar says the rest.

    Attributes:
        backend: name and version, such as ``tensorrt-rtx 1.7.1.2`` or ``inductor 2.14.1``.
        targets: compute capabilities it serves, such as ``sm_89``; a package for CPUs has
            their architecture, such as ``x86_64``.
        profiles: batch sizes it serves.
        parser_layers: layers TensorRT's parser made of the graph; 0 for a package.
    """

    backend: Text
    targets: tuple[Text, ...]
    profiles: tuple[BatchRange, ...]
    parser_layers: Count


class Artifact(Schema):
    """One thing in a bundle that can be run or read.

    Attributes:
        name: what the manifest calls it: its precision, or an engine's name.
        kind: ``onnx``; ``serving``, an ONNX file with more inside than the network; ``engine``,
            a TensorRT plan; ``package``, an Inductor package.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        file: the file to open, relative to the bundle.
        files: every file that belongs to it (external weights, a sidecar), and its SHA-256.
        made_from: another artifact, or the weights.
        made_with: everything that decided what is in it.
        graph: what is in it, if it is ONNX.
        embedded: preprocessing inside it (see :mod:`van_deploy.graph.embed`).
        engine: what it is, if it is an engine or a package.
        quantization: how it was quantised and what that cost, as measured.
        golden_sqnr_db: SQNR of its logits on the golden samples when it was made, by
            runner, numeric class and what else it depends on.
    """

    name: FileName = Field(default="", exclude=True)
    kind: Literal["onnx", "serving", "engine", "package"]
    precision: Precision
    file: RelativePath
    files: dict[RelativePath, Text]
    made_from: Origin
    made_with: JsonObject
    graph: GraphInfo | None = None
    embedded: Embedding = "none"
    engine: EngineInfo | None = None
    quantization: JsonObject = Field(default_factory=dict)
    golden_sqnr_db: dict[Text, float] = Field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file to open, in hexadecimal."""
        return self.files[self.file]

    @property
    def key(self) -> str:
        """Digest of :attr:`made_with`: equal where nothing that matters has changed."""
        return content_key(self.made_with)


class GoldenInfo(Schema):
    """Images in the bundle with PyTorch's own answers to them, to judge every artifact on.

    Attributes:
        file: the arrays (see :mod:`van_deploy.checks.golden`).
        count: how many images.
        images: what they are, one phrase.
        originals: encoded images that the first of them were read from.
        licence: under which terms the images may be passed on.
    """

    file: RelativePath
    count: Count
    images: Text
    originals: tuple[RelativePath, ...]
    licence: Text


def _positive(config: VanConfig) -> VanConfig:
    sides = {"in_chans": (config.in_chans,)}
    if not config.out_indices:
        sides["num_classes"] = (config.num_classes,)
    if set(config.out_indices) - set(range(len(config.embed_dims))):
        raise ValueError("has out_indices that no network has")
    for name in ("embed_dims", "depths", "mlp_ratios", "lka_kernels"):
        sides[name] = getattr(config, name)
    for name, numbers in sides.items():
        if any(not 0 < number < 2**31 for number in numbers):
            raise ValueError(f"has {name} that no network has")
    return config


class NetworkInfo(Schema):
    """What a bundle says of the network it deploys.

    Attributes:
        name: the model's, such as ``van_b1``.
        weights: where they came from.
        architecture: of the network.
        parameters: how many it has.
        preprocessing: what its input must have gone through.
        class_names: in the order of the logits; None where nobody says.
        batch: the batch sizes the bundle is made for; where there is one, graphs are static.
        sizes: the input sizes of graphs with dynamic height and width; None where they are fixed.
        versions: of what made the bundle, by package.
        golden: images and PyTorch's answers; None where they were left out.
    """

    name: FileName
    weights: Annotated[WeightsSource, SafeDataclass]
    architecture: Annotated[VanConfig, SafeDataclass, AfterValidator(_positive)]
    parameters: Count
    preprocessing: Annotated[Preprocessing, SafeDataclass]
    class_names: Annotated[tuple[Label, ...], Field(min_length=1)] | None
    batch: BatchRange
    sizes: SizeRange | None = None
    versions: dict[Text, Text]
    golden: GoldenInfo | None = None

    @model_validator(mode="after")
    def _fits(self) -> NetworkInfo:
        """Refuse names or preprocessing of another network."""
        classes, channels = self.architecture.num_classes, self.architecture.in_chans
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(f"has {len(self.class_names)} class names for {classes} classes")
        if self.sizes is not None and not self.sizes.contains(self.preprocessing.image_size):
            raise ValueError(
                f"prepares images of {self.preprocessing.image_size}, not in its sizes"
            )
        if self.preprocessing.channels != channels:
            raise ValueError(
                f"prepares {self.preprocessing.channels} channels for a network of {channels}"
            )
        return self


def _named(artifacts: dict[str, Artifact]) -> dict[str, Artifact]:
    """Return the artifacts, each with its key as its name and the digest of its file."""
    for entry in artifacts.values():
        if entry.file not in entry.files:
            raise ValueError(f"has no digest of '{entry.file}'")
    return {key: entry.model_copy(update={"name": key}) for key, entry in artifacts.items()}


class Manifest(NetworkInfo, VersionedSchema):
    """Everything in ``manifest.json``.

    Attributes:
        written: when, by the clock of the machine (ISO 8601, UTC).
        artifacts: by name, in the order they were made.
        checks: the newest result of each check, by its name.
        files: SHA-256 of the files that belong to no artifact, such as a report.
    """

    schema_: Literal["van-deploy/bundle/3"] = Field(alias="schema")
    written: Text
    artifacts: Annotated[dict[FileName, Artifact], AfterValidator(_named)]
    checks: dict[Text, JsonObject]
    files: dict[RelativePath, Text]


def manifest_from(text: str, path: Path) -> Manifest:
    """Return the manifest that the file at ``path`` holds; the files it names are not looked at.

    Raises:
        BundleError: it is damaged, of another version, or names files outside of the bundle.
    """
    return read_document(Manifest, path, "manifest", BundleError, REBUILD_REMEDY, text)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the bundle in ``folder``. Errors are :func:`manifest_from`'s.

    Raises:
        BundleError: there is none.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST}.",
            "Make one with `van-deploy export MODEL --output DIR`.",
        )
    return read_document(Manifest, path, "manifest", BundleError, REBUILD_REMEDY)
