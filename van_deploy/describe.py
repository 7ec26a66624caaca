"""Models, bundles and artifacts described without being run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from van_deploy.bundle import MANIFEST, Bundle, Manifest
from van_deploy.config.sizes import ImageSize
from van_deploy.engine.inspect import (
    EngineDescription,
    PackageDescription,
    describe_engine,
    describe_package,
)
from van_deploy.errors import InputError
from van_deploy.graph.files import OnnxDescription, describe_onnx
from van_deploy.model.preprocess import OFFICIAL, Preprocessing
from van_deploy.model.variants import VARIANTS, VanConfig, WeightsSource, find_cached_weights

ENGINES = (".plan", ".engine", ".trt")
Described = OnnxDescription | EngineDescription | PackageDescription


@dataclass(frozen=True)
class BundleDescription:
    """A bundle on disk.

    Attributes:
        path: its folder.
        problems: a sentence for each file that is missing or changed.
        sizes: bytes of each artifact that a runtime loads.
        manifest: what it says.
        kind: says what this describes.
    """

    path: Path
    problems: tuple[str, ...]
    sizes: Mapping[str, int]
    manifest: Manifest
    kind: Literal["bundle"] = "bundle"


@dataclass(frozen=True, kw_only=True)
class NetworkDescription:
    """A published variant, as far as is known without its weights, or a checkpoint.

    Attributes:
        kind: says which.
        name: what it is called.
        also_called: other names a variant goes by.
        variant: the published one with a checkpoint's architecture, or None.
        architecture: of the network.
        lka_dilation: of the second kernel of Large Kernel Attention.
        parameters: how many it has.
        multiply_adds: of one image.
        multiply_adds_at: size of that image in pixels: a side, or height and width.
        preprocessing: what its input must have gone through.
        top1_percent: published accuracy on ImageNet-1K; None where none was.
        weights: where a variant's public weights are; None where there are none.
        weights_note: what is to be known of them.
        here: the variant's weights on this machine, or None.
        source: where a checkpoint's weights came from.
        class_names: of a checkpoint, in the order of the logits, or None.
    """

    kind: Literal["variant", "weights"]
    name: str
    also_called: tuple[str, ...] = ()
    variant: str | None = None
    architecture: VanConfig
    lka_dilation: int
    parameters: int
    multiply_adds: int
    multiply_adds_at: ImageSize
    preprocessing: Preprocessing
    top1_percent: float | None = None
    weights: str | None = None
    weights_note: str = ""
    here: Path | None = None
    source: WeightsSource | None = None
    class_names: tuple[str, ...] | None = None


def describe_model(model: str) -> BundleDescription | NetworkDescription:
    """Return everything known of a bundle, of a variant, or of a checkpoint's weights.

    Raises:
        UsageError: there is no such variant.
        InputError: the checkpoint or the bundle cannot be read.
    """
    if Path(model).is_dir() and (Path(model) / MANIFEST).exists():
        bundle = Bundle.open(model)
        found = tuple(bundle.problems())
        return BundleDescription(bundle.path, found, bundle.sizes(), bundle.manifest)
    for variant in VARIANTS.values():
        if model in (variant.name, *variant.aliases):
            return NetworkDescription(
                kind="variant",
                name=variant.name,
                also_called=tuple(variant.aliases),
                **_counted(variant.config, OFFICIAL),
                top1_percent=variant.top1,
                weights=variant.weights,
                weights_note=variant.weights_note,
                here=find_cached_weights(variant),
            )
    from van_deploy.model.checkpoint import load_van

    loaded = load_van(model, offline=True)
    return NetworkDescription(
        kind="weights",
        name=loaded.name,
        variant=loaded.config.variant,
        **_counted(loaded.config, loaded.preprocessing),
        source=loaded.source,
        class_names=loaded.class_names,
    )


def _counted(config: VanConfig, preprocessing: Preprocessing) -> dict[str, Any]:
    size = preprocessing.image_size
    return {
        "architecture": config,
        "lka_dilation": config.lka_dilation,
        "parameters": config.parameter_count(),
        "multiply_adds": config.mac_count(size),
        "multiply_adds_at": size,
        "preprocessing": preprocessing,
    }


def describe_artifacts(artifact: Path, *, trust_engine: bool = False) -> list[Described]:
    """Return the description of one file, or of everything in a bundle that can be run.

    ``trust_engine`` is that of :func:`~van_deploy.engine.inspect.describe_engine`.

    Raises:
        InputError: there is nothing to describe, or it cannot be read.
    """
    files = [artifact]
    if artifact.is_dir():
        bundle = Bundle.open(artifact)
        files = [bundle.path / one.file for one in bundle.artifacts.values()]
    readers: dict[str, Callable[[Path], Described]] = {
        **dict.fromkeys(ENGINES, partial(describe_engine, trust_engine=trust_engine)),
        ".pt2": describe_package,
        ".onnx": describe_onnx,
    }
    for file in files:
        if not file.exists():
            raise InputError(f"There is no file '{file}'.", "Check the path.")
        if file.suffix not in readers:
            raise InputError(
                f"'{file}' is neither an ONNX file nor an engine.",
                f"Give a {', '.join(readers)} file or a bundle; "
                f"a checkpoint is shown by `van-deploy info {file}`.",
            )
    return [readers[file.suffix](file) for file in files]
