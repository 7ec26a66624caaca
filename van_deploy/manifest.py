"""Schema of a bundle's manifest, for reading and writing.

A bundle is untrusted input: its manifest is validated once, when it is read. After that every
section exists and has its type.
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
from van_deploy.model.variants import STAGES, VanConfig, WeightsSource
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
REBUILD_REMEDY = "Create the bundle again in another folder with `van-deploy export`."
PER_STAGE = ("embed_dims", "depths", "mlp_ratios", "strides", "patch_sizes")
MAX_NAME_BYTES = 255  # of one file name, on all common file systems

Precision = Literal["fp32", "fp16", "bf16", "int8"]

Embedding = Literal["none", "normalize", "uint8"]
"""Preprocessing inside a graph (see :mod:`van_deploy.graph.embed`)."""


def require_relative_path(relative: str) -> str:
    """Return the path of a file if it is inside the bundle.

    Raises:
        ValueError: it is absolute, leaves the bundle, or is not a valid file name.
    """
    path = PurePosixPath(relative)
    too_long = any(len(part.encode(errors="replace")) > MAX_NAME_BYTES for part in path.parts)
    if too_long or len(relative) > MAX_TEXT_LENGTH or not relative.isprintable():
        raise ValueError("is not a file name")
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in relative:
        raise ValueError("is outside the bundle")
    return relative


RelativePath = Annotated[str, AfterValidator(require_relative_path)]
"""Path of a file inside the bundle, relative to its folder."""


class Origin(Schema):
    """Source of an artifact.

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
        shape: numbers, and names of dynamic dimensions.
    """

    dtype: Text
    shape: Annotated[tuple[Count | Text, ...], Field(min_length=1)]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape without the batch; -1 for dynamic dimensions."""
        return tuple(-1 if isinstance(length, str) else length for length in self.shape[1:])


class GraphInfo(Schema):
    """Contents of an ONNX file.

    Attributes:
        opset: ONNX operator set.
        ir_version: of the file's format.
        nodes: number of operators.
        operators: number of each type.
        weight_bytes: size of its weights.
        inputs: by name.
        outputs: by name.
        exported_nodes: nodes before simplification; None if not exported from PyTorch.
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
    """A TensorRT engine or an Inductor package; its sidecar has the details.

    Attributes:
        backend: name and version, such as ``tensorrt-rtx 1.7.1.2`` or ``inductor 2.14.1``.
        targets: compute capabilities it runs on, such as ``sm_89``; for CPUs the architecture,
            such as ``x86_64``.
        profiles: batch sizes it supports.
        parser_layers: layers that TensorRT's parser created; 0 for a package.
    """

    backend: Text
    targets: tuple[Text, ...]
    profiles: tuple[BatchRange, ...]
    parser_layers: Count


class Artifact(Schema):
    """A graph, engine or package in a bundle.

    Attributes:
        name: its key in the manifest: its precision, or an engine's name.
        kind: ``onnx``; ``serving``, an ONNX file with preprocessing or other outputs; ``engine``,
            a TensorRT plan; ``package``, an Inductor package.
        precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``.
        file: the file to open, relative to the bundle.
        files: SHA-256 of every file of the artifact, also external weights and a sidecar.
        made_from: another artifact, or the weights.
        made_with: the inputs that determined the contents.
        graph: contents of an ONNX file.
        embedded: preprocessing inside it (see :mod:`van_deploy.graph.embed`).
        engine: facts of an engine or a package.
        quantization: settings and measured accuracy of the quantisation.
        golden_sqnr_db: SQNR of its logits on the golden samples when it was made, by
            runner, numeric class and other conditions.
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
    def onnx_files(self) -> dict[str, str]:
        """SHA-256 of the ONNX file and of its external weights."""
        return {file: sha256 for file, sha256 in self.files.items() if ".onnx" in file}


class GoldenInfo(Schema):
    """Golden samples: images in the bundle and PyTorch's outputs for them.

    Attributes:
        file: the arrays (see :mod:`van_deploy.checks.golden`).
        count: number of images.
        images: description in one phrase.
        originals: the encoded files of the first images.
        licence: terms for distributing the images.
    """

    file: RelativePath
    count: Count
    images: Text
    originals: tuple[RelativePath, ...]
    licence: Text


def _check_architecture(config: VanConfig) -> VanConfig:
    if set(config.out_indices) - set(range(len(config.embed_dims))):
        raise ValueError("has invalid out_indices")
    for name in PER_STAGE:
        if (count := len(getattr(config, name))) != STAGES:
            raise ValueError(f"has {count} {name}, not {STAGES}")
    classes = () if config.out_indices else ("num_classes",)
    for name in ("in_chans", *PER_STAGE, "lka_kernels", *classes):
        numbers = getattr(config, name)
        if any(not 0 < n < 2**31 for n in (numbers if isinstance(numbers, tuple) else (numbers,))):
            raise ValueError(f"has invalid {name}")
    return config


class NetworkInfo(Schema):
    """Description of the network in a bundle.

    Attributes:
        name: of the model, such as ``van_b1``.
        weights: their origin.
        architecture: of the network.
        parameters: number of parameters.
        preprocessing: of the input.
        class_names: in the order of the logits; None if unknown.
        batch: supported batch sizes; one size makes static graphs.
        sizes: input sizes of graphs with dynamic height and width; None if they are fixed.
        versions: of the packages that made the bundle.
        golden: golden samples; None if the bundle has none.
    """

    name: FileName
    weights: Annotated[WeightsSource, SafeDataclass]
    architecture: Annotated[VanConfig, SafeDataclass, AfterValidator(_check_architecture)]
    parameters: Count
    preprocessing: Annotated[Preprocessing, SafeDataclass]
    class_names: Annotated[tuple[Label, ...], Field(min_length=1)] | None
    batch: BatchRange
    sizes: SizeRange | None = None
    versions: dict[Text, Text]
    golden: GoldenInfo | None = None

    @model_validator(mode="after")
    def _check_consistency(self) -> NetworkInfo:
        """Refuse class names, sizes or preprocessing that do not match the network."""
        classes, channels = self.architecture.num_classes, self.architecture.in_chans
        if self.class_names is not None and len(self.class_names) != classes:
            raise ValueError(f"has {len(self.class_names)} class names for {classes} classes")
        if self.sizes is not None and not self.sizes.contains(self.preprocessing.image_size):
            raise ValueError(
                f"has preprocessing to {self.preprocessing.image_size}, outside its sizes"
            )
        if self.preprocessing.channels != channels:
            raise ValueError(
                f"has preprocessing to {self.preprocessing.channels} channels for a network with "
                f"{channels}"
            )
        return self


def _set_names(artifacts: dict[str, Artifact]) -> dict[str, Artifact]:
    """Return the artifacts with their keys as names; refuse one without the digest of its file."""
    for entry in artifacts.values():
        if entry.file not in entry.files:
            raise ValueError(f"has no digest of '{entry.file}'")
    return {key: entry.model_copy(update={"name": key}) for key, entry in artifacts.items()}


class Manifest(NetworkInfo, VersionedSchema):
    """Contents of ``manifest.json``.

    Attributes:
        written: time of the last change, by the machine's clock (ISO 8601, UTC).
        artifacts: by name, in the order they were made.
        checks: the latest result of each check, by its name.
        files: SHA-256 of files that are not part of an artifact, such as a report.
    """

    schema_: Literal["van-deploy/bundle/3"] = Field(alias="schema")
    written: Text
    artifacts: Annotated[dict[FileName, Artifact], AfterValidator(_set_names)]
    checks: dict[Text, JsonObject]
    files: dict[RelativePath, Text]

    @model_validator(mode="after")
    def _check_artifacts(self) -> Manifest:
        """Refuse graphs of another form, and classes that the artifacts were not made with."""
        for name, entry in self.artifacts.items():
            graph = entry.graph
            if graph and (len(graph.inputs) != 1 or not graph.outputs):
                raise ValueError(f"has a graph '{name}' without outputs or with no single input")
            recorded = entry.made_with.get("class names")
            if recorded not in (None, content_key({"names": self.class_names or ()})):
                raise ValueError(f"has other class names than those '{name}' was made with")
            logits = graph.outputs.get("logits") if graph else None
            if logits and logits.shape[-1] != self.architecture.num_classes:
                raise ValueError(
                    f"has {self.architecture.num_classes} classes; the logits of '{name}' have "
                    f"{logits.shape[-1]}"
                )
        return self


def read_manifest(folder: Path, text: str | None = None) -> Manifest:
    """Return the manifest of the bundle in ``folder``; does not open the files in it.

    Args:
        folder: of the bundle.
        text: contents of the manifest; None reads its file.

    Raises:
        BundleError: it does not exist, is damaged, of another version, or names files outside the
            bundle.
    """
    path = folder / MANIFEST
    if text is None and not path.exists():
        raise BundleError(
            f"'{folder}' is not a bundle: it has no {MANIFEST}.",
            "Create one with `van-deploy export MODEL --output DIR`.",
        )
    return read_document(Manifest, path, "manifest", BundleError, REBUILD_REMEDY, text)
