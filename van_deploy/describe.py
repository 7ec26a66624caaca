"""Descriptions of models, bundles and artifacts; nothing is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from van_deploy.bundle import Bundle, Manifest
from van_deploy.config.sizes import ImageSize
from van_deploy.engine import inspect
from van_deploy.errors import InputError
from van_deploy.graph.files import OnnxDescription, describe_onnx
from van_deploy.model import variants
from van_deploy.model.preprocess import OFFICIAL, Preprocessing

ENGINES = (".plan", ".engine", ".trt")
ArtifactDescription = OnnxDescription | inspect.EngineDescription | inspect.PackageDescription


@dataclass(frozen=True)
class BundleDescription:
    """A bundle on disk.

    Attributes:
        path: its folder.
        problems: a sentence for each file that is missing or changed.
        sizes: bytes of each artifact that a runtime can load.
        manifest: contents of its manifest.
        kind: type of the description.
    """

    path: Path
    problems: tuple[str, ...]
    sizes: Mapping[str, int]
    manifest: Manifest
    kind: Literal["bundle"] = "bundle"


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """A published variant, without loading its weights, or a checkpoint.

    Attributes:
        kind: type of the description.
        name: of the variant or the checkpoint.
        also_called: aliases of a variant.
        variant: the published variant with a checkpoint's architecture, or None.
        architecture: of the network.
        lka_dilation: of the second kernel of Large Kernel Attention.
        parameters: number of parameters.
        multiply_adds: of one image.
        multiply_adds_at: size of that image in pixels: a side, or height and width.
        preprocessing: of the input.
        top1_percent: published accuracy of a variant.
        weights: where a variant's weights are published.
        weights_note: licence or origin of these weights.
        here: the variant's weights on this machine, or None.
        source: origin of a checkpoint's weights.
        class_names: of a checkpoint, in the order of the logits, or None.
    """

    kind: Literal["variant", "weights"]
    name: str
    also_called: tuple[str, ...] = ()
    variant: str | None = None
    architecture: variants.VanConfig
    lka_dilation: int
    parameters: int
    multiply_adds: int
    multiply_adds_at: ImageSize
    preprocessing: Preprocessing
    top1_percent: float | None = None
    weights: str | None = None
    weights_note: str = ""
    here: Path | None = None
    source: variants.WeightsSource | None = None
    class_names: tuple[str, ...] | None = None


def describe_model(model: str) -> BundleDescription | NetworkDescription:
    """Return the description of a variant, a bundle, or a checkpoint's weights.

    As in :func:`~van_deploy.model.checkpoint.load_van`, a published name goes before a path.

    Raises:
        UsageError: the variant does not exist.
        InputError: the checkpoint or the bundle cannot be read.
    """
    if not variants.is_published(model) and Bundle.exists(Path(model)):
        bundle = Bundle.open(model)
        problems = tuple(bundle.problems())
        return BundleDescription(bundle.path, problems, bundle.sizes(), bundle.manifest)
    details: dict[str, Any]
    if variant := variants.find_variant(model):
        config, preprocessing = variant.config, OFFICIAL
        path_note = f"the path '{model}' is not described (give './{model}')"
        note = path_note if Path(model).exists() else variant.weights_note
        details = {"kind": "variant", "name": variant.name, "also_called": variant.aliases}
        details |= {"top1_percent": variant.top1, "weights": variant.weights}
        details |= {"weights_note": note, "here": variants.find_cached_weights(variant)}
    else:
        from van_deploy.model.checkpoint import load_van

        loaded = load_van(model, offline=True)
        config, preprocessing = loaded.config, loaded.preprocessing
        details = {"kind": "weights", "name": loaded.name, "variant": config.variant}
        details |= {"source": loaded.source, "class_names": loaded.class_names}
    size = preprocessing.image_size
    return NetworkDescription(
        architecture=config,
        lka_dilation=config.lka_dilation,
        parameters=config.parameter_count(),
        multiply_adds=config.mac_count(size),
        multiply_adds_at=size,
        preprocessing=preprocessing,
        **details,
    )


def describe_artifacts(artifact: Path, *, trust_engine: bool = False) -> list[ArtifactDescription]:
    """Return the description of one file, or of every artifact in a bundle.

    ``trust_engine`` is that of :func:`~van_deploy.engine.inspect.describe_engine`.

    Raises:
        InputError: the path does not exist, cannot be read as an artifact, or is a bundle one of
            whose artifacts was changed.
    """
    files = [artifact]
    if artifact.is_dir() or Bundle.exists(artifact):
        bundle = Bundle.open(artifact)
        files = [bundle.verified_path(name) for name in bundle.artifacts]
    readers: dict[str, Callable[[Path], ArtifactDescription]] = {".onnx": describe_onnx}
    engine = partial(inspect.describe_engine, trust_engine=trust_engine)
    readers |= {**dict.fromkeys(ENGINES, engine), ".pt2": inspect.describe_package}
    for file in files:
        if not file.exists():
            raise InputError(f"The file '{file}' does not exist.", "Check the path.")
        if file.suffix.lower() not in readers:
            message = f"'{file}' is neither an ONNX file nor an engine."
            remedy = f"`van-deploy info {file}` describes a checkpoint."
            raise InputError(message, f"Give a {', '.join(readers)} file or a bundle; {remedy}")
    return [readers[file.suffix.lower()](file) for file in files]
