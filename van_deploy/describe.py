"""Models, bundles and artefacts described without being run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from van_deploy.config.sizes import ImageSize

if TYPE_CHECKING:
    from van_deploy.engine.inspect import EngineDescription, PackageDescription
    from van_deploy.graph.files import OnnxDescription
    from van_deploy.manifest import Manifest
    from van_deploy.model.preprocess import Preprocessing
    from van_deploy.model.variants import VanConfig, Variant, WeightsSource


ENGINES = (".plan", ".engine", ".trt")


@dataclass(frozen=True)
class BundleDescription:
    """A bundle on disk.

    Attributes:
        path: its folder.
        problems: a sentence for each file that is missing or changed.
        sizes: bytes of each artefact that a runtime loads.
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
    """A network.

    Attributes:
        name: what it is called.
        architecture: of the network.
        lka_dilation: of the second kernel of Large Kernel Attention.
        parameters: how many it has.
        multiply_adds: of one image.
        multiply_adds_at: size of that image in pixels: a side, or height and width.
        preprocessing: what its input must have gone through.
    """

    name: str
    architecture: VanConfig
    lka_dilation: int
    parameters: int
    multiply_adds: int
    multiply_adds_at: ImageSize
    preprocessing: Preprocessing


@dataclass(frozen=True, kw_only=True)
class VariantDescription(NetworkDescription):
    """A published variant, as far as is known without its weights.

    Attributes:
        also_called: other names it goes by.
        top1_percent: published accuracy on ImageNet-1K; None where none was.
        weights: where the public weights are; None where there are none.
        weights_note: what is to be known of them.
        here: the weights' file on this machine, or None.
        kind: says what this describes.
    """

    also_called: tuple[str, ...]
    top1_percent: float | None
    weights: str | None
    weights_note: str
    here: Path | None
    kind: Literal["variant"] = "variant"


@dataclass(frozen=True, kw_only=True)
class WeightsDescription(NetworkDescription):
    """A checkpoint.

    Attributes:
        variant: the published one with this architecture, or None.
        source: where the weights came from.
        class_names: in the order of the logits, or None.
        kind: says what this describes.
    """

    variant: str | None
    source: WeightsSource
    class_names: tuple[str, ...] | None
    kind: Literal["weights"] = "weights"


Described = BundleDescription | VariantDescription | WeightsDescription


def model_described(model: str, image_size: ImageSize | None = None) -> Described:
    """Return everything known of a bundle, of a variant, or of a checkpoint's weights.

    Args:
        model: which.
        image_size: of the image the multiply-adds are counted for, in pixels; None for
            the network's own.

    Raises:
        UsageError: there is no such variant.
        InputError: the checkpoint or the bundle cannot be read.
    """
    from van_deploy.bundle import MANIFEST, Bundle
    from van_deploy.model.variants import VARIANTS

    if Path(model).is_dir() and (Path(model) / MANIFEST).exists():
        bundle = Bundle.open(model)
        return BundleDescription(
            bundle.path, tuple(bundle.problems()), bundle.sizes(), bundle.manifest
        )
    for variant in VARIANTS.values():
        if model in (variant.name, *variant.aliases):
            return _variant(variant, image_size)
    return _weights(model, image_size)


def _variant(variant: Variant, image_size: ImageSize | None) -> VariantDescription:
    from van_deploy.model.preprocess import OFFICIAL
    from van_deploy.model.variants import locate_weights

    return VariantDescription(
        name=variant.name,
        also_called=tuple(variant.aliases),
        **_counted(variant.config, image_size or OFFICIAL.image_size),
        preprocessing=OFFICIAL,
        top1_percent=variant.top1,
        weights=variant.weights,
        weights_note=variant.weights_note,
        here=locate_weights(variant),
    )


def _weights(spec: str, image_size: ImageSize | None) -> WeightsDescription:
    from van_deploy.model.checkpoint import load_van

    loaded = load_van(spec, offline=True)
    return WeightsDescription(
        name=loaded.name,
        variant=loaded.config.variant,
        **_counted(loaded.config, image_size or loaded.preprocessing.image_size),
        preprocessing=loaded.preprocessing,
        source=loaded.source,
        class_names=loaded.class_names,
    )


def _counted(config: VanConfig, size: ImageSize) -> dict[str, Any]:
    return {
        "architecture": config,
        "lka_dilation": config.lka_dilation,
        "parameters": config.parameter_count(),
        "multiply_adds": config.mac_count(size),
        "multiply_adds_at": size,
    }


def artefacts_described(
    artefact: Path, *, trust_engine: bool = False
) -> list[OnnxDescription | EngineDescription | PackageDescription]:
    """Return the description of one file, or of everything in a bundle that can be run.

    ``trust_engine`` is that of :func:`~van_deploy.engine.inspect.describe_engine`.

    Raises:
        InputError: there is nothing to describe, or it cannot be read.
    """
    from van_deploy.bundle import Bundle
    from van_deploy.errors import InputError
    from van_deploy.graph.files import describe_onnx

    if artefact.is_dir():
        bundle = Bundle.open(artefact)
        files = [bundle.path / artefact.file for artefact in bundle.artefacts.values()]
        return [
            one for file in files for one in artefacts_described(file, trust_engine=trust_engine)
        ]
    if not artefact.exists():
        raise InputError(f"There is no file '{artefact}'.", "Check the path.")
    if artefact.suffix in ENGINES:
        from van_deploy.engine.inspect import describe_engine

        return [describe_engine(artefact, trust_engine=trust_engine)]
    if artefact.suffix == ".pt2":
        from van_deploy.engine.inspect import describe_package

        return [describe_package(artefact)]
    if artefact.suffix == ".onnx":
        return [describe_onnx(artefact)]
    raise InputError(
        f"'{artefact}' is neither an ONNX file nor an engine.",
        f"Give a .onnx, .pt2 or {', '.join(ENGINES)} file or a bundle; "
        f"a checkpoint is shown by `van-deploy info {artefact}`.",
    )
